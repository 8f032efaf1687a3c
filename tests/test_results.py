"""The page of results says what the files of results say, and each claim can be run."""

import argparse
import copy
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "render_results.py"
sys.path.append(str(SCRIPT.parent))  # scripts import what is beside them
script, files, plotting, stored = map(import_module, ("render_results", "result_files", "result_plots", "stored"))
CONTENT = yaml.safe_load((ROOT / "benchmarks" / "claims.yaml").read_text())
CLAIMS, FILES = CONTENT["claims"], CONTENT["files"]
METHOD_PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
EXAMPLES: dict[str, tuple[Any, list[tuple[str, str, str, str, float]]]] = {  # a file of each kind, and what it says
    "oracle_correlation.json": (
        {
            "vgg": {
                "0": {
                    "l1": {"per layer": 0.1, "all layers": 0.2, "all layers, L2": 0.3},
                    "accuracy": 0.7,
                    "made": {"settings": {}, "hardware": "a CPU"},
                }
            }
        },
        [
            ("vgg", "l1", "per layer", "0", 0.1),
            ("vgg", "l1", "all layers", "0", 0.2),
            ("vgg", "l1", "all layers, L2", "0", 0.3),
        ],
    ),
    "criteria_finetune.json": (
        {
            "vgg | L1 | 2": {"flops": 0.5, "pruned": 0.25, "accuracy": 0.5, "validation": 0.625, "time": 0.75},
            "vgg, keep 0.7 | not pruned | 2": {"accuracy": 0.75, "made": {"settings": {}, "hardware": "a CPU"}},
        },
        [
            ("vgg", "L1", "fine-tuned (%)", "2", 50.0),
            ("vgg", "L1", "when pruned (%)", "2", 25.0),
            ("vgg", "L1", "validation (%)", "2", 62.5),
            ("vgg", "L1", "FLOPs kept (%)", "2", 50.0),
            ("vgg", "L1", "time kept (%)", "2", 75.0),
            ("vgg, keep 0.7", "not pruned", "fine-tuned (%)", "2", 75.0),
        ],
    ),
    "compensation.json": (
        {
            "net | not pruned | 1": {"accuracy": 0.75, "flops": 1.0, "seconds": {}},
            "net, keep 0.7 | L1, refit | 1": {"accuracy": 0.5, "flops": 0.7, "seconds": {"plan": 20.0, "prune": 30.0}},
            "net | L1, refit | 2": {
                "accuracy": 0.25,
                "flops": 0.5,
                "seconds": {"prune": 70.0},
                "made": {"settings": {}, "hardware": "a CPU"},
            },
        },
        [
            ("net", "not pruned", "right after (%)", "1", 75.0),
            ("net", "not pruned", "FLOPs kept (%)", "1", 100.0),
            ("net, keep 0.7", "L1, refit", "right after (%)", "1", 50.0),
            ("net, keep 0.7", "L1, refit", "FLOPs kept (%)", "1", 70.0),
            ("net, keep 0.7", "L1, refit", "seconds of a core", "1", 50.0),
            ("net, keep 0.7", "L1, refit", "seconds left of 60", "1", 10.0),
            ("net, keep 0.7", "L1, refit", "against the whole network", "1", -25.0),
            ("net", "L1, refit", "right after (%)", "2", 25.0),
            ("net", "L1, refit", "FLOPs kept (%)", "2", 50.0),
            ("net", "L1, refit", "seconds of a core", "2", 70.0),
            ("net", "L1, refit", "seconds left of 60", "2", -10.0),
        ],
    ),
    "compensation_cost.json": (
        {"net, 8 images | refit | 0": {"error": 0.5, "seconds": 2.0, "mib": 300.0, "flops": 0.5}},
        [
            ("net, 8 images", "refit", "error of the logits", "0", 0.5),
            ("net, 8 images", "refit", "seconds of a core", "0", 2.0),
            ("net, 8 images", "refit", "seconds left of 90", "0", 88.0),
            ("net, 8 images", "refit", "MiB beyond the network", "0", 300.0),
        ],
    ),
    "small_vit.json": (
        {"vit | MLP, refit | 0": {"accuracy": 0.5, "pruned": 0.25, "flops": 0.75, "time": 0.125, "widths": {}}},
        [
            ("vit", "MLP, refit", "fine-tuned (%)", "0", 50.0),
            ("vit", "MLP, refit", "when pruned (%)", "0", 25.0),
            ("vit", "MLP, refit", "FLOPs kept (%)", "0", 75.0),
            ("vit", "MLP, refit", "time kept (%)", "0", 12.5),
        ],
    ),
    "two_classes.json": (
        {"vgg | pruned | 0": {"accuracy": 0.5, "filters": 0.25, "widths": {}, "speed_1": 2.0, "speed_32": 3.0}},
        [
            ("vgg", "pruned", "accuracy (%)", "0", 50.0),
            ("vgg", "pruned", "filters kept", "0", 0.25),
            ("vgg", "pruned", "speed-up, batch 1", "0", 2.0),
            ("vgg", "pruned", "speed-up, batch 32", "0", 3.0),
        ],
    ),
    **{
        name: (
            {"net, 9 steps | joint | 1": {"accuracy": 0.5, "flops": 0.25, "seconds": {}}},
            [
                ("net, 9 steps", "joint", "accuracy (%)", "1", 50.0),
                ("net, 9 steps", "joint", "FLOPs kept (%)", "1", 25.0),
            ],
        )
        for name in ("rl_joint.json", "learn_to_prune.json")
    },
    "afie_epochs.json": (
        {"vgg; 3 epochs; seed 1": {"unpruned": {"accuracy": 0.5, "first against last": 0.9}, "made": {"settings": {}}}},
        [
            ("vgg; 3 epochs", "unpruned", "accuracy (%)", "1", 50.0),
            ("vgg; 3 epochs", "first", "order against last", "1", 0.9),
        ],
    ),
    "sensitiveness_order.json": (
        {
            "conv4": {
                "0": {
                    "accuracy": 0.9,
                    "noise": {"order": 0.8},
                    "pruned": {"uniform": {"accuracy": 0.5}},
                    "made": {"settings": {}, "hardware": "a CPU"},
                }
            }
        },
        [
            ("conv4", "noise", "order, early against last", "0", 0.8),
            ("conv4", "uniform", "accuracy (%)", "0", 50.0),
        ],
    ),
    "agents_vs_sb3.json": (
        [
            {"env": "Pendulum-v1", "steps": 1000} | row
            for row in [
                {"agent": "sac", "seed": 4, "return": -1.5, "steps_per_second": 9.0},
                {"agent": "sb3-sac", "seed": 4, "return": -2.0, "steps_per_second": 6.0},
                {"agent": "sb3-sac", "seed": 5, "return": -9.0, "steps_per_second": 2.0},
                {"agent": "ppo-kl", "seed": 4, "return": 3.0, "steps_per_second": 8.0},
                {"agent": "sb3-ppo", "seed": 5, "return": 3.0, "steps_per_second": 8.0},
            ]
        ],
        [
            ("Pendulum-v1, 1,000 steps", agent, column, seed, value)
            for agent, seed, columns in [
                ("sac", "4", {"return": -1.5, "steps per second": 9.0}),
                ("sac", "4", {"return above peer's, % of it": 25.0, "steps per second / peer's": 1.5}),
                ("sb3-sac", "4", {"return": -2.0, "steps per second": 6.0}),
                ("sb3-sac", "5", {"return": -9.0, "steps per second": 2.0}),
                ("ppo-kl", "4", {"return": 3.0, "steps per second": 8.0}),  # whose peer had another seed
                ("sb3-ppo", "5", {"return": 3.0, "steps per second": 8.0}),
            ]
            for column, value in columns.items()
        ],
    ),
    "agents_vs_random_search.json": (
        {"settings": {"episodes": 10, "keep": 0.5}, "rewards": {"sac/3": [0.75, *[0.0] * 7, 0.25, 0.5]}},
        [
            ("ResNet-20, 10 episodes, keep 0.5", "sac", "best reward (%)", "3", 75.0),
            ("ResNet-20, 10 episodes, keep 0.5", "sac", "mean reward of the last fifth (%)", "3", 37.5),
        ],
    ),
    "latency_budget.json": (
        {
            "resnet18 | 8 | 2.0": {
                "asked": 2.0,
                "reached": 1.5,
                "kept score": 1.1,
                "other speed-up": 1.8,
                "kept score by ranking alone": 1.05,
            },
            "resnet18 | 8 | half": {"reached": 1.75},
            "vgg16_bn | 8 | half": {"reached": 1.5, "rounds": [1.25, 2.0, 1.5], "made": {"settings": {}}},
        },
        [
            ("half the FLOPs, batch 8", "resnet18", "speed-up", "0", 1.75),
            ("half the FLOPs, batch 8", "vgg16_bn", "speed-up", "0", 1.25),
            ("half the FLOPs, batch 8", "vgg16_bn", "speed-up", "1", 2.0),
            ("half the FLOPs, batch 8", "vgg16_bn", "speed-up", "2", 1.5),
            ("all networks and batch sizes", "2.0x asked", "reached by FLOPs / reached", "resnet18, batch 8", 1.2),
            ("all networks and batch sizes", "2.0x asked", "reached / asked", "resnet18, batch 8", 0.75),
            ("all networks and batch sizes", "2.0x asked", "score kept / that by FLOPs", "resnet18, batch 8", 1.1),
            ("all networks and batch sizes", "2.0x asked", "the same by ranking alone", "resnet18, batch 8", 1.05),
        ],
    ),
    "merging.json": (
        {"net, 0.5 | coherent OBS | 0": {"error": 0.1, "nearer": 0.25, "made": {"settings": {}, "hardware": "a CPU"}}},
        [
            ("net, 0.5", "coherent OBS", "error of the layer behind", "0", 0.1),
            ("net, 0.5", "coherent OBS", "share of layers where it is smaller", "0", 0.25),
        ],
    ),
    "momentum.json": (
        {"net | SGD | 1": {"accuracy": 0.7, "validation": 0.8, "made": {"settings": {}, "hardware": "a CPU"}}},
        [("net", "SGD", "validation (%)", "1", 80.0), ("net", "SGD", "test (%)", "1", 70.0)],
    ),
}


def test_the_page_is_what_the_script_renders():
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_page_that_was_changed_by_hand_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(script, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(sys, "argv", [SCRIPT.name])
    script.main()
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--check"])
    script.main()
    (tmp_path / "results.md").write_text(script.PAGE.read_text().replace("not run", "holds", 1))
    with pytest.raises(SystemExit, match=r"not what the files give: results\.md;"):
        script.main()


@pytest.mark.parametrize("about", [*CLAIMS, *FILES.values()], ids=lambda about: str(about.get("claim", "file")))
def test_every_command_can_be_run(about: dict[str, Any]):
    command = about["command"] if "command" in about else FILES[about["result"]]["command"]
    program, target = re.fullmatch(r"(python|lightning-prune fit --config) (\S+\.\w+).*", command).groups()
    assert target.endswith(".py" if program == "python" else ".yaml")
    assert (ROOT / target).is_file()
    for option in re.findall(r" (--[\w-]+)", command.partition(target)[2]):
        assert f'"{option}"' in (ROOT / target).read_text()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim["claim"])
def test_every_claim_can_be_judged_or_says_why_not(claim: dict[str, Any]):
    assert claim["method"] in script.METHODS
    assert claim["source"]
    assert ("result" in claim) != ("because" in claim)
    if "result" in claim:
        _, entries = EXAMPLES[claim["result"]]
        assert {claim["column"], claim.get("by", claim["column"])} <= {column for _, _, column, _, _ in entries}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_their_scripts_write_them(name: str, tmp_path: Path):
    content, entries = EXAMPLES[name]
    assert files.read(name, FILES[name], tmp_path) == {}
    (tmp_path / name).write_text(json.dumps(content))
    found = files.read(name, FILES[name], tmp_path)
    for setting, row, column, seed, value in entries:
        assert found[setting][row][column].pop(seed) == pytest.approx(value)
    assert [values for rows in found.values() for row in rows.values() for values in row.values() if values] == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        # The bound lies 2.920 / sqrt(3) = 1.686 deviations below the mean, of four values 2.353 / 2 = 1.177.
        ([[1.2, 2.2, 3.2], [9.0, 9.0, 9.0]], "**holds**"),  # 2.2 - 1.686 is above 0.5
        ([[1.1, 2.1, 3.1], [9.0, 9.0, 9.0]], "**holds partly**"),  # 2.1 - 1.686 is not
        ([[1.0, 1.0, 2.0, 2.0]], "**holds**"),  # 1.5 - 1.177 * 0.577
        ([[0.5, 0.5, 0.5], [-1.0, -1.0, -1.0]], "**does not hold**"),  # to reach the goal is not to pass it
        ([[9.0, 9.0, 9.0], [9.0, 9.0]], "**holds** (1 parts not judged)"),
        ([[9.0, 9.0, 9.0], []], "**holds** (1 parts not judged)"),
        ([[9.0, 9.0], [9.0]], "not judged, because there are 2 of 3 seeds"),
        ([], "not run, because there are 0 of 3 seeds"),
    ],
)
def test_verdicts(values: list[list[float]], said: str):
    assert script.verdict([script.Part("", each, 0.5) for each in values]) == said


def test_a_goal_for_every_case_is_missed_by_one():
    assert script.Part("", [1.0, 9.0, 2.0], 0.5, every=True).met
    assert not script.Part("", [9.0, 9.0, 0.5], 0.5, every=True).met


def test_leads_are_taken_seed_by_seed():
    claim = {"column": "x", "of": ["ours", "nobody"], "over": ["theirs", "not there"], "above": 0.0}
    figures = {"net": {"ours": {"x": {"0": 1.0, "1": 5.0, "2": 7.0}}, "theirs": {"x": {"2": 4.0, "1": 3.0}}}}
    part, missing = script.parts(claim, figures)
    assert part.values == [2.0, 3.0]
    assert missing.show(1) == "net: `ours` over `not there`: not run"
    assert part.show(1) == "net: `ours` over `theirs`: 2.5 ± 0.7 (2; above 0: not judged)"
    (alone,) = script.parts({**claim, "over": [None]}, figures)
    assert alone.values == [1.0, 5.0, 7.0]


def test_the_row_that_is_best_by_another_column_is_compared():
    """Test accuracy, in `x`, says that the other is best."""
    rows = {
        "ours": {"x": {"0": 5.0}, "validation": {"0": 3.0, "1": 3.0}},
        "better": {"x": {"0": 4.0}, "validation": {"0": 1.0, "1": 6.0}},
        "validated on one seed": {"x": {"0": 2.0}, "validation": {"1": 7.0}},
        "never validated": {"x": {"0": 9.0}},
        "theirs": {"x": {"0": 1.0}},
    }
    rest = ["ours", "better", "never validated", "validated on one seed"]
    claim = {"column": "x", "by": "validation", "of": rest, "over": ["theirs"], "above": 0.0}
    part, missing = script.parts({**claim, "in": ["net", "not there"]}, {"net": rows, "other net": rows})
    assert (part.name, part.values) == ("net: `better` over `theirs`", [3.0])
    assert missing.show(1) == "not there: `best` over `theirs`: not run"
    assert script.parts({**claim, "of": ["never validated"]}, {"net": rows}) == []


def test_hardware_is_what_the_records_say(tmp_path: Path):
    made = [{"hardware": name} for name in ("one CPU", "a GPU", "one CPU")]
    (tmp_path / "some.json").write_text(json.dumps([{"made": made[0]}, {"a": {"made": made[1]}, "made": made[2]}]))
    assert files.hardware_of("some.json", {}, tmp_path) == "a GPU; one CPU"
    assert (
        files.hardware_of("some.json", {"hardware": "earlier rows, CPU"}, tmp_path)
        == "a GPU; one CPU; earlier rows, CPU"
    )
    assert files.hardware_of("not there.json", {}, tmp_path) == "-"


def test_hardware_of_runs_whose_results_are_plain_lists_is_found(tmp_path: Path):
    content = {"settings": {}, "rewards": {"sac/0": [0.5], "sac/1": [0.5]}, "made": {"sac/1": {"hardware": "one CPU"}}}
    (tmp_path / "some.json").write_text(json.dumps(content))
    assert files.hardware_of("some.json", {}, tmp_path) == "one CPU"


@pytest.mark.parametrize("name", FILES)
def test_files_say_what_all_their_records_were_made_on(name: str):
    """A file without one record that says so has it in `claims.yaml`."""
    if (files.RESULTS / name).exists():
        assert files.hardware_of(name, FILES[name]) != "-"


# -- plots -------------------------------------------------------------------------------------------------------------


def columns(flops: float, time: float, *accuracies: float) -> dict[str, dict[str, float]]:
    seeds = [str(seed) for seed in range(len(accuracies))]
    return {
        plotting.FLOPS: dict.fromkeys(seeds, flops),
        plotting.TIME: dict.fromkeys(seeds, time),
        plotting.ACCURACY: dict(zip(seeds, accuracies, strict=True)),
    }


@pytest.fixture
def figures() -> dict[str, Any]:
    timeless = {name: values for name, values in columns(50, 60, 80).items() if name != plotting.TIME}
    return {
        "net/4, keep 0.7": {"ours": columns(70, 75, 86, 88)},
        "net/4": {"ours": columns(50, 60, 80, 84), "theirs": timeless, plotting.WHOLE: columns(100, 100, 91, 89)},
        "net/4, keep 0.3": {"ours": columns(30, 45, 70)},
        "no baseline": {"ours": columns(50, 60, 80)},
    }


def test_plots_show_each_budget_and_only_what_was_measured(figures: dict[str, Any]):
    (plot,) = plotting.plots(figures, ["ours", "theirs"])
    assert (plot.network, plot.file, plot.whole) == ("net/4", "accuracy_net-4.svg", 90.0)
    ours = [
        (30, 45, 70, 0.0),
        (50, 60, 82, pytest.approx(8**0.5, abs=1e-6)),
        (70, 75, 87, pytest.approx(2**0.5, abs=1e-6)),
    ]
    assert plot.points == {"ours": ours, "theirs": []}
    assert plot.floor == 82 - 3 * 8  # three times as far below the middle as that is from the whole network


def test_plots_of_other_files_have_their_own_columns_and_enough_budgets():
    budgets = {
        name: {row: {"right after (%)": {"0": 80.0, "1": 84.0}, plotting.FLOPS: {"0": flops, "1": flops}}}
        for name, row, flops in [("net, keep 0.7", "ours", 70.0), ("net", "ours", 50.0), ("once", "ours", 50.0)]
    }
    for name in ("net", "once"):
        budgets[name][plotting.WHOLE] = {"right after (%)": {"0": 90.0}}
    (plot,) = plotting.plots(budgets, ["ours", "theirs"], plotting.PRUNED)
    deviation = pytest.approx(8**0.5, abs=1e-6)
    assert plot.points == {"ours": [(50.0, 82.0, deviation), (70.0, 82.0, deviation)], "theirs": []}
    assert (plot.file, plot.floor) == ("compensation_net.svg", 82 - 3 * 8)


def test_figures_are_the_same_bytes_for_the_same_points(figures: dict[str, Any]):
    pytest.importorskip("matplotlib")
    (plot,) = plotting.plots(figures, ["ours"])
    drawn = plotting.draw(plot)
    assert plotting.draw(plot) == drawn
    assert plot.digest in drawn.decode()
    figures["net/4"]["ours"][plotting.ACCURACY]["0"] += 0.01
    (other,) = plotting.plots(figures, ["ours"])
    assert other.digest not in drawn.decode()


def test_a_figure_of_other_points_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: dict[str, Any]):
    (plot,) = plotting.plots(figures, ["ours"])
    monkeypatch.setattr(script, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(script, "all_plots", lambda: [plot])
    picture, readme = script.of_first_page()
    script.write(tmp_path / script.FOLDER / picture.file, picture.digest.encode())
    monkeypatch.setattr(script.first_page, "README", tmp_path / "README.md")
    script.write(tmp_path / "README.md", readme.replace("**", "").encode())
    monkeypatch.setattr(script, "of_first_page", lambda: (picture, readme))
    script.write(script.PAGE, script.render().encode())
    assert script.outdated() == ["README.md", plot.file]
    script.write(tmp_path / "README.md", readme.encode())
    script.write(tmp_path / script.FOLDER / plot.file, b"of other points")
    assert script.outdated() == [plot.file]
    script.write(tmp_path / script.FOLDER / plot.file, f"<svg>{plot.digest}</svg>".encode())
    assert script.outdated() == []


def test_the_first_page_shows_the_better_of_the_rivals():
    values = {"not pruned": 90.0, "coherent OBS, refit": 80.0, "Torch-Pruning, group norm, statistics": 60.0}
    values["Torch-Pruning, group norm, uniform, statistics"] = 70.0
    after = {"net": {row: {"right after (%)": {"0": value}} for row, value in values.items()}}
    finetuned = {"net": {"coherent OBS, refit, distilled": {"fine-tuned (%)": {"0": 85.0, "1": 87.0}}}}
    lines = script.first_page.table(after, finetuned, {"net": "Net"}).splitlines()
    assert lines[2] == "| Net, right after the prune, without training | 90.0 | **80.0** | 70.0 |"
    assert lines[3] == "| Net, after fine-tuning, all at the same cost | 90.0 | **86.0 ± 1.4** | not run |"


# -- files of results --------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "new folder" / "results.json"
    assert stored.load(path) == {}
    stored.save(path, {"a": [0.5, None]})
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stored.save(path, {"a": 1})
    assert stored.load(path) == {"a": [0.5, None]}


def test_how_a_result_comes_about_names_settings_and_no_places():
    options = argparse.Namespace(root="/some/where", work="/else/where", seeds=3, lr=0.5, levels=(1, 2))
    made = stored.made_with(options, keep=0.25)
    assert made["settings"] == {"lr": 0.5, "levels": [1, 2], "keep": 0.25}
    assert made == json.loads(json.dumps(made))
    assert re.fullmatch(r".+, \d+ threads?", made["hardware"])


def test_a_record_that_was_begun_with_other_settings_is_not_gone_on_with():
    record: dict[str, Any] = {}
    made = {"settings": {"lr": 0.5, "epochs": 2}, "hardware": "one"}
    stored.sign(record, made)
    stored.sign(record, {**made, "hardware": "another"})
    assert record["made"] == made
    with pytest.raises(SystemExit, match=r"other settings \(epochs\)"):
        stored.sign(record, {"settings": {"lr": 0.5, "epochs": 3}})


def test_a_record_that_does_not_say_how_it_came_about_is_not_given_out_for_ours():
    record = {"accuracy": 0.5}
    stored.sign(record, {"settings": {"lr": 0.5}, "hardware": "one"})
    assert record == {"accuracy": 0.5}


def test_the_name_of_a_processor_is_read_from_the_system(tmp_path: Path):
    described = tmp_path / "cpuinfo"
    described.write_text(
        "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Intel(R) Xeon(R) 8480\n\nmodel\t: 9\n"
    )
    assert stored.cpu_model(described) == "Intel Xeon 8480 (family 6, model 143)"
    described.write_text("processor\t: 0\nmodel name\t: Some ARM\n")
    assert stored.cpu_model(described) == "Some ARM"
    assert stored.cpu_model(tmp_path / "not there")


# -- optimizers --------------------------------------------------------------------------------------------------------


def test_the_table_of_optimizers_is_what_its_records_give_and_none_is_wrong():
    records = json.loads((files.RESULTS / "optimizers.json").read_text())["optimizers"]
    optimizers = import_module("optimizers")
    assert (files.RESULTS / "optimizers.md").read_text() == optimizers.table(records)
    outcomes = [record["outcome"] for record in records.values()]
    assert not {"WRONG", "BROKEN"} & set(outcomes)
    assert sum(outcome != "not usable alone" for outcome in outcomes) >= 40


def test_a_wrong_step_of_an_optimizer_is_called_wrong():
    optimizers = import_module("optimizers")
    outcomes = [optimizers.outcome(*differences) for differences in [(1e-9, None), (0.5, 1e-9), (0.5, 1e-3), (1, None)]]
    assert outcomes == ["sliced, steps as the masked twin", "sliced, steps as the small twin", "WRONG", "WRONG"]
    tensors = {"weight": torch.tensor([1.0, 2.0])}
    stepped, other = {"weight": torch.tensor([1.0, 4.0])}, {"weight": torch.tensor([1.5, 4.0])}
    assert optimizers.difference(tensors, stepped, other) == 0.25
    assert "1 wrong" in optimizers.table({"some": {"outcome": "WRONG", "masked twin": 0.5, "small twin": None}})


# -- free channels -----------------------------------------------------------------------------------------------------


def test_the_page_of_free_channels_is_what_its_records_give_and_none_is_broken():
    records = json.loads((files.RESULTS / "free_channels.json").read_text())
    before = json.loads((files.RESULTS / "free_channels_before.json").read_text())
    free_channels = import_module("free_channels")
    assert (files.RESULTS / "free_channels.md").read_text() == free_channels.page(records, before)
    assert [name for name, record in records.items() if record["wrong"]] == []


def test_the_page_of_projects_is_what_its_records_give(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(files.RESULTS.parent / "projects"))
    records = json.loads((files.RESULTS / "projects.json").read_text())
    page = (files.RESULTS / "projects.md").read_text()
    assert page == import_module("run").page(records)
    runs = [record for record in records.values() if record["fit"]["outcome"] == "runs"]
    for record in runs:
        assert record["try"]["outcome"] == "runs"
        assert record["fit"]["achieved"] <= record["fit"]["asked"]
        assert record["fit"]["untrained"] == []
        assert set(record["load"]["loaded"].values()) == {"pruned"}
        assert record["resume"]["resumed"] == "yes"
    assert all(record["fit"]["outcome"].startswith(("runs", "refused: ")) for record in records.values())


def test_shares_of_channels_leave_outputs_out():
    free_channels = import_module("free_channels")
    layers = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 3))
    layers.spare = torch.nn.Linear(4, 4)
    layers.forward = lambda x: layers[2](layers[1](layers[0](x)))
    found = free_channels.shares(free_channels.lp.trace(layers, torch.zeros(1, 2)))
    assert (found["exact"], found["inexact"], found["unprunable"], found["outputs"]) == (0, 1, 0, 3)


def test_outputs_may_be_of_fewer_boxes_but_of_no_other_shapes():
    of_other_shapes = import_module("free_channels").of_other_shapes
    scores, masks = torch.zeros(5), torch.zeros(5, 1, 8, 8)
    assert not of_other_shapes([scores, masks], [scores[:3], masks[:3]])
    assert of_other_shapes([scores, masks], [scores[:3], masks[:2]])
    assert of_other_shapes([scores, masks], [scores[:3], masks[:3, :, :4]])
    assert of_other_shapes([masks], [masks[:3]])


class Cancelling(torch.nn.Module):
    """Adds the difference of large numbers to its outputs, which is nothing but for rounding."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.inner, self.outer = torch.nn.Linear(4, 16), torch.nn.Linear(16, 3)
        self.same = copy.deepcopy(self.outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        return self.outer(x.relu()) + self.factor * (self.outer(x) - self.same(x))


@pytest.mark.parametrize(
    ("factor", "apart", "wrong"),
    [(1.0, 1e-10, False), (1.0, 5e-9, True), (1e8, 5e-9, False), (1e8, 1e-3, True), (1e14, 1e-3, True)],
)
def test_what_one_rounding_does_is_told_from_what_is_falsely_mask_exact(factor, apart, wrong, monkeypatch):
    free_channels = import_module("free_channels")
    torch.manual_seed(0)
    model, inputs = Cancelling(factor).double(), (torch.randn(2, 4, dtype=torch.float64),)
    graph = free_channels.lp.trace(model, inputs)
    monkeypatch.setattr(free_channels, "judge", lambda *_: argparse.Namespace(apart=apart))
    found = free_channels.compared(model, inputs, graph, free_channels.LIMIT)
    assert (found["apart"], bool(found["wrong"])) == (apart, wrong)


# -- engine ------------------------------------------------------------------------------------------------------------


def test_the_page_of_the_engine_is_what_its_records_give():
    engine = import_module("engine_vs_torch_pruning")
    records = json.loads((files.RESULTS / "engine.json").read_text())
    assert (files.RESULTS / "engine.md").read_text() == engine.page(records)


def test_the_engine_is_compared_round_by_round_where_both_prune():
    engine = import_module("engine_vs_torch_pruning")
    rounds = [{"trace": 1.0, "score": 0.5, "plan": 0.25, "prune": 0.25}, dict.fromkeys(engine.PARTS, 1.0)]
    both = {"ours": rounds, "theirs": [4.0, 4.0], "fails": ""}
    alone = {"ours": rounds, "theirs": [], "fails": "KeyError: 'x'"}
    assert (engine.ratio_of(both), engine.ratio_of(alone)) == (0.75, None)
    *_, one, other, _, said = engine.page({"a": both, "b": alone}).splitlines()
    assert one == "| a | 3.000 | 1.000 | 0.750 | 0.625 | 0.625 | 4.000 | 0.75 |"
    assert other == "| b | 3.000 | 1.000 | 0.750 | 0.625 | 0.625 | KeyError: 'x' | - |"
    assert said.startswith("Worst 0.75 (limit 0.8), geometric mean 0.75 (limit 0.2), of the 1 networks")


# -- links -------------------------------------------------------------------------------------------------------------


def test_anchors_of_the_page_are_its_own():
    anchors = re.findall(r"\{ #(\w+) \}", (ROOT / "docs" / "results.md").read_text())
    assert len(anchors) == len(set(anchors))
    assert set(script.METHODS) < set(anchors)


def test_every_method_with_claims_has_a_page_that_links_them():
    linked = {anchor for page in METHOD_PAGES for anchor in anchors_of(page)}
    assert {claim["method"] for claim in CLAIMS} <= linked | {"best"}  # which is of all methods


def anchors_of(page: Path) -> list[str]:
    return re.findall(r"\]\(\.\./results\.md#(\w+)\)", page.read_text())


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)
def test_every_method_links_its_rows(page: Path):
    anchors = anchors_of(page)
    assert anchors
    assert set(anchors) <= set(re.findall(r"\{ #(\w+) \}", (ROOT / "docs" / "results.md").read_text()))
    if page.stem in script.METHODS:
        assert page.stem in anchors
