"""ONNX format: a file for ONNX Runtime and others, with a file beside it for very large weights."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.export.inputs import Inputs, Run, flat_tensors, free_batch_axis, reason

__all__ = ["check_installed", "open_session", "write_onnx"]

_LARGE = 1_500_000_000  # bytes of weights from which ONNX has to keep them in a file of their own
_ERRORS_ONLY = 3  # as ONNX Runtime numbers what it logs


def write_onnx(model: nn.Module, example: Inputs, path: Path) -> Run:
    """Write a model as ONNX, and load it again.

    Args:
        model: The model, in evaluation mode on the CPU.
        example: Inputs of the model, with more than one sample.
        path: The file to write.

    Returns:
        What runs the file with ONNX Runtime.

    Raises:
        ImportError: If a package for ONNX is missing.
        ValueError: If the model cannot be exported.
    """
    check_installed()
    args, kwargs = example
    weights = model.state_dict().values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    try:
        torch.onnx.export(
            model,
            args,
            path,
            kwargs=kwargs,
            dynamo=True,
            verbose=False,
            external_data=size > _LARGE,
            dynamic_shapes=free_batch_axis(example, "batch"),
        )
    except torch.onnx.OnnxExporterError as raised:
        raise ValueError(f"{type(model).__name__} cannot be exported to ONNX: {reason(raised)}") from raised
    session = open_session(path)

    def run(inputs: Inputs) -> list[Tensor]:
        names = [entry.name for entry in session.get_inputs()]
        arrays = [tensor.numpy() for tensor in flat_tensors(inputs)]
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(np.asarray(output)) for output in outputs]

    return run


def check_installed() -> None:
    """Raise an ImportError if a package for ONNX is missing."""
    packages = ("onnx", "onnxscript", "onnxruntime")
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(
            f'ONNX needs {", ".join(missing)}, which `pip install "lightning-prune[export]"` installs; .pt2 and .pt '
            "need nothing more."
        )


def open_session(path: Path) -> Any:
    """Open a file with ONNX Runtime, on as many CPU threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = _ERRORS_ONLY
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
