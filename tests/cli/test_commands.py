"""The subcommands that come after training, as a person types them."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import battery
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lightning_prune as lp
from lightning_prune.cli.benchmark import _percentile, original_of, times
from lightning_prune.cli.entry import main
from lightning_prune.cli.loading import load
from lightning_prune.pruning_plan import plan_in_force

SHAPE = ["--input_shape", "1", "1", "8", "8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that has pruned, with its last checkpoint."""
    root = tmp_path_factory.mktemp("run")
    logger = CSVLogger(root, name="", version="")
    battery.train(root, battery.make_callback("magnitude"), logger=logger)
    max((root / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns).rename(root / "last.ckpt")
    return root


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command that must end with one sentence, and return it."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert isinstance(left.value.code, str)
    assert "\n" not in left.value.code
    assert capsys.readouterr().out == ""
    return left.value.code


def test_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(run), str(tmp_path / "page.html")])
    assert capsys.readouterr().out == f"Written to {tmp_path / 'page.html'}\n"
    assert "ResidualClassifier pruned by" in (tmp_path / "page.html").read_text()
    main(["report", str(run)])
    assert capsys.readouterr().out == f"Written to {run / 'report.html'}\n"
    assert "There is no run at" in fails(capsys, "report", tmp_path / "nowhere")


def test_classes_of_the_current_folder_are_found(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_network.py").write_text("from battery import ResidualClassifier as Network\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    monkeypatch.chdir(tmp_path)
    main(["export", str(run / "last.ckpt"), "model.pt", "--model", "own_network.Network", *SHAPE])
    assert "Written to model.pt" in capsys.readouterr().out


def test_export_finds_the_class_that_the_callback_has_noted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(run / "last.ckpt"), str(tmp_path / "model.pt2"), *SHAPE])
    assert "batches of 1, 2, 5 give the model's outputs, at most" in capsys.readouterr().out
    images = torch.randn(3, 1, 8, 8)
    expected = lp.load_pruned(battery.ResidualClassifier, run / "last.ckpt")(images)
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(images), expected)


def test_export_says_what_is_missing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, checkpoint = tmp_path / "model.pt2", run / "last.ckpt"
    assert "There is no checkpoint at 'nothing.ckpt'." in fails(capsys, "export", "nothing.ckpt", out)
    assert "cannot be read as a checkpoint" in fails(capsys, "export", run / "pruning.json", out)
    assert "has no example_input_array; say what its forward takes" in fails(capsys, "export", checkpoint, out)
    assert "'no.such.Net' cannot be imported" in fails(capsys, "export", checkpoint, out, "--model", "no.such.Net")
    assert "'os.system' is no LightningModule" in fails(capsys, "export", checkpoint, out, "--model", "os.system")
    assert "The format of" in fails(capsys, "export", checkpoint, tmp_path / "model.tflite", *SHAPE)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.ckpt")
    assert "no checkpoint of a Lightning Trainer" in fails(capsys, "export", tmp_path / "weights.ckpt", out)
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    assert "does not say of which class it is: give --model" in fails(capsys, "export", tmp_path / "bare.ckpt", out)
    assert not out.exists()


def test_classes_are_found_by_what_the_command_line_noted_first(run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    checkpoint["callbacks"] = {}
    checkpoint["hyper_parameters"]["_class_path"] = "battery.ResidualClassifier"
    torch.save(checkpoint, tmp_path / "cli.ckpt")
    loaded = load(tmp_path / "cli.ckpt", input_shape=[1, 1, 8, 8])
    assert isinstance(loaded.model, battery.ResidualClassifier)
    assert loaded.histories == []
    del checkpoint["hyper_parameters"]["_class_path"]
    torch.save(checkpoint, tmp_path / "plain.ckpt")
    assert plan_in_force(load(tmp_path / "plain.ckpt", "battery.ResidualClassifier", [1, 1, 8, 8]).model) is not None


def test_benchmark_tells_what_ran_where(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    command = ["benchmark", str(run / "last.ckpt"), "--batch_sizes", "1", "4", "--rounds", "2", *SHAPE]
    main([*command, "--threads", str(threads)])
    head, columns, _, *rows = capsys.readouterr().out.splitlines()
    *_, scenarios, _, single_stream, offline = rows
    rows = rows[: rows.index("")]
    assert scenarios.split()[:4] == ["batch", "original", "p50", "(ms)"]
    for row, name, size in ((single_stream, "single-stream", 1), (offline, "offline", 4)):
        told, batch, *numbers = row.split()
        assert (told, int(batch)) == (name, size)
        assert float(numbers[0]) <= float(numbers[1])
        assert float(numbers[2]) <= float(numbers[3])
    assert head.startswith(f"ResidualClassifier on CPU, {threads} thread")
    assert f"torch {torch.__version__}; median (quartiles) of 2 turns" in head
    assert [word in columns for word in ("original (ms)", "pruned (ms)", "speed-up", "pruned (1/s)")] == [True] * 4
    assert [row.split()[0] for row in rows] == ["1", "4"]
    for row in rows:
        size, before, _, after, _, ratio, spread, *rates = row.split()
        assert (ratio, spread) == ("no", "difference") or re.fullmatch(
            r"[\d.]+x \([\d.]+-[\d.]+\)", f"{ratio} {spread}"
        )
        for time, rate in zip((before, after), rates, strict=True):  # as printed, to two digits of a millisecond
            assert float(rate.replace(",", "")) * (float(time) - 0.006) / 1000 < int(size)
            assert int(size) < (float(rate.replace(",", "")) + 1) * (float(time) + 0.006) / 1000


def test_percentiles_are_those_of_the_sorted_values() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 10.0, 9.0, 8.0, 7.0, 6.0]
    assert [_percentile(values, percent) for percent in (50, 90, 91, 100)] == [5.0, 9.0, 10.0, 10.0]
    assert _percentile([1.0], 90) == 1.0


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_benchmark_runs_in_other_runtimes(runtime: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(runtime)
    main(["benchmark", str(run / "last.ckpt"), "--runtime", runtime, "--rounds", "1", "--batch_sizes", "2", *SHAPE])
    told = capsys.readouterr().out
    assert f", {runtime} {version(runtime)}; median" in told
    assert re.search(r"^ *offline +2 ", told, re.MULTILINE)


def test_benchmark_says_what_is_missing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run / "last.ckpt"
    assert "There is no device 'nonsense' here" in fails(
        capsys, "benchmark", checkpoint, *SHAPE, "--device", "nonsense"
    )
    whole = {"state_dict": battery.ResidualClassifier().state_dict(), "hyper_parameters": {}}
    torch.save(whole, tmp_path / "whole.ckpt")
    told = fails(capsys, "benchmark", tmp_path / "whole.ckpt", *SHAPE, "--model", "battery.ResidualClassifier")
    assert "was never pruned" in told
    with pytest.raises(SystemExit) as left:
        main(["benchmark", str(checkpoint), "--rounds", "0"])
    assert left.value.code == 2


def test_the_original_has_the_original_shape_and_no_zeros(run: Path) -> None:
    pruned = load(run / "last.ckpt", input_shape=[1, 1, 8, 8]).model
    original = original_of(pruned)
    fresh = battery.ResidualClassifier()
    assert {n: t.shape for n, t in original.state_dict().items()} == {n: t.shape for n, t in fresh.state_dict().items()}
    assert all(bool(p.any()) for p in original.parameters())
    assert plan_in_force(pruned) is not None
    assert plan_in_force(original) is None


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    class Named(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ran.append(self.name)
            assert not self.training
            return super().forward(x)

    models = [Named(2, 2), Named(2, 2)]
    models[0].name, models[1].name = "a", "b"
    taken = times(models, torch.zeros(1, 2), rounds=3)
    assert [len(each) for each in taken] == [3, 3]
    turns = [name for name, earlier in zip(ran, ["", *ran], strict=False) if name != earlier]
    assert turns == ["a", "b"] * 3
    assert min(ran.count("a"), ran.count("b")) >= 3 * 4  # a run to warm up and three that count


def test_compare_shows_checkpoints_or_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = next(iter((run / "checkpoints").glob("epoch=0*")))
    main(["compare", str(first), str(run / "last.ckpt"), *SHAPE])
    told = capsys.readouterr().out
    small = lp.load_pruned(battery.ResidualClassifier, run / "last.ckpt")
    for model in (battery.ResidualClassifier(), small):
        assert f"{sum(p.numel() for p in model.parameters()):,}" in told
    assert re.search(r"latency \(ms\) +[\d.]+ \([\d.]+-[\d.]+\) +[\d.]+ \([\d.]+-[\d.]+\)\n", told)
    assert "val/accuracy" in told
    main(["compare", str(run), str(run), str(run), "--out", str(tmp_path / "page.html")])
    *rows, _, note = capsys.readouterr().out.splitlines()[4:]
    assert f"Written to {tmp_path / 'page.html'}." in note
    assert (tmp_path / "page.html").is_file()
    assert [row.count("(100.0%)") for row in rows[2:4]] == [2, 2]  # parameters and FLOPs beside the first run
    assert rows[-1].count("(+0.0000)") == 2  # accuracy
    assert "give two runs, or two checkpoints" in fails(capsys, "compare", run, run / "last.ckpt")
    assert "There is no checkpoint at" in fails(capsys, "compare", tmp_path / "a", tmp_path / "b")


def test_the_program_itself_prints_plain_lines(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_prune", "report", str(run), str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"Written to {tmp_path / 'page.html'}\n")
    assert "\x1b" not in done.stdout + done.stderr
    done = subprocess.run([*command[:-2], "nowhere"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "There is no run at 'nowhere': give the folder with its logs."


class Wrapper(battery.ResidualClassifier):
    """Takes a layer, which the command line notes by its class."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem


def test_classes_that_the_command_line_noted_as_arguments_are_made_again(tmp_path: Path) -> None:
    stem = ["--model.stem=torch.nn.Conv2d", "--model.stem.in_channels=1", "--model.stem.out_channels=12"]
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    callback = battery.make_callback("magnitude", start_epoch=1, steps=1)
    cli = LightningCLI(
        Wrapper, run=False, save_config_callback=None, args=[*stem, "--model.stem.kernel_size=1"],
        trainer_defaults={**settings, "default_root_dir": str(tmp_path), "callbacks": [callback]},
    )  # fmt: skip
    cli.trainer.fit(cli.model, *battery.loaders())
    loaded = load(Path(cli.trainer.checkpoint_callback.best_model_path), input_shape=[1, 1, 8, 8])
    assert battery.differences(cli.model, loaded.model) == []
    assert plan_in_force(loaded.model) == plan_in_force(cli.model) is not None


# -- what a file may have imported -------------------------------------------------------------------------------------


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a package on the path that leaves a file when it runs, and return where that would be."""
    trace = tmp_path / "it_ran"
    package = tmp_path / "evil_package"
    package.mkdir()
    for name in ("__init__", "inner"):
        (package / f"{name}.py").write_text(
            f"from pathlib import Path\nPath({str(trace)!r}).touch()\n"
            "from battery import ResidualClassifier as Net\nfrom torch.nn import Conv2d as Layer\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield trace
    for name in ("evil_package", "evil_package.inner"):
        sys.modules.pop(name, None)


def with_changes(run: Path, path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


def state_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return next(state for state in checkpoint["callbacks"].values() if "history" in state)


NAMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "by the command line": lambda c: c["hyper_parameters"].update(_class_path="evil_package.Net"),
    "by a callback": lambda c: state_of(c)["history"].update(model="evil_package.inner.Net"),
    "as an entry point of our own": lambda c: c["hyper_parameters"].update(_class_path="lightning_prune.__main__.main"),
}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("command", ["export", "benchmark", "compare"])
def test_no_class_is_imported_on_the_word_of_a_file(
    kind: str, command: str, run: Path, evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_changes(run, tmp_path / "a.ckpt", NAMED[kind])
    others = {"export": ["model.pt"], "benchmark": [], "compare": [path]}[command]
    told = fails(capsys, command, path, *others, *SHAPE)
    assert "which is not imported on the word of a file; if you trust it, say so with --model" in told
    assert not evil.exists()


def test_a_class_that_is_named_by_the_person_is_imported(
    run: Path, evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(run / "last.ckpt"), "model.pt", "--model", "evil_package.inner.Net", *SHAPE])
    assert evil.exists()


@pytest.mark.parametrize("value", [7, ["evil_package.Net"], None, {"a": 1}])
def test_a_class_path_that_is_no_text_is_none(
    value: Any, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_changes(run, tmp_path / "a.ckpt", lambda c: c["hyper_parameters"].update(_class_path=value))
    assert "does not say of which class it is: give --model" in fails(capsys, "export", path, "model.pt", *SHAPE)


LAYERS: dict[str, Any] = {
    "with arguments": {"class_path": "evil_package.Layer", "init_args": {"in_channels": 1, "out_channels": 12}},
    "alone": "evil_package.inner.Layer",
    "deep": {
        "class_path": "torch.nn.TransformerEncoder",
        "init_args": {"encoder_layer": {"class_path": "evil_package.Layer"}, "num_layers": 1},
    },
}


@pytest.mark.parametrize("kind", LAYERS)
def test_no_layer_is_imported_on_the_word_of_a_file(kind: str, run: Path, evil: Path, tmp_path: Path) -> None:
    settings = {"stem": LAYERS[kind], "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    path = with_changes(run, tmp_path / "a.ckpt", lambda c: c.update(hyper_parameters=settings))
    with pytest.raises(ValueError, match=r"name the module 'evil_package', .* \(--import evil_package on the command"):
        lp.load_pruned(Wrapper, path)
    assert not evil.exists()


def test_no_network_of_the_classifier_is_imported_on_the_word_of_a_file(
    run: Path, evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"network": "evil_package.Net", "num_classes": 4, "input_shape": [1, 8, 8]}

    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint.update(hyper_parameters=settings, callbacks={})

    path = with_changes(run, tmp_path / "a.ckpt", change)
    told = fails(capsys, "export", path, "model.pt")
    assert "name the module 'evil_package'" in told
    assert not evil.exists()
    told = fails(capsys, "export", path, "model.pt", "--import", "evil_package")  # trusted, but of another architecture
    assert "architecture" in told
    assert evil.exists()
