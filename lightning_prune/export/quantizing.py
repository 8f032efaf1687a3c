"""Int8 by ONNX Runtime: an ONNX file is quantised from calibration batches, and compared with the float one."""

import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.export.entry import export
from lightning_prune.export.inputs import flat_tensors, reason
from lightning_prune.export.onnx import check_installed, open_session
from lightning_prune.files import check_folder, full_disk_told, written_whole
from lightning_prune.planning.timing import median_time, times_in_turns
from lightning_prune.progress import progress
from lightning_prune.unlabelled import arguments_of_forward, forward_arguments

__all__ = ["Quantized", "export_int8"]

_TOLERANCE = 1e-3  # of the float file, whose kernels round otherwise than torch's
_ROUNDS = 9
_MILLISECONDS = 100  # of a turn

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Quantized:
    """What an int8 network is beside the float one that it was made from.

    Attributes:
        samples: Number of samples that both were run on.
        apart: Root mean square of the differences of their outputs, as a fraction of that of the outputs.
        agreement: The share of the samples for which both name the same class; None of outputs that are no classes.
        accuracy: The accuracy of the float network and of the int8 one; None where batches have no labels.
        megabytes: Sizes of the files, float and int8.
        milliseconds: Times of a forward pass on a batch, float and int8, one for each of some turns.
        batch_size: The number of samples of that batch.
    """

    samples: int
    apart: float
    agreement: float | None
    accuracy: tuple[float, float] | None
    megabytes: tuple[float, float]
    milliseconds: tuple[list[float], list[float]]
    batch_size: int


def export_int8(
    model: nn.Module, batches: Sequence[Any], path: str | Path, calibrate: int = 8, symmetric: bool = False
) -> Quantized:
    """Write a model as ONNX in int8, and compare it with the float network in ONNX Runtime.

    Weights and activations are quantised statically, with ranges that are seen on the first batches. The file says so
    by pairs of QuantizeLinear and DequantizeLinear (QDQ), and takes batches of any size. Both networks are run on the
    other batches, and timed turn and turn about on as many threads as torch has.

    Args:
        model: The model, pruned or not; it is not changed.
        batches: Batches as they are trained on, with labels or without, at least one.
        path: The file to write; its name ends in ``.onnx``.
        calibrate: Number of batches that ranges are seen on; if there are no more, all are for both.
        symmetric: Whether activations are signed numbers around zero, as TensorRT wants them; else unsigned ones, which
            take less time on a CPU.

    Returns:
        What the int8 network is beside the float one.

    Raises:
        ValueError: If the model cannot be exported or quantised, or there are no batches; no file is written then.
        FileNotFoundError: If there is no folder for the file.
        ImportError: If a package for ONNX is missing.

    Note:
        The quantiser is that of ONNX Runtime, ``onnxruntime.quantization.quantize_static``, with weights by channel.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"int8 is written as ONNX alone: end the name of {str(path)!r} with .onnx.")
    if not batches:
        raise ValueError("int8 needs batches to see the ranges of activations on: give some hundred samples.")
    check_installed()
    check_folder(path)
    network = _Batches(model)
    seen = batches[:calibrate]
    others = batches[calibrate:] or batches
    with (
        full_disk_told(path),
        tempfile.TemporaryDirectory(prefix="lightning-prune-") as name,
        written_whole(path) as made,
    ):
        plain = Path(name, "float.onnx")
        export(model, network.example(batches[0]), plain, _TOLERANCE)
        with progress(f"Quantising {path.name}"):
            _quantize(plain, made, [network.inputs(batch) for batch in seen], symmetric)
        return _compared(network, plain, made, others)


class _Batches:
    """Says what a model takes of its batches, and what their labels are."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._arguments = arguments_of_forward(model)

    def example(self, batch: Any) -> Any:
        """Return what a model takes of a batch, as its example inputs."""
        args, kwargs = forward_arguments(self._model, batch, self._arguments)
        return kwargs or args

    def inputs(self, batch: Any) -> list[np.ndarray]:
        """Return the arrays that a file takes of a batch, in their order."""
        tensors = flat_tensors(self.example(batch))
        return [tensor.detach().cpu().numpy() for tensor in tensors]

    def labels(self, batch: Any) -> Tensor | None:
        """Return the class of each sample, if a batch says it."""
        if not isinstance(batch, list | tuple) or len(batch) <= self._arguments:
            return None
        labels = batch[self._arguments]
        is_class = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
        return labels.cpu() if is_class else None


def _quantize(plain: Path, made: Path, seen: list[list[np.ndarray]], symmetric: bool) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [entry.name for entry in open_session(plain).get_inputs()]

    class Calibration(CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds: Iterator[Arrays] = (dict(zip(names, arrays, strict=True)) for arrays in seen)

        def get_next(self) -> Arrays | None:
            return next(self._feeds, None)

    prepared = plain.with_name("prepared.onnx")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quant_pre_process(plain, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                made,
                Calibration(),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                extra_options={"ActivationSymmetric": symmetric},
            )
    except OSError:
        raise
    except Exception as raised:  # of many kinds, from whatever the quantiser does not know
        raise ValueError(f"ONNX Runtime cannot quantise the network: {reason(raised)}; export it as it is.") from raised


class _Comparison:
    """Adds up how far the outputs of an int8 network are from those of the float one."""

    def __init__(self) -> None:
        self.samples = 0
        self.squared_difference = self.squared_outputs = 0.0
        self.are_classes = self.are_labelled = True
        self.same = 0
        self.right = [0, 0]  # of the float network and of the int8 one

    def add(self, expected: np.ndarray, found: np.ndarray, labels: Tensor | None) -> None:
        """Take note of a batch.

        Args:
            expected: (samples, ...) outputs of the float network.
            found: (samples, ...) outputs of the int8 one.
            labels: (samples,) classes, if they are known.
        """
        if np.isfinite(expected).all() and not np.isfinite(found).all():
            raise ValueError("In int8 the network gives numbers that are not finite; nothing was written.")
        self.samples += len(expected)
        self.squared_difference += float(np.square(expected - found).sum())
        self.squared_outputs += float(np.square(expected).sum())
        self.are_classes &= expected.ndim == 2 and expected.shape[1] > 1
        self.are_labelled &= self.are_classes and labels is not None
        if not self.are_classes:
            return
        named = [outputs.argmax(1) for outputs in (expected, found)]
        self.same += int((named[0] == named[1]).sum())
        if labels is not None:
            for number, classes in enumerate(named):
                self.right[number] += int((classes == labels.numpy()).sum())

    @property
    def apart(self) -> float:
        """Root mean square of the differences, as a fraction of that of the outputs."""
        return math.sqrt(self.squared_difference / max(self.squared_outputs, 1e-30))


def _compared(network: _Batches, plain: Path, made: Path, batches: Sequence[Any]) -> Quantized:
    """Run and time the float network and the int8 one."""
    sessions = [_Session(plain), _Session(made)]
    comparison = _Comparison()
    for batch in batches:
        arrays = network.inputs(batch)
        expected, found = (session.run(arrays) for session in sessions)
        comparison.add(expected, found, network.labels(batch))
    first = network.inputs(batches[0])
    turns = [partial(_time, partial(session.run, first)) for session in sessions]
    of_float, of_int8 = times_in_turns(turns, _ROUNDS)
    samples = comparison.samples
    right, right_in_int8 = comparison.right
    return Quantized(
        samples=samples,
        apart=comparison.apart,
        agreement=comparison.same / samples if comparison.are_classes else None,
        accuracy=(right / samples, right_in_int8 / samples) if comparison.are_labelled else None,
        megabytes=(os.path.getsize(plain) / 1e6, os.path.getsize(made) / 1e6),
        milliseconds=(of_float, of_int8),
        batch_size=len(first[0]),
    )


class _Session:
    """Runs a file, and returns its first output."""

    def __init__(self, path: Path) -> None:
        self._session = open_session(path)
        self._names = [entry.name for entry in self._session.get_inputs()]

    def run(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Run a batch."""
        feed = dict(zip(self._names, arrays, strict=True))
        first, *_ = self._session.run(None, feed)
        return np.asarray(first, dtype=np.float64)


def _time(run: Callable[[], Any]) -> float:
    return median_time(run, torch.device("cpu"), _MILLISECONDS, most_runs=50)
