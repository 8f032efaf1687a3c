"""What the loggers get: numbers in all of them, pictures and text in TensorBoard."""

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import battery
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_prune.reporting import loggers
from lightning_prune.reporting.history import History


def logged(folder: str) -> EventAccumulator:
    events = EventAccumulator(folder, size_guidance={"images": 0, "scalars": 0, "histograms": 0, "tensors": 0})
    return events.Reload()


def test_tensorboard_gets_numbers_histograms_figures_and_the_summary(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    callback = battery.make_callback("magnitude")
    _, trainer = battery.train(tmp_path, callback, logger=TensorBoardLogger(tmp_path), log_every_n_steps=1)
    events = logged(trainer.log_dir)
    assert {"prune/scores/stem", "prune/scores/first"} <= set(events.Tags()["histograms"])
    prunes = [battery.BATCHES * epoch for epoch in (1, 2, 3)]
    for group in ("stem", "first"):
        widths = [prune.widths[group] for prune in callback.history.prunes]
        assert [(event.step, event.value) for event in events.Scalars(f"prune/channels/{group}")] == list(
            zip(prunes, widths, strict=True)
        )
    for figure in ("prune/widths", "prune/metric_against_flops"):
        images = events.Images(figure)
        assert [image.step for image in images] == [*prunes, battery.BATCHES * battery.EPOCHS]
        pixels = np.asarray(Image.open(BytesIO(images[-1].encoded_image_string)))
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10  # something is drawn
    assert "hp_metric" not in events.Tags()["scalars"]
    assert "_hparams_/session_start_info" in events.summary_metadata  # beside what is kept
    assert events.Scalars("prune/keep_flops")[0].value == 1
    (text,) = events.Tensors("prune/summary/text_summary")
    told = text.tensor_proto.string_val[0].decode()
    for number in (callback.history.before.flops, callback.history.after.flops):
        assert f"{number:,}" in told


def test_figures_draw_every_group_and_every_validation() -> None:
    pytest.importorskip("matplotlib")
    from lightning_prune.reporting import figures
    from lightning_prune.reporting.history import Prune
    from lightning_prune.reporting.measurement import Measurement

    small = Measurement(1, 1, 1.0)
    prunes = [Prune(1, 1, {}, {"b": 3}, small)]
    epochs = [{"epoch": 1, "keep_flops": 1.0, "acc": 0.5}, {"epoch": 2, "keep_flops": 0.5}]
    epochs.append({"epoch": 3, "keep_flops": 0.5, "acc": 0.75})
    history = History("m.M", "C", {}, "", {"a": 8, "b": 6}, {}, small, [], prunes, [], epochs)
    (axes,) = figures.widths(history).axes
    assert [bar.get_width() for bar in axes.patches] == [8, 6, 8, 3]
    assert [text.get_text() for text in axes.texts] == ["a  8/8", "b  3/6"]
    assert [text.get_position()[1] < bar.get_y() for text, bar in zip(axes.texts, axes.patches[:2], strict=True)]
    axes, _ = figures.metric_against_flops(history, "acc").axes
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 0.5], [0.5, 0.75]]  # the validation without it is left out


def test_a_logger_without_figures_gets_the_numbers(tmp_path: Path) -> None:
    _, trainer = battery.train(
        tmp_path, battery.make_callback("magnitude"), logger=CSVLogger(tmp_path), log_every_n_steps=1
    )
    head = Path(trainer.log_dir, "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"prune/channels/stem", "prune/channels/first", "prune/latency_ms", "prune/keep_flops"} <= set(head)


class Numbers(Logger):
    """A logger that keeps what it gets."""

    name, version = "kept", 0

    def __init__(self) -> None:  # not those of other loggers, which want libraries
        self.numbers: dict[str, list[float]] = {}
        self.figures: list[tuple[str, int, tuple[int, int]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.numbers.setdefault(name, []).append(value)

    def log_hyperparams(self, *arguments: Any, **named: Any) -> None:
        pass


class Pictures(Numbers):
    """A logger that shows pictures, after the example of Weights & Biases."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.figures += [(key, step, image.size) for image in images]


class Files(Pictures, MLFlowLogger):
    """A logger that keeps figures as MLflow's does, without MLflow."""

    run_id, save_dir = "run", None
    experiment = property(lambda self: self)
    after_save_checkpoint, finalize = Logger.after_save_checkpoint, Logger.finalize

    def log_figure(self, run: str, figure: Any, file: str) -> None:
        name, _, step = file.removesuffix(".png").rpartition("/")
        self.figures.append((name, int(step), tuple(int(100 * inches) for inches in figure.get_size_inches())))


def test_several_loggers_get_the_same_and_figures_where_they_show_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plain, pictures, files = Numbers(), Pictures(), Files()
    callback = battery.make_callback("magnitude")
    others = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")]
    battery.train(tmp_path, callback, logger=[plain, *others, pictures, files], log_every_n_steps=1)
    assert plain.numbers == pictures.numbers == files.numbers
    assert plain.numbers["prune/channels/stem"] == [prune.widths["stem"] for prune in callback.history.prunes]
    assert len(plain.numbers["prune/keep_flops"]) == battery.EPOCHS
    assert plain.figures == []
    steps = [*(battery.BATCHES * epoch for epoch in (1, 2, 3)), battery.BATCHES * battery.EPOCHS]
    expected = [(name, step) for step in steps for name in ("prune/widths", "prune/metric_against_flops")]
    for logger in (pictures, files):
        assert [(name, step) for name, step, _ in logger.figures] == expected
        assert all(min(size) > 150 for *_, size in logger.figures)
    images = logged(others[1].log_dir).Images("prune/widths")
    assert [image.step for image in images] == steps
    assert Path(others[0].log_dir, "pruning.json").is_file()  # the first logger has no folder


def test_without_matplotlib_figures_are_left_out_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    loggers._can_draw.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, trainer = battery.train(tmp_path, battery.make_callback("magnitude"), logger=TensorBoardLogger(tmp_path))
    loggers._can_draw.cache_clear()
    assert sum("matplotlib" in str(warning.message) for warning in told) == 1
    assert logged(trainer.log_dir).Tags()["images"] == []
    assert "prune/channels/stem" in logged(trainer.log_dir).Tags()["scalars"]


class TwoOptimizers(battery.ResidualClassifier):
    """Steps twice for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.stem, self.head)]


def test_steps_are_those_of_what_the_model_logs(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    callback = battery.make_callback("magnitude")
    battery.train(tmp_path, callback, module=TwoOptimizers(), logger=board, log_every_n_steps=1)
    scalars = logged(board.log_dir).Scalars
    assert [event.step for event in scalars("train/loss")] == list(range(battery.BATCHES * battery.EPOCHS))
    assert [event.step for event in scalars("prune/latency_ms")] == [battery.BATCHES * epoch for epoch in (1, 2, 3)]
