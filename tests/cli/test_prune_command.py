"""``lightning-prune prune``: a trained checkpoint to a smaller one, as a person types it."""

import sys
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback
from lightning_prune.cli import methods
from lightning_prune.cli.entry import main
from lightning_prune.pruning_plan import plan_in_force

HERE = __name__
FAST = ["--round_to", "2", "--accelerator", "cpu", "--compensate_batches", "2"]


class Images(L.LightningDataModule):
    """Four classes of small images."""

    def __init__(self, count: int = 96) -> None:
        super().__init__()
        self.count = count

    def train_dataloader(self) -> DataLoader:
        return DataLoader(battery.images(self.count), 32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Subset(battery.images(128), range(96, 128)), 16)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()


class Plain(nn.Sequential):
    """A network that no Trainer has trained."""

    def __init__(self) -> None:
        layers = [nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 4)]
        super().__init__(*layers)


class Wide(battery.ResidualClassifier):
    """Has an argument without a default."""

    def __init__(self, width: int) -> None:
        super().__init__(width)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a run of the command line that has trained without pruning."""
    root = tmp_path_factory.mktemp("run")
    arguments = ["fit", "--model=battery.ResidualClassifier", f"--data={HERE}.Images"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.max_epochs=2", f"--trainer.default_root_dir={root}"]
    arguments += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-prune"])
        main(arguments)
    (path,) = root.glob("**/*.ckpt")
    return path


@pytest.fixture(autouse=True)
def _timed_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timing take no time, but once."""
    if "class_and_data" not in request.node.name:
        monkeypatch.setattr(methods, "forward_times", lambda *_, **__: [[2.0, 2.2], [1.0, 1.0]])


def pruned(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main(["prune", *map(str, arguments), *FAST])
    return capsys.readouterr().out


def accuracy(model: nn.Module, data: Images) -> float:
    """Return the accuracy on the validation split, worked out by hand."""
    right = torch.cat([model(images).argmax(1) == labels for images, labels in data.val_dataloader()])
    return float(right.float().mean())


def test_class_and_data_come_from_the_checkpoint_and_the_config_of_its_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.ckpt"
    told = pruned(capsys, trained, out, "--keep", "0.5")
    original = lp.load_pruned(battery.ResidualClassifier, trained)
    model = lp.load_pruned(battery.ResidualClassifier, out)
    budget = plan_in_force(model).budget
    assert budget["achieved"] <= 0.5
    assert f"{budget['achieved']:.3f} of the flops is kept where keep=0.500 was asked for" in told
    before, after = accuracy(original, Images()), accuracy(model, Images())
    assert f"val/accuracy: {before:.4f} before, " in told
    assert f" pruned, {after:.4f} compensated" in told
    weights = torch.load(trained, weights_only=True)["hyper_parameters"]
    assert torch.load(out, weights_only=True)["hyper_parameters"] == weights


@pytest.mark.long
def test_one_option_lets_residual_blocks_be_pruned(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.ckpt"
    with pytest.warns(
        UserWarning, match="'second#block' is .* of the cost, and is pruned whole or not; raise keep to 1"
    ):
        told = pruned(capsys, trained, out, "--keep", "0.05", "--blocks")  # for which the block has to go
    model = lp.load_pruned(battery.ResidualClassifier, out)
    assert plan_in_force(model).groups["second#block"].kept == ()
    assert not sum(parameter.numel() for parameter in (*model.first.parameters(), *model.second.parameters()))
    assert f" pruned, {accuracy(model, Images()):.4f} compensated" in told


def test_it_is_what_the_callback_does_before_the_first_batch(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.ckpt"
    pruned(capsys, trained, out, "--keep", "0.6", "--metric", "params")
    callback = PruningCallback(0.6, "params", start_epoch=0, round_to=2, compensate_batches=2, save_result=False)
    expected = lp.load_pruned(battery.ResidualClassifier, trained)
    expected.configure_optimizers = lambda: torch.optim.SGD(expected.parameters(), 0.0)
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"max_epochs": 1, "limit_train_batches": 1, "accelerator": "cpu", "default_root_dir": tmp_path}
    L.Trainer(callbacks=[callback], **settings).fit(expected, datamodule=Images())
    model = lp.load_pruned(battery.ResidualClassifier, out)
    assert plan_in_force(model) == plan_in_force(expected)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_written_is_read_by_the_other_commands_and_trained_on(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-prune"])
    monkeypatch.chdir(tmp_path)
    pruned(capsys, trained, "small.ckpt", "--method", "taylor")
    shape = ["--input_shape", "1", "1", "8", "8"]
    main(["report", "small.ckpt"])
    assert "ResidualClassifier" in Path("small.html").read_text()
    main(["benchmark", "small.ckpt", "--rounds", "1", "--batch_sizes", "1", *shape])
    main(["export", "small.ckpt", "small.pt", *shape])
    main(["compare", str(trained), "small.ckpt", *shape])
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    config = str(trained.parents[1] / "config.yaml")
    main(["test", "--config", config, "--ckpt_path", "small.ckpt", *quiet])
    main(["fit", "--config", config, "--ckpt_path", "small.ckpt", "--trainer.max_epochs=1", *quiet])
    assert "Written to small.pt" in capsys.readouterr().out
    again = pruned(capsys, "small.ckpt", "smaller.ckpt", "--keep", "0.3", "--data", f"{HERE}.Images")
    assert "keep=0.300 was asked for" in again
    plan = plan_in_force(lp.load_pruned(battery.ResidualClassifier, "smaller.ckpt"))
    assert plan.budget["achieved"] <= 0.3  # of the original network


def test_a_checkpoint_is_exported_in_int8_from_its_validation_data(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    few = ["--quantize", "int8", "--calibrate_batches", "1", "--accelerator", "cpu"]
    main(["export", str(trained), "small.onnx", *few])
    told = capsys.readouterr().out
    assert "Written to small.onnx in int8: " in told
    assert "accuracy of 16 validation samples: " in told  # of the two batches one is for the ranges
    assert "onnxruntime, batches of 16: " in told
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]
    with pytest.raises(SystemExit, match=r"int8 is written as ONNX alone"):
        main(["export", str(trained), "small.pt2", *few])
    lp.save(Plain().eval(), tmp_path / "plain.pt")
    with pytest.raises(SystemExit, match="There are no validation data for Plain: give --data"):
        main(["export", "plain.pt", "plain.onnx", *few, "--model", f"{HERE}.Plain"])
    main(["export", "plain.pt", "plain.onnx", *few, "--model", f"{HERE}.Plain", "--data", f"{HERE}.Images"])
    assert "accuracy of 16 validation samples: " in capsys.readouterr().out


def test_any_other_module_is_pruned_and_compared_with_what_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = Plain().eval()
    lp.save(network, tmp_path / "plain.pt")
    options = ["--model", f"{HERE}.Plain", "--data", f"{HERE}.Images"]
    told = pruned(capsys, tmp_path / "plain.pt", tmp_path / "out.pt", *options)
    model = lp.load(Plain(), tmp_path / "out.pt").eval()
    assert model[0].out_channels == 6
    before, after = accuracy(network, Images()), accuracy(model, Images())
    assert f"val/accuracy: {before:.4f} before, " in told
    assert f" {after:.4f} compensated" in told
    assert "val/error: 0.0000 before" in told
    main(["benchmark", str(tmp_path / "out.pt"), *options[:2], "--rounds", "1", "--input_shape", "1", "1", "8", "8"])
    main(["report", str(tmp_path / "out.pt")])


def test_settings_of_model_and_data_are_given_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Wide(6)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "wide.ckpt")
    options = ["--model", f"{HERE}.Wide", "--model.width", 6, "--data", f"{HERE}.Images", "--data.count=64"]
    pruned(capsys, tmp_path / "wide.ckpt", tmp_path / "out.ckpt", *options)
    assert plan_in_force(lp.load_pruned(Wide, tmp_path / "out.ckpt", width=6)) is not None


@pytest.mark.long
def test_published_weights_are_taken_with_the_config_of_their_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_prune.models import ImageClassifier, build_network

    network = build_network("digits", num_classes=10, in_channels=1)
    torch.save({f"module.{name}": value for name, value in network.state_dict().items()}, tmp_path / "digits.th")
    torch.save({"state_dict": torch.load(tmp_path / "digits.th")}, tmp_path / "wrapped.th")
    for name in ("digits.th", "wrapped.th"):
        pruned(capsys, tmp_path / name, tmp_path / "out.ckpt", "--config", "quickstart", "--validate_batches", 1)
        assert plan_in_force(lp.load_pruned(ImageClassifier, tmp_path / "out.ckpt")) is not None


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must end with one sentence, and return it."""
    with pytest.raises(SystemExit) as left:
        main(list(map(str, arguments)))
    assert isinstance(left.value.code, str)
    assert "\n" not in left.value.code
    assert capsys.readouterr().out == ""
    return left.value.code


def test_what_cannot_work_is_refused_and_nothing_is_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.ckpt"
    assert "keep must be the fraction" in fails(capsys, "prune", trained, out, "--keep", "2")
    assert "is a folder: give the file to write" in fails(capsys, "prune", trained, tmp_path)
    assert "There is no folder" in fails(capsys, "prune", trained, tmp_path / "a" / "b.ckpt")
    assert "There is no checkpoint at" in fails(capsys, "prune", tmp_path / "a.ckpt", out)
    assert "There is no criterion 'tailor'" in fails(capsys, "prune", trained, out, "--method", "tailor")
    assert "cannot be reached" in fails(capsys, "prune", trained, out, "--keep", "0.000001", "--accelerator", "cpu")
    assert "There is no config at" in fails(capsys, "prune", trained, out, "--config", "nothing.yaml")
    alone = tmp_path / "alone" / "deep" / "a.ckpt"
    alone.parent.mkdir(parents=True)
    alone.write_bytes(trained.read_bytes())
    assert "There are no data to look at for ResidualClassifier: give --data" in fails(capsys, "prune", alone, out)
    assert list(tmp_path.iterdir()) == [tmp_path / "alone"]


def test_no_data_module_is_imported_on_the_word_of_a_file_beside_a_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_data.py").write_text("raise SystemError('it ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.ckpt").write_bytes(trained.read_bytes())
    (tmp_path / "run" / "config.yaml").write_text("data:\n  class_path: evil_data.Data\n")
    told = fails(capsys, "prune", tmp_path / "run" / "a.ckpt", tmp_path / "out.ckpt")
    assert "name the module 'evil_data', which is not imported on the word of a file" in told
    assert not (tmp_path / "out.ckpt").exists()


def test_what_was_there_is_there_still_if_writing_fails(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "small.ckpt"
    out.write_text("before")

    def spoilt(trainer: Any, path: Any, **_: Any) -> None:
        checkpoint = torch.load(trained, weights_only=True)
        torch.save(checkpoint, path)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", spoilt)
    told = fails(capsys, "prune", trained, out, *FAST)
    assert "is not what was to be written" in told
    assert out.read_text() == "before"
    assert list(tmp_path.iterdir()) == [out]
