"""Int8: ranges from batches, outputs against the float network, nothing written where it fails."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.export.quantizing import _Comparison, export_int8

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)]
    return nn.Sequential(*layers).eval()


def batches(count: int, size: int = 16) -> list[list[Tensor]]:
    model = network()
    images = [torch.randn(size, 3, 8, 8) for _ in range(count)]
    return [[one, model(one).argmax(1)] for one in images]  # which the float network names rightly, each of them


def test_an_int8_file_is_compared_with_the_float_network(tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    data = batches(4)
    found = export_int8(network(), data, path, calibrate=2)
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx"]
    session = onnxruntime.InferenceSession(path)
    (entry,) = session.get_inputs()
    expected, given, right = [], [], []
    for images, labels in data[2:]:  # a comparison of its own, on the batches that no range was seen on
        expected.append(network()(images).detach().double().numpy())
        given.append(session.run(None, {entry.name: images.numpy()})[0].astype(np.float64))
        right.append(given[-1].argmax(1) == labels.numpy())
    outputs, quantised = np.concatenate(expected), np.concatenate(given)
    apart = np.sqrt(np.square(outputs - quantised).mean() / np.square(outputs).mean())
    assert 0 < found.apart < 0.1
    assert found.apart == pytest.approx(apart, rel=1e-3)
    assert found.samples == 32
    assert found.accuracy == (1.0, np.concatenate(right).mean())
    assert found.agreement == np.concatenate(right).mean() > 0.8
    assert found.megabytes[1] < found.megabytes[0]
    assert [len(times) for times in found.milliseconds] == [9, 9]
    kinds = {tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert onnx.TensorProto.INT8 in kinds
    assert session.run(None, {entry.name: np.zeros((5, 3, 8, 8), np.float32)})[0].shape == (5, 4)


def test_batches_without_labels_and_outputs_that_are_no_classes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)).eval()
    found = export_int8(model, [torch.randn(8, 6)], tmp_path / "one.onnx", symmetric=True)
    assert (found.accuracy, found.agreement, found.samples) == (None, None, 8)


def test_what_is_added_up_by_hand() -> None:
    comparison = _Comparison()
    expected, found = np.array([[3.0, 1.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [0.0, 1.0]])
    comparison.add(expected, found, torch.tensor([0, 1]))
    assert comparison.apart == pytest.approx((5 / 14) ** 0.5)
    assert (comparison.same, comparison.right, comparison.samples) == (2, [2, 2], 2)
    with pytest.raises(ValueError, match="not finite; nothing was written"):
        comparison.add(expected, np.array([[np.nan, 1.0], [0.0, 1.0]]), None)


@pytest.mark.parametrize(
    ("path", "data", "sentence"),
    [
        ("model.pt2", [torch.zeros(1, 3, 8, 8)], r"int8 is written as ONNX alone: end the name of '.*model.pt2' with"),
        ("model.onnx", [], "int8 needs batches to see the ranges of activations on"),
        ("model.onnx", [torch.zeros(1, 1, 8, 8)], "do not fit Sequential"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_no_file(path: str, data: list, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        export_int8(network(), data, tmp_path / path)
    assert list(tmp_path.iterdir()) == []


def test_a_quantiser_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", fail)
    path = tmp_path / "model.onnx"
    path.write_text("what was there")
    with pytest.raises(ValueError, match=r"cannot quantise the network: no such operator; export it as it is\.$"):
        export_int8(network(), batches(1), path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["what was there"]
