"""The history of a run: what is in it, where it is written, and that it survives a resume."""

import errno
import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from damage import changed, places, refusal
from fvcore.nn import FlopCountAnalysis
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_prune import files
from lightning_prune.callbacks import TaylorRankCallback
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.reporting.history import FORMAT_VERSION, Compensation, History, Layer, Prune, read_histories
from lightning_prune.reporting.loggers import log_history, run_folder
from lightning_prune.reporting.measurement import Measurement
from lightning_prune.reporting.report import render
from lightning_prune.reporting.speed import Speed

TIMES = ("latency_ms", "latency_quartiles", "ms", "quartiles", "speed")


def flops(module: torch.nn.Module) -> int:
    """Count with fvcore."""
    counted = FlopCountAnalysis(module.eval(), torch.zeros(1, 1, 8, 8))
    return int(counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())


def without_times(value: Any) -> Any:
    """Return nested values without what a clock has measured."""
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in TIMES}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def test_the_file_tells_what_happened(tmp_path: Path) -> None:
    module, trainer = battery.train(tmp_path, battery.make_callback("magnitude"), logger=CSVLogger(tmp_path))
    (history,) = read_histories(trainer.log_dir)
    plan = plan_in_force(module)
    assert history.model == "battery.ResidualClassifier"
    assert (history.callback, history.settings["keep"], history.settings["round_to"]) == ("PruningCallback", 0.5, 2)
    assert history.groups == {"stem": 12, "first": 24}
    assert history.widths == plan.widths
    assert [(prune.step, prune.epoch) for prune in history.prunes] == [(1, 1), (2, 2), (3, 3)]
    assert [prune.budget["asked"] for prune in history.prunes] == pytest.approx([5 / 6, 4 / 6, 0.5])
    assert all(prune.budget["achieved"] <= prune.budget["asked"] for prune in history.prunes)
    assert (history.before.flops, history.after.flops) == (flops(battery.ResidualClassifier()), flops(module))
    assert history.before.params == sum(p.numel() for p in battery.ResidualClassifier().parameters())
    assert history.after.params == history.prunes[-1].after.params == sum(p.numel() for p in module.parameters())
    assert history.unprunable == {"head": (4, "head: is an output of the network")}


def test_layers_add_up_and_are_counted_right(tmp_path: Path) -> None:
    module, trainer = battery.train(tmp_path, battery.make_callback("magnitude"), logger=CSVLogger(tmp_path))
    (history,) = read_histories(trainer.log_dir)
    for layers, measured in ((history.layers_before, history.before), (history.layers_after, history.after)):
        assert sum(layer.flops for layer in layers) == measured.flops
        assert sum(layer.params for layer in layers) == measured.params
        assert [layer.name for layer in layers][:3] == ["stem", "first", "norm"]
        assert all(0 < layer.time.low <= layer.ms <= layer.time.high for layer in layers if layer.flops)
    # 8 x 8 positions, 3 x 3 weights, 12 inputs, 24 outputs.
    assert {layer.name: layer.flops for layer in history.layers_before}["first"] == 64 * 9 * 12 * 24
    width = module.first.out_channels * module.first.in_channels
    assert {layer.name: layer.flops for layer in history.layers_after}["first"] == 64 * 9 * width


def test_every_validation_is_in_it_with_what_was_kept_then(tmp_path: Path) -> None:
    callback = battery.make_callback("magnitude")
    _, trainer = battery.train(tmp_path, callback, logger=CSVLogger(tmp_path), num_sanity_val_steps=2)
    history = callback.history
    assert [each["epoch"] for each in history.epochs] == [1, 2, 3, 4, 5]
    whole = history.before.flops
    left = [whole, *(prune.after.flops for prune in history.prunes)]
    assert [each["keep_flops"] for each in history.epochs] == [flops / whole for flops in [*left, left[-1]]]
    assert history.metrics == ["val/accuracy"]
    assert history.epochs[-1]["val/accuracy"] == float(trainer.callback_metrics["val/accuracy"])
    trainer.validate(trainer.lightning_module, battery.loaders()[1], verbose=False)
    assert len(history.epochs) == 5  # a validation after training is none of the schedule


def test_of_several_validations_in_an_epoch_the_last_counts(tmp_path: Path) -> None:
    callback = battery.make_callback("magnitude")
    _, trainer = battery.train(tmp_path, callback, val_check_interval=0.5)
    assert [each["epoch"] for each in callback.history.epochs] == [1, 2, 3, 4, 5]
    assert callback.history.last.metrics == {"val/accuracy": float(trainer.callback_metrics["val/accuracy"])}


@pytest.mark.parametrize("epoch", [0, 2])  # before the first prune, and after the second
def test_a_resumed_run_goes_on_with_the_history_of_its_checkpoint(epoch: int, tmp_path: Path) -> None:
    unbroken, stopped = battery.make_callback("magnitude"), battery.make_callback("magnitude")
    battery.train(tmp_path / "a", unbroken, logger=CSVLogger(tmp_path / "a"))
    battery.train(tmp_path / "b", stopped, logger=CSVLogger(tmp_path / "b"))
    checkpoint = next((tmp_path / "b" / "checkpoints").glob(f"epoch={epoch}-*"))
    resumed = battery.make_callback("magnitude")
    _, trainer = battery.train(tmp_path / "c", resumed, logger=CSVLogger(tmp_path / "c"), ckpt_path=checkpoint)
    (written,) = read_histories(trainer.log_dir)
    assert without_times(written.to_json()) == without_times(unbroken.history.to_json())
    # What was measured before the stop is kept, but for the time before, which is taken at the end beside that after.
    assert written.before.metrics == stopped.history.before.metrics
    assert written.prunes[:epoch] == stopped.history.prunes[:epoch]
    assert written.before.latency == written.speed.spread_before != stopped.history.before.latency
    assert written.after.latency == written.speed.spread_after


def test_of_two_ranks_the_first_writes(tmp_path: Path) -> None:
    callback, logger = battery.make_callback("magnitude"), CSVLogger(tmp_path, version=0)
    module, _ = battery.train(tmp_path, callback, logger=logger, strategy="ddp_fork", devices=2)
    assert [path.name for path in tmp_path.rglob("*pruning*")] == ["pruning.json"]
    (history,) = read_histories(logger.log_dir)
    assert history.widths == plan_in_force(module).widths
    assert [prune.step for prune in history.prunes] == [1, 2, 3]
    assert [each["epoch"] for each in history.epochs] == [1, 2, 3, 4, 5]


def test_a_second_fit_of_another_module_starts_anew(tmp_path: Path) -> None:
    callback = battery.make_callback("magnitude")
    battery.train(tmp_path / "a", callback)
    battery.train(tmp_path / "b", callback)
    assert [prune.step for prune in callback.history.prunes] == [1, 2, 3]
    assert len(callback.history.epochs) == battery.EPOCHS


def test_nothing_is_written_without_a_logger(tmp_path: Path) -> None:
    battery.train(tmp_path, battery.make_callback("magnitude"))
    assert not list(tmp_path.rglob("pruning*"))


def test_the_history_is_in_checkpoints_as_plain_values(tmp_path: Path) -> None:
    battery.train(tmp_path, TaylorRankCallback(keep=0.5, round_to=2, example_inputs=[1, 1, 8, 8]))
    path = max((tmp_path / "checkpoints").iterdir())
    (state,) = (s for s in torch.load(path, weights_only=True)["callbacks"].values() if "history" in s)
    assert state["history"]["settings"]["example_inputs"] == [1, 1, 8, 8]
    assert json.loads(json.dumps(state["history"]))["callback"] == "TaylorRankCallback"
    assert History.from_json(state["history"]).to_json() == state["history"]


def test_settings_that_are_no_plain_values_are_named(tmp_path: Path) -> None:
    callback = TaylorRankCallback(keep=0.5, round_to=2, example_inputs=torch.zeros(1, 1, 8, 8))
    battery.train(tmp_path, callback)
    assert callback.history.settings["example_inputs"] == "Tensor of shape (1, 1, 8, 8)"


class FolderLogger(Logger):
    """A logger with a folder for all of its runs."""

    def __init__(self, folder: str | None) -> None:
        super().__init__()
        self.folder = folder

    name, version, save_dir = "project", 3, property(lambda self: self.folder)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *arguments: Any, **named: Any) -> None:
        pass


def test_the_folder_is_that_of_the_run(tmp_path: Path) -> None:
    def trainer(logger: Any) -> L.Trainer:
        return L.Trainer(logger=logger, default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)

    assert run_folder(trainer(CSVLogger(tmp_path, "runs", version=7))) == tmp_path / "runs" / "version_7"
    assert run_folder(trainer(FolderLogger(str(tmp_path)))) == tmp_path / "project" / "version_3"
    assert run_folder(trainer(FolderLogger(None))) is None
    assert run_folder(trainer([FolderLogger(None), CSVLogger(tmp_path, "x", version=0)])) == tmp_path / "x/version_0"
    assert run_folder(trainer(False)) is None
    # What is not on this machine is no folder.
    assert run_folder(trainer(CSVLogger("memory://bucket/logs"))) is None
    assert run_folder(trainer([FolderLogger("s3://bucket"), CSVLogger(tmp_path, "x", version=0)])) == (
        tmp_path / "x/version_0"
    )


def some_history(module: str = "") -> History:
    before = Measurement(100, 1000, 2.0)
    return History("m.M", "C", {}, module, {"a": 8}, {}, before, [])


def test_parts_of_a_model_have_files_of_their_own(tmp_path: Path) -> None:
    trainer = L.Trainer(logger=CSVLogger(tmp_path, version=0), accelerator="cpu", enable_progress_bar=False)
    for module in ("backbone", "head"):
        log_history(trainer, some_history(module))
    folder = Path(trainer.loggers[0].log_dir)
    assert sorted(path.name for path in folder.iterdir()) == ["pruning.backbone.json", "pruning.head.json"]
    assert [history.module for history in read_histories(folder)] == ["backbone", "head"]


def test_what_an_earlier_version_has_written_is_read(tmp_path: Path) -> None:
    measured = {"params": 100, "flops": 1000, "latency_ms": 2.0, "metrics": {}}
    prune = {"step": 1, "epoch": 2, "budget": {"asked": 0.5}, "widths": {"a": 4}, "left": measured}
    content = {
        "version": 1, "model": "m.M", "callback": "C", "settings": {}, "module": "", "groups": {"a": 8},
        "held": {"head": [4, "is an output"]}, "before": measured, "layers_before": [], "prunes": [prune],
        "layers_after": [], "epochs": [], "after": None,
    }  # fmt: skip
    (tmp_path / "pruning.json").write_text(json.dumps(content))
    (history,) = read_histories(tmp_path)
    assert history.unprunable == {"head": (4, "is an output")}
    assert history.last == history.prunes[0].after == Measurement(100, 1000, 2.0)
    written = history.to_json()
    assert written["unprunable"] == {"head": (4, "is an output")}
    assert "held" not in written
    assert History.from_json(written) == history


def test_flops_are_those_of_fvcore_beside_the_cost_models(tmp_path: Path) -> None:
    callback = battery.make_callback("magnitude")
    battery.train(tmp_path, callback)
    history = callback.history
    for measured in (history.before, *(prune.after for prune in history.prunes), history.after):
        assert measured.flops == measured.cost_model_flops
        assert measured.fvcore_failure == ""
        assert measured.flops_remark == ""


def test_wrong_runs_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no run at .*nowhere"):
        read_histories(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no pruning.json, so no pruning callback has logged there\.$"):
        read_histories(tmp_path)
    run = tmp_path / "version_0"
    run.mkdir()
    path = run / "pruning.json"
    path.write_text('{"version": 1')
    with pytest.raises(FileNotFoundError, match=r"there are runs in .*version_0"):
        read_histories(tmp_path)
    with pytest.raises(ValueError, match=r"pruning.json' is damaged"):
        read_histories(run)
    path.write_text(json.dumps({**some_history().to_json(), "version": FORMAT_VERSION + 1}))
    with pytest.raises(ValueError, match="install a newer lightning-prune"):
        read_histories(run)
    path.write_text(json.dumps({"version": FORMAT_VERSION}))
    with pytest.raises(ValueError, match=r"pruning.json' is damaged.*: it has no entry 'model'"):
        read_histories(run)


DAMAGED: dict[str, bytes] = {
    "empty": b"", "truncated": b'{"version": 2, "model": "m', "binary": bytes(range(256)), "zeros": bytes(100),
    "utf-16": '{"version": 2}'.encode("utf-16"), "a word": b"hello", "a list": b"[1, 2]", "a number": b"7",
    "null": b"null", "no history": b"{}", "a text": b'"x"', "deep": b"[" * 100_000, "digits": b"1" * 10_000,
    "version": b'{"version": "2"}', "truth": b'{"version": true}',
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_whatever_is_no_history_is_called_damaged(kind: str, tmp_path: Path) -> None:
    (tmp_path / "pruning.json").write_bytes(DAMAGED[kind])
    with pytest.raises(ValueError, match=r"pruning.json' is damaged") as raised:
        read_histories(tmp_path)
    assert "\n" not in str(raised.value)


def whole() -> dict[str, Any]:
    measured = Measurement(100, 1000, 2.0, {"val/acc": 0.5}, 1000)
    layers = [Layer("a", 800.0, 80.0, 1.0)]
    prune = Prune(
        1,
        1,
        {"metric": "flops", "asked": 0.5},
        {"a": 4},
        measured,
        Compensation("fold", 8, {"b": (0.5, 0.25)}, {"c": "d"}),
    )
    epochs = [{"epoch": 1, "keep_flops": 0.5, "val/acc": 0.5}]
    speed = Speed([2.0, 2.0], [1.0, 1.0], "CPU, 1 thread")
    history = History(
        "m.M", "C", {"keep": 0.5}, "", {"a": 8}, {"b": (4, "is an output")}, measured, layers, [prune], layers, epochs,
        measured, speed=speed,
    )  # fmt: skip
    return json.loads(json.dumps(history.to_json()))


def test_whatever_is_changed_in_a_history_it_is_drawn_or_called_damaged(tmp_path: Path) -> None:
    odd = (None, True, -1, 0, 0.5, 10**30, 10**300, 1e308, math.nan, -math.inf, "x", "", [], {}, [[]], [None], {"": {}})
    right, drawn, path = whole(), 0, tmp_path / "pruning.json"
    for place in places(right):
        for value in odd if place else ():
            hostile = changed(right, place, lambda owner, key, value=value: owner.__setitem__(key, value))
            path.write_text(json.dumps(hostile))
            told = refusal(lambda: render(read_histories(tmp_path), "runs/1"))
            assert told is None or re.fullmatch(r"('.*pruning.json' is damaged|The history has format version).*", told)
            drawn += told is None
        path.write_text(json.dumps(changed(right, place, lambda owner, key: owner.pop(key)) if place else []))
        refusal(lambda: render(read_histories(tmp_path), "runs/1"))
    assert drawn > 100


# -- where nothing can be written --------------------------------------------------------------------------------------


def _a_file_in_place_of_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")


def _a_folder_in_place_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "pruning.json" / "in_the_way").mkdir(parents=True)


def _a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def fails(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if self.name.startswith(".pruning"):
            write(self, text[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", fails)


def _a_folder_that_is_not_ours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkstemp", refuses)


@pytest.mark.parametrize(
    "spoil",
    [_a_file_in_place_of_the_folder, _a_folder_in_place_of_the_file, _a_full_disk, _a_folder_that_is_not_ours],
)
def test_a_history_that_cannot_be_written_is_warned_of_once_and_training_goes_on(
    spoil: Callable[[Path, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs, expected = (
        Elsewhere(tmp_path / "logs" / "run"),
        battery.train(tmp_path / "a", battery.make_callback("magnitude")),
    )
    spoil(logs.log_dir, monkeypatch)
    callback = battery.make_callback("magnitude")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module, _ = battery.train(tmp_path / "b", callback, logger=logs)
    told = [str(one.message) for one in caught if "history of this run" in str(one.message)]
    assert len(told) == 1
    assert re.match(r"The history of this run could not be written to '.*run' \(.*\); training goes on, and", told[0])
    assert battery.differences(module, expected[0]) == []
    assert [prune.step for prune in callback.history.prunes] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "logs").rglob(".pruning*")] == []  # nothing half-written


class Elsewhere(Logger):
    """A logger that says where it writes, and writes nothing."""

    name, version, log_dir = "project", 3, None

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.log_dir = folder

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *arguments: Any, **named: Any) -> None:
        pass
