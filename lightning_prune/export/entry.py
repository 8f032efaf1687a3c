"""Entry to exports: a file is written aside, checked against the model, and only then put in its place."""

import copy
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.export.inputs import Inputs, Run, flat_tensors, random_call, reason, refuse_misfit
from lightning_prune.export.onnx import write_onnx
from lightning_prune.export.program import write_program
from lightning_prune.export.weights import write_weights
from lightning_prune.files import check_folder, full_disk_told
from lightning_prune.progress import progress

__all__ = ["BATCH_SIZES", "FORMATS", "export"]

_BESIDE_WEIGHTS = 200_000  # bytes of what is written besides

BATCH_SIZES = (1, 2, 5)  # that are tried out

FORMATS: dict[str, Callable[[nn.Module, Inputs, Path], Run]] = {
    ".onnx": write_onnx,
    ".pt2": write_program,
    ".pt": write_weights,
}
"""By the ending of the name: writes a model to a file, and returns what runs that file."""


def export(model: nn.Module, example_inputs: Any, path: str | Path, tolerance: float = 1e-5) -> float:
    """Write a model to a file and check that what is in the file gives the same outputs.

    The format goes by the ending of the name: ``.onnx`` for ONNX and ``.pt2`` for a program of ``torch.export``, both
    for any batch size, or ``.pt`` for the plain weights, with the plan as JSON beside them: the plan gives the original
    class its shape, by ``lightning_prune.prune(model, PruningPlan.from_json(...))``, and then the weights load.

    The file is loaded again and run on random inputs, in batches of several sizes, and the outputs are compared with
    those of the model. Only then is it put in its place.

    Args:
        model: The model, pruned or not; it is not changed.
        example_inputs: What ``forward`` takes, as for `lightning_prune.trace`; the first axis of every tensor is the
            batch.
        path: The file to write.
        tolerance: How far outputs may be apart, as a fraction of the largest one, above 0.

    Returns:
        How far they are apart at most, as a fraction of the largest output.

    Raises:
        ValueError: If the format is unknown, the model cannot be exported, or the outputs are too far apart; no file is
            written then.
        FileNotFoundError: If there is no folder for the file.
        ImportError: If ONNX is asked for and not installed.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(model, torch.zeros(1, 4), f"{folder}/model.pt2") <= 1e-5
        True
    """
    path = Path(path)
    _check_settings(path, tolerance)
    model = _copy_on_cpu(model)
    refuse_misfit(model, example_inputs)
    _check_space(model, path)
    with (
        full_disk_told(path),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder,
        progress(f"Writing {path.name}"),
    ):
        difference = _write_and_compare(model, example_inputs, Path(folder, path.name))
        if not difference <= tolerance:
            raise ValueError(
                f"What was exported gives other outputs than the model, {difference:.1e} of the largest apart where "
                f"{tolerance:.1e} may be; nothing was written."
            )
        _put_in_place(Path(folder), path)
    return difference


def _check_settings(path: Path, tolerance: float) -> None:
    if path.suffix not in FORMATS:
        raise ValueError(f"The format of {str(path)!r} is unknown: end the name with one of {', '.join(FORMATS)}.")
    check_folder(path)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0; got {tolerance!r}.")


def _check_space(model: nn.Module, path: Path) -> None:
    """Raise an OSError if the weights have no place on the device of a file: torch would end the process."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values() if _is_tensor(tensor))
    free = shutil.disk_usage(path.parent).free
    if free < needed + _BESIDE_WEIGHTS:
        raise OSError(
            f"No space is left for {str(path)!r}: it takes about {(needed + _BESIDE_WEIGHTS) / 1e6:,.1f} MB, and "
            f"{free / 1e6:,.1f} MB are free on its device."
        )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _copy_on_cpu(model: nn.Module) -> nn.Module:
    """Return a copy of a model, in evaluation mode on the CPU."""
    trainer = getattr(model, "_trainer", None)  # of a LightningModule after training; it is not copied along
    copied = copy.deepcopy(model, {id(trainer): None})
    return copied.cpu().eval()


@torch.no_grad()
def _write_and_compare(model: nn.Module, example_inputs: Any, path: Path) -> float:
    """Write a model to a file, and return how far the outputs of that file are from those of the model at most."""
    example = random_call(example_inputs, 2)  # of one sample, the exporters would take the 1 to be fixed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the insides of the exporters
        batches = [random_call(example_inputs, size) for size in BATCH_SIZES]
        expected = [_outputs(model, inputs, size) for inputs, size in zip(batches, BATCH_SIZES, strict=True)]
        run = FORMATS[path.suffix](model, example, path)
        differences = [_difference(outputs, run, inputs) for inputs, outputs in zip(batches, expected, strict=True)]
        return _greatest(differences)


def _outputs(model: nn.Module, inputs: Inputs, batch_size: int) -> list[Tensor]:
    args, kwargs = inputs
    try:
        return flat_tensors(model(*args, **kwargs))
    except RuntimeError as raised:
        raise ValueError(
            f"{type(model).__name__} does not run on a batch of {batch_size} ({reason(raised)}), and what is exported "
            "takes batches of any size; take sizes from the inputs in its forward."
        ) from raised


def _difference(expected: list[Tensor], run: Run, inputs: Inputs) -> float:
    """Return how far what was exported is from the outputs at most, as a fraction of the largest one."""
    try:
        found = run(inputs)
    except Exception as raised:  # of many kinds, from whatever runs it
        raise ValueError(
            f"What was exported does not run on a batch of {len(expected[0])} ({reason(raised)}); nothing was written."
        ) from raised
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return float("inf")
    pairs = zip(expected, found, strict=True)
    return _greatest([_relative_difference(one, other) for one, other in pairs])


def _relative_difference(expected: Tensor, found: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    expected, found = expected.double(), found.double()
    largest = expected.abs().max().clip(min=1e-12)
    return float((expected - found).abs().max() / largest)


def _greatest(differences: Sequence[float]) -> float:
    """Return the greatest difference, 0 for none; NaN if any is NaN, which Python's ``max`` would pass over."""
    return float(torch.tensor([0.0, *differences], dtype=torch.float64).max())


def _put_in_place(folder: Path, path: Path) -> None:
    """Move all files of an export to where they belong, the one that is named last: with it the export is complete.

    Files may refer to each other by name, so that each is written under its own name in a folder of its own.
    """
    beside = [file for file in sorted(folder.iterdir()) if file.name != path.name]
    for file in (*beside, folder / path.name):
        os.replace(file, path.parent / file.name)
