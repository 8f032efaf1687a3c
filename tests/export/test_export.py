"""Exports: what the files hold gives the model's outputs, and what does not is never written."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import battery
import pytest
import torch
from engine import randomised
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.export import BATCH_SIZES, FORMATS, export, onnx, random_inputs
from lightning_prune.export.inputs import Inputs, Run
from lightning_prune.pruning_plan import PruningPlan, plan_in_force


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    )


@pytest.fixture
def pruned() -> nn.Module:
    model = randomised(network())
    graph = lp.trace(model, torch.zeros(1, 3, 8, 8))
    lp.prune(model, lp.plan(graph, lp.criteria.magnitude(graph), keep=0.5, round_to=1))
    return model


def test_onnx_runs_for_any_batch_and_gives_the_same(pruned: nn.Module, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pruned.train()
    before = {name: value.clone() for name, value in pruned.state_dict().items()}
    path = tmp_path / "model.onnx"
    assert 0 <= export(pruned, torch.zeros(1, 3, 8, 8), path) <= 1e-5
    assert pruned.training
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path)
    (entry,) = session.get_inputs()
    assert entry.shape == ["batch", 3, 8, 8]
    for size in (1, 3, 17):
        images = torch.randn(size, 3, 8, 8)
        (output,) = session.run(None, {entry.name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), pruned.eval()(images), rtol=1e-4, atol=1e-4)


def test_a_program_runs_for_any_batch_and_gives_the_same(pruned: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    assert export(pruned, torch.zeros(1, 3, 8, 8), path) <= 1e-5
    loaded = torch.export.load(path).module()
    for size in (1, 3, 17):
        images = torch.randn(size, 3, 8, 8)
        torch.testing.assert_close(loaded(images), pruned.eval()(images))


def test_weights_and_plan_give_the_original_class_the_pruned_model(pruned: nn.Module, tmp_path: Path) -> None:
    export(pruned, torch.zeros(1, 3, 8, 8), tmp_path / "model.pt")
    fresh = network()
    lp.prune(fresh, PruningPlan.from_json(json.loads((tmp_path / "model.json").read_text())))
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(fresh.eval()(images), pruned.eval()(images))
    assert plan_in_force(fresh) == plan_in_force(pruned)


def test_a_model_that_was_never_pruned_has_an_empty_plan(tmp_path: Path) -> None:
    export(network(), torch.zeros(1, 3, 8, 8), tmp_path / "model.pt")
    assert PruningPlan.from_json(json.loads((tmp_path / "model.json").read_text())) == PruningPlan()


class Words(nn.Module):
    """Takes integers by name, and gives a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def forward(self, *, words: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"mean": self.embed(words).mean(1) * scale, "count": words.sum(1)}


def test_inputs_by_name_and_integers(tmp_path: Path) -> None:
    inputs = {"words": torch.tensor([[1, 9, 3]]), "scale": torch.ones(1, 4)}
    assert export(Words(), inputs, tmp_path / "words.pt2") <= 1e-5
    assert export(Words(), inputs, tmp_path / "words.onnx") <= 1e-5


FULL = """
import resource
import sys
import warnings
from pathlib import Path

import torch

from lightning_prune.export import export

warnings.simplefilter("ignore")
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # which files are greater than, as on a full disk
for name in ("model.pt", "model.pt2", "model.onnx"):
    try:
        export(model, torch.zeros(1, 64), name)
    except OSError as raised:
        print(name, raised)
print(sorted(path.name for path in Path().iterdir()))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_disk_that_gets_full_while_a_file_is_written_ends_in_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    process = subprocess.run([sys.executable, "-c", FULL], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.strip().splitlines()
    assert lines == [
        *(f"{name} [Errno 27] No space is left for '{name}' on its device, or it would be too large a file there"
          for name in ("model.pt", "model.pt2", "model.onnx")),
        "[]",
    ]  # fmt: skip


def test_random_inputs_are_like_the_example() -> None:
    example = {"words": torch.tensor([[7, 8], [9, 7]]), "image": torch.zeros(1, 3, dtype=torch.float64), "n": 3}
    made = random_inputs(example, 6)
    assert made["words"].shape == (6, 2)
    assert {tuple(row) for row in made["words"].tolist()} <= {(7, 8), (9, 7)}  # no word that may not be there
    assert (made["image"].shape, made["image"].dtype, made["n"]) == ((6, 3), torch.float64, 3)
    assert made["image"].std() > 0.1


def test_a_module_is_exported_right_after_training_without_its_trainer(tmp_path: Path) -> None:
    module, trainer = battery.train(tmp_path, battery.make_callback("magnitude"))
    trainer.lock = threading.Lock()  # which cannot be copied
    assert export(module, torch.zeros(1, 1, 8, 8), tmp_path / "model.pt2") <= 1e-5
    assert module.trainer is trainer


def test_large_weights_go_into_a_file_beside(
    pruned: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx, "_LARGE", 0)
    export(pruned, torch.zeros(1, 3, 8, 8), tmp_path / "model.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    images = torch.randn(3, 3, 8, 8)
    (output,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"input": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), pruned.eval()(images), rtol=1e-4, atol=1e-4)


class OneIsSpecial(nn.Module):
    """A batch of one is treated in another way, which no trace of a larger batch sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (2 if x.shape[0] == 1 else 1)


class Fixed(nn.Module):
    """Writes down its batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).reshape(2, 2)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_what_differs_is_not_written_and_what_was_there_stays(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_text("what was there")
    with pytest.raises(ValueError, match=r"exported"):
        export(OneIsSpecial(), torch.zeros(1, 4), path)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_outputs_too_far_apart_are_told_in_numbers(
    pruned: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, message in (
        (0.01, r"1\.0e-02 of the largest apart where 1\.0e-05 may be"),
        (float("nan"), "nan of the"),
    ):

        def load(model: nn.Module, example: object, path: Path, error: float = error) -> Run:
            path.write_text("")

            def run(inputs: Inputs) -> list[Tensor]:
                output = model(*inputs[0])
                output.view(-1)[output.abs().argmax()] *= 1 + error
                return [output]

            return run

        monkeypatch.setitem(FORMATS, ".pt2", load)
        with pytest.raises(ValueError, match=message):
            export(pruned, torch.zeros(1, 3, 8, 8), tmp_path / "model.pt2")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["output", "batch"])
def test_what_is_no_number_anywhere_is_refused(
    wrong: str, pruned: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of two outputs, or in the last of the batches alone."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = pruned

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.network(x)
            return y, y + 1

    def load(model: nn.Module, example: object, path: Path) -> Run:
        path.write_text("")

        def run(inputs: Inputs) -> list[Tensor]:
            one, other = model(*inputs[0])
            if wrong == "output" or len(one) == BATCH_SIZES[-1]:
                other[0, 0] = float("nan")
            return [one, other]

        return run

    monkeypatch.setitem(FORMATS, ".pt2", load)
    with pytest.raises(ValueError, match="gives other outputs than the model, nan of the largest apart"):
        export(Two(), torch.zeros(1, 3, 8, 8), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_wrong_uses_are_refused_in_a_sentence(
    pruned: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"The format of .*model.tflite' is unknown: .* .onnx, .pt2, .pt\."):
        export(pruned, example, tmp_path / "model.tflite")
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere': make it first"):
        export(pruned, example, tmp_path / "nowhere" / "model.pt")
    with pytest.raises(ValueError, match="tolerance must be above 0; got 0"):
        export(pruned, example, tmp_path / "model.pt", tolerance=0)
    with pytest.raises(ValueError, match=r"Fixed does not run on a batch of 1 .* take sizes from the inputs"):
        export(Fixed(), torch.zeros(2, 4), tmp_path / "model.pt")
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(ImportError, match=r"ONNX needs onnxruntime, which `pip install .*\[export\]"):
        export(pruned, example, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
