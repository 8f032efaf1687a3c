"""The HTML report: well formed, complete, safe, and in need of nothing else."""

import math
import re
from dataclasses import fields
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import battery
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import lightning_prune
from lightning_prune import files
from lightning_prune.reporting.charts import HEIGHT, LEFT, WIDTH, LineChart, Mark, line_chart
from lightning_prune.reporting.figures import metric_against_flops, widths
from lightning_prune.reporting.history import (
    Compensation,
    History,
    Layer,
    MetricsAround,
    Prune,
    read_histories,
    write_history,
)
from lightning_prune.reporting.measurement import Measurement
from lightning_prune.reporting.report import render, templates, write_comparison, write_report
from lightning_prune.reporting.speed import Speed

VOID = {"meta", "br", "!doctype"}


class Page(HTMLParser):
    """Reads a page: its text, its attributes, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


COMPENSATION = Compensation("refit", 1024, {"b.weight": (0.5, 0.0625)}, {"c.weight": "others share it"}, 0.25, 0.0625)


def history(**changes: object) -> History:
    """Return the history of a run with one prune."""
    layers = [Layer("a", 800.0, 80.0, 1.0), Layer("b", 200.0, 20.0, 0.5)], [Layer("a", 400.0, 40.0, 0.5)]
    content = {
        "model": "mine.Net", "callback": "PruningCallback", "settings": {"keep": 0.5}, "module": "",
        "groups": {"a": 8, "b": 16}, "unprunable": {"head": (10, "is an output"), "neck": (4, "is an output")},
        "before": Measurement(100, 1000, 2.0, {"val/acc": 0.75}), "layers_before": layers[0],
        "prunes": [Prune(1, 2, {"metric": "flops", "asked": 0.5, "achieved": 0.484375}, {"a": 4, "b": 12},
                         Measurement(60, 600, 1.25), COMPENSATION,
                         MetricsAround({"val/acc": 0.75}, {"val/acc": 0.25}, {"val/acc": 0.625}))],
        "layers_after": layers[1],
        "epochs": [{"epoch": 1, "keep_flops": 1.0, "val/acc": 0.75}, {"epoch": 3, "keep_flops": 0.6, "val/acc": 0.875}],
    }  # fmt: skip
    return History(**{**content, **changes})


def test_the_report_of_a_run_tells_all_of_it(tmp_path: Path) -> None:
    _, trainer = battery.train(tmp_path, battery.make_callback("magnitude"), logger=CSVLogger(tmp_path))
    folder = Path(trainer.log_dir)
    (folder / "config.yaml").write_text("seed: 7 # <the config>\n")
    path = write_report(folder)
    assert path == folder / "report.html"
    (told,) = read_histories(folder)
    text = "\n".join(Page(path.read_text()).text)
    for words in (
        "ResidualClassifier pruned by PruningCallback", "battery.ResidualClassifier", "val/accuracy", "seed: 7 # <the",
        "head: is an output of the network", "round_to",
        *told.groups, *(layer.name for layer in told.layers_before),
        *(f"{told.widths[name]} of {size}" for name, size in told.groups.items()),
        *(f"{prune.after.flops:,}" for prune in told.prunes), *(f"{p.budget['achieved']:.3f}" for p in told.prunes),
    ):  # fmt: skip
        assert words in text, words
    assert [each.name for each in folder.iterdir() if "report" in each.name] == ["report.html"]


def test_numbers_and_bars_by_hand() -> None:
    text = render([history()], "runs/1")
    page = Page(text)
    words = " ".join(page.text)
    assert "60.0%" in words  # of the FLOPs and of the parameters
    assert "not known" in words  # how fast it is: that was not timed in turns
    assert "0.8750" in words  # the metric of the last validation
    assert "What cannot be pruned, and why" in words
    assert re.search(r"head \(10\).*neck \(4\).*is an output", words)
    assert words.count("is an output") == 1  # one row for all of the same reason
    for group, outer, inner in (("a", "50.0", "25.0"), ("b", "100.0", "75.0")):
        row = re.search(rf'title="{group}: \d+ of.*?</div>', text)
        assert row is not None
        assert re.findall(r"width:([\d.]+)%", row[0]) == [outer, inner]


FASTER = Speed([2.0, 2.25, 1.75], [1.0, 1.125, 0.875], "CPU, 1 thread")


def test_a_speed_is_told_with_its_spread_or_not_at_all() -> None:
    timed = history(
        speed=FASTER, layers_before=[Layer("a", 800.0, 80.0, 1.0, (0.75, 1.25)), Layer("b", 1.0, 1.0, 1.0, (0.5, 1.5))],
        layers_after=[Layer("a", 400.0, 40.0, 0.5, (0.25, 0.625)), Layer("b", 1.0, 1.0, 0.75, (0.5, 1.5))],
    )  # fmt: skip
    words = " ".join(" ".join(Page(render([timed], "runs/1")).text).split())
    assert "2.00x 2.00 (1.88-2.12) ms → 1.00 (0.94-1.06) ms; 3 turns of each network" in words
    assert "; 2.00x as fast (2.00-2.00)" in words
    assert "1.00 (0.75-1.25) → 0.500 (0.250-0.625)" in words
    assert "1.00 (0.50-1.50) → 0.750 (0.500-1.500), no difference" in words
    alike = history(speed=Speed([2.0, 2.25, 1.75], [1.5, 2.0, 1.75], "CPU, 1 thread"))
    words = " ".join(Page(render([alike], "runs/1")).text)
    assert "no difference" in words
    assert "no faster or slower, as far as was measured" in words
    assert not re.search(r"\dx", words)


def test_the_verdict_says_what_was_lost_and_gained() -> None:
    text = " ".join(Page(render([history(speed=FASTER)], "runs/1")).text)
    assert (
        "60.0% of the FLOPs and 60.0% of the parameters are kept; 2.00x as fast (2.00-2.00); "
        "val/acc is 0.8750, +0.1250 from before the first prune."
    ) in text


def test_a_run_without_pruning_stands_beside_one_with_it(tmp_path: Path) -> None:
    pruned, table, board = (tmp_path / name for name in ("pruned", "table", "board"))
    pruned.mkdir()
    write_history(pruned, history(speed=FASTER))
    for logger in (CSVLogger(table, "", ""), TensorBoardLogger(board, "", "")):
        logger.log_metrics({"val/acc": 0.25, "train/loss": 2.0}, step=1)
        logger.log_metrics({"val/acc": 0.9375}, step=2)
        logger.log_metrics({"train/loss": 1.0}, step=3)
        logger.finalize("success")
    for run in (table, board):
        words = " ".join(" ".join(Page(write_report(pruned, tmp_path / "page.html", run).read_text()).text).split())
        assert f"{run} {pruned} parameters - 60 FLOPs - 600 times as fast as its original - 2.00x" in words
        assert "val/acc 0.9375 0.8750 (-0.0625)" in words
        assert "train/loss" not in words
    path = write_comparison([pruned, table, pruned])
    assert path == pruned / "compare.html"
    words = " ".join(" ".join(Page(path.read_text()).text).split())
    assert "parameters 60 - 60 (100.0%)" in words
    assert words.count("Net pruned by PruningCallback") == 4  # a page for each of both, and their settings
    (table / "metrics.csv").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"metrics.csv' is damaged"):
        write_report(pruned, baseline=table)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no pruning callback has logged there"):
        write_report(pruned, baseline=tmp_path / "empty")


def test_the_page_tells_of_compensation() -> None:
    words = " ".join(" ".join(Page(render([history()], "runs/1")).text).split())
    assert "greatest 1 refit 1,024 1 0.25 0.062" in words
    assert "not compensated at prune 1 reason c.weight others share it" in words
    plain = Prune(1, 2, {}, {"a": 4}, Measurement(60, 600, 1.25))
    assert "Compensation" not in render([history(prunes=[plain])], "runs/1")


def test_the_page_needs_no_network_and_no_script() -> None:
    text = render([history()], "runs/1", "a: 1")
    page = Page(text)
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not {name for _, name, _ in page.attributes} & {"src", "href", "onload", "onclick"}
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text


def test_names_are_text_and_never_markup() -> None:
    nasty = '<script>alert("1")</script>&'
    changed = history(
        model=f"mine.{nasty}", groups={nasty: 8}, unprunable={nasty: (1, nasty)}, prunes=[], layers_before=[
            Layer(nasty, 1.0, 1.0, 1.0)], layers_after=[], epochs=[{"epoch": 1, "keep_flops": 1.0, nasty: 0.5}],
        settings={"ignore": [nasty]},
    )  # fmt: skip
    text = render([changed], nasty, nasty)
    Page(text)
    assert "<script" not in text


KINDS = (History, Layer, Prune, Measurement, Compensation, MetricsAround, Speed)
KNOWN = {one.name for kind in KINDS for one in fields(kind)} | {
    "version", "epoch", "keep_flops", "asked", "achieved", "metric",
}  # fmt: skip


def spoiled(value: Any, nasty: str) -> Any:
    """Return nested plain values with something nasty in every text and every name of an entry."""
    if isinstance(value, str):
        return value and value + nasty
    if isinstance(value, list | tuple):
        return [spoiled(each, nasty) for each in value]
    if isinstance(value, dict):
        return {key if key in KNOWN else key + nasty: spoiled(each, nasty) for key, each in value.items()}
    return value


@pytest.mark.parametrize(
    "nasty", ["<script>alert(1)</script>", "\"' onload=alert(1) x='\"", "</style></title><i>", "&lt;i&gt;"]
)
def test_no_field_of_a_history_is_ever_markup(nasty: str) -> None:
    measured = Measurement(60, 600, 1.25, {"val/acc": 0.5}, 700, fvcore_failure="no trace")
    told = history(module="body", after=measured, speed=FASTER)
    changed = spoiled(told.to_json(), nasty)
    plain = Page(render([told], "runs/1", "a: 1"))
    page = Page(render([History.from_json(changed)], f"runs/1{nasty}", f"a: 1{nasty}"))
    assert [tag for tag, _, _ in page.attributes] == [tag for tag, _, _ in plain.attributes]
    assert [name for _, name, _ in page.attributes] == [name for _, name, _ in plain.attributes]
    shown = "".join([*page.text, *(value or "" for _, _, value in page.attributes)])
    assert shown.count(nasty) > 20  # and all of it is there to be read


def test_half_characters_can_be_written(tmp_path: Path) -> None:
    write_history(tmp_path, history(groups={"\ud800": 8}, prunes=[]))
    assert "\\ud800: 8 of 8 channels" in write_report(tmp_path).read_text("utf-8")


@pytest.mark.filterwarnings("ignore:overflow encountered")  # matplotlib's, at 1e308
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308])
def test_runs_with_metrics_that_are_not_finite_are_drawn(value: float, tmp_path: Path) -> None:
    odd = Measurement(60, 600, value, {"val/acc": value})
    epochs = [
        {"epoch": 1, "keep_flops": 1.0, "val/acc": 0.5, "val/loss": value}, {"epoch": 2, "keep_flops": 1.0},
        {"epoch": 3, "keep_flops": 0.6, "val/acc": value}, {"epoch": 4, "keep_flops": 0.6, "val/acc": 0.75},
    ]  # fmt: skip
    layers = [Layer("a", value, value, value)]
    told = history(before=odd, after=odd, epochs=epochs, layers_before=layers, layers_after=layers)
    write_history(tmp_path, told)
    page = Page(write_report(tmp_path).read_text())
    drawn = [value for tag, name, value in page.attributes if (tag, name) == ("circle", "cx")]
    assert len(drawn) == 4 + 2  # the corners of FLOPs, and two accuracies
    words = "".join(page.text)
    assert "val/acc (1 not finite, left out)" in words
    assert "val/loss (1 not finite, left out)" in words
    pixels = [value for _, name, value in page.attributes if name in ("cx", "cy", "x1", "y1", "points", "style")]
    assert not any("nan" in value or "inf" in value for value in pixels)
    metric_against_flops(told, "val/acc").savefig(BytesIO())


def test_a_metric_with_a_dollar_sign_is_no_formula() -> None:
    told = history(groups={"$\\x$": 8}, prunes=[], epochs=[{"epoch": 1, "keep_flops": 1.0, "$\\x$": 0.5}])
    for figure in (widths(told), metric_against_flops(told, "$\\x$")):
        figure.savefig(BytesIO())  # a formula that is none would be refused


def test_a_run_that_has_only_begun_has_a_report() -> None:
    bare = history(prunes=[], epochs=[], layers_after=[], unprunable={}, before=Measurement(100, 1000, 2.0))
    words = " ".join(Page(render([bare], "runs/1")).text)
    assert "Nothing has been pruned yet." in words
    assert "What cannot be pruned" not in words


def test_a_run_with_two_callbacks_has_both_in_its_report() -> None:
    words = " ".join(Page(render([history(module="backbone"), history(module="head")], "runs/1")).text)
    assert "backbone pruned by PruningCallback" in words
    assert "head pruned by PruningCallback" in words


def test_flops_that_are_counted_differently_are_said_to_be() -> None:
    assert "counted by" not in render([history(before=Measurement(100, 1000, 2.0, cost_model_flops=1000))], "runs/1")
    text = render([history(before=Measurement(100, 1000, 2.0, cost_model_flops=1010))], "runs/1")
    assert "FLOPs before: 1,000 counted by fvcore, 1,010 by the cost model (+10)." in text
    text = render([history(after=Measurement(60, 600, 1.25, fvcore_failure="no <trace>"))], "runs/1")
    assert "FLOPs after: 600 counted by the cost model, as fvcore cannot: no &lt;trace&gt;." in text


def test_the_templates_are_in_the_package() -> None:
    tomllib = pytest.importorskip("tomllib")  # not in Python 3.10
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        shipped = tomllib.load(file)["tool"]["setuptools"]["package-data"]["lightning_prune"]
    package = Path(lightning_prune.__file__).parent
    files = {path for pattern in shipped for path in package.glob(pattern)}
    assert {package / "reporting" / "templates" / name for name in templates().list_templates()} <= files


def test_a_report_that_cannot_be_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, trainer = battery.train(tmp_path, battery.make_callback("magnitude"), logger=CSVLogger(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere': make it first"):
        write_report(trainer.log_dir, tmp_path / "nowhere" / "report.html")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="disk full"):
        write_report(trainer.log_dir)
    assert sorted(tmp_path.rglob("*")) == before


def svg(chart: LineChart) -> str:
    """Return a chart as the report draws it."""
    return str(templates().get_template("charts.jinja").module.line_chart(chart))


NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(NUMBERS, min_size=1, max_size=8), start=st.integers(0, 50), mark=st.integers(0, 80))
def test_all_points_lie_within_the_chart_in_order(values: list[float], start: int, mark: int) -> None:
    points = [(float(start + number), value) for number, value in enumerate(values)]
    drawn = ElementTree.fromstring(svg(line_chart("a & b", points, [Mark(float(mark), "<prune>")])))
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in drawn.iter("circle")]
    assert len(circles) == len(points)
    assert all(LEFT <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in circles)
    assert circles == sorted(circles, key=lambda circle: circle[0])
    for (_, one), (_, other), (_, y), (_, z) in zip(points, points[1:], circles, circles[1:], strict=False):
        assert one == other or (one < other) == (y > z) or abs(y - z) <= 0.1  # higher values stand higher
    (line,) = (each for each in drawn.iter("line") if each.get("class") == "mark")
    assert LEFT <= float(line.attrib["x1"]) <= WIDTH
