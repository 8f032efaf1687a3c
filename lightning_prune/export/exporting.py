"""From a model to a file that runs elsewhere, checked against the model before it is there."""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.graph.tracing import as_call
from lightning_prune.progress import progress
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.surgery import prune, reshape

__all__ = ["BATCH_SIZES", "FORMATS", "export", "random_inputs"]

BATCH_SIZES = (1, 2, 5)  # that are tried out
_LARGE = 1_500_000_000  # bytes of weights from which ONNX has to keep them in a file of their own

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Run = Callable[[Inputs], list[Tensor]]


def export(model: nn.Module, example_inputs: Any, path: str | Path, tolerance: float = 1e-5) -> float:
    """Write a model to a file and check that what the file holds gives the same outputs.

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
    if path.suffix not in FORMATS:
        raise ValueError(f"The format of {str(path)!r} is unknown: end the name with one of {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(path.parent)!r}: make it first.")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0; got {tolerance!r}.")
    trainer = getattr(model, "_trainer", None)  # of a LightningModule after training; it is not copied along
    model = copy.deepcopy(model, {id(trainer): None}).cpu().eval()
    example = as_call(random_inputs(example_inputs, 2))  # of one sample, the exporters would take the 1 to be fixed
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder, progress(f"Writing {path.name}"):
        made = Path(folder) / path.name
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # about the insides of the exporters
            pairs = [_pair(model, as_call(random_inputs(example_inputs, size)), size) for size in BATCH_SIZES]
            run = FORMATS[path.suffix](model, example, made)
            apart = max(_apart(expected, run, inputs) for inputs, expected in pairs)
        if not apart <= tolerance:
            raise ValueError(
                f"What was exported gives other outputs than the model, {apart:.1e} of the largest apart where "
                f"{tolerance:.1e} may be; nothing was written."
            )
        del run
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):  # it comes last
            os.replace(file, path.parent / file.name)
    return apart


def _to_onnx(model: nn.Module, example: Inputs, path: Path) -> Run:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'ONNX needs {", ".join(missing)}, which `pip install "lightning-prune[export]"` installs; .pt2 and .pt '
            "need nothing more."
        )
    import onnxruntime

    args, kwargs = example
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        torch.onnx.export(
            model, args, path, kwargs=kwargs, dynamo=True, verbose=False, external_data=size > _LARGE,
            dynamic_shapes=_free(example, "batch"),
        )  # fmt: skip
    except torch.onnx.OnnxExporterError as raised:
        raise ValueError(f"{type(model).__name__} cannot be exported to ONNX: {_reason(raised)}") from raised
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> list[Tensor]:
        names = (given.name for given in session.get_inputs())
        feed = {name: tensor.numpy() for name, tensor in zip(names, _tensors(inputs), strict=True)}
        return [torch.from_numpy(np.asarray(output)) for output in session.run(None, feed)]

    return run


def _to_program(model: nn.Module, example: Inputs, path: Path) -> Run:
    args, kwargs = example
    try:
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=_free(example, torch.export.Dim.DYNAMIC), strict=False
        )
    except Exception as raised:  # of many kinds, from whatever in the model cannot be traced
        raise ValueError(f"{type(model).__name__} cannot be exported by torch.export: {_reason(raised)}") from raised
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    return lambda inputs: _tensors(loaded(*inputs[0], **inputs[1]))


def _to_weights(model: nn.Module, example: Inputs, path: Path) -> Run:
    plan = plan_in_force(model) or PruningPlan()
    torch.save(dict(model.state_dict()), path)
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(plan.to_json()))
    loaded = copy.deepcopy(model)
    reshape(loaded, None)
    prune(loaded, PruningPlan.from_json(json.loads(beside.read_text())))
    loaded.load_state_dict(torch.load(path, weights_only=True))
    return lambda inputs: _tensors(loaded(*inputs[0], **inputs[1]))


FORMATS: dict[str, Callable[[nn.Module, Inputs, Path], Run]] = {
    ".onnx": _to_onnx,
    ".pt2": _to_program,
    ".pt": _to_weights,
}


def random_inputs(example_inputs: Any, size: int) -> Any:
    """Make random inputs like some inputs: normal numbers, or where they are whole, samples of those that are there.

    Args:
        example_inputs: What a ``forward`` takes, as for `lightning_prune.trace`.
        size: The batch size.
    """
    generator = torch.Generator().manual_seed(size)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dim() == 0:
            return leaf.cpu()
        shape = (size, *leaf.shape[1:])
        if leaf.is_floating_point():
            return torch.randn(shape, generator=generator).to(leaf.dtype)
        return leaf.cpu()[torch.randint(len(leaf), (size,), generator=generator)]

    return tree_map(draw, example_inputs)


def _free(example: Inputs, batch: Any) -> Any:
    """Say that the first axis of every tensor is free, in the exporters' word for it."""
    args, kwargs = tree_map(lambda leaf: {0: batch} if isinstance(leaf, Tensor) and leaf.dim() else None, example)
    return kwargs or args


def _pair(model: nn.Module, inputs: Inputs, size: int) -> tuple[Inputs, list[Tensor]]:
    """Return inputs with the outputs that belong to them."""
    try:
        return inputs, _tensors(model(*inputs[0], **inputs[1]))
    except RuntimeError as raised:
        raise ValueError(
            f"{type(model).__name__} does not run on a batch of {size} ({_reason(raised)}), and what is exported takes "
            "batches of any size; take sizes from the inputs in its forward."
        ) from raised


def _apart(expected: list[Tensor], run: Run, inputs: Inputs) -> float:
    """Return how far what was exported is from the outputs, as a fraction of the largest."""
    try:
        found = run(inputs)
    except Exception as raised:  # of many kinds, from whatever runs it
        raise ValueError(
            f"What was exported does not run on a batch of {len(expected[0])} ({_reason(raised)}); nothing was written."
        ) from raised
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a.numel()]
    return max((float((a - b).abs().max() / a.abs().max().clip(min=1e-12)) for a, b in pairs), default=0.0)


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _reason(raised: BaseException) -> str:
    """Return the first line of the error at the bottom of a chain."""
    while raised.__cause__ is not None:
        raised = raised.__cause__
    lines = [line for line in str(raised).splitlines() if line.strip()]
    return lines[0] if lines else type(raised).__name__
