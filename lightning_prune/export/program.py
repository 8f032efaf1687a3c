"""Program format: what ``torch.export`` makes of a model, which runs without its class."""

import io
from pathlib import Path

import torch
from torch import nn

from lightning_prune.export.inputs import Inputs, Run, flat_tensors, free_batch_axis, reason

__all__ = ["write_program"]


def write_program(model: nn.Module, example: Inputs, path: Path) -> Run:
    """Write a model as a program of ``torch.export``, and load it again.

    Args:
        model: The model, in evaluation mode on the CPU.
        example: Inputs of the model, with more than one sample.
        path: The file to write.

    Returns:
        What runs the program.

    Raises:
        ValueError: If the model cannot be exported.
    """
    args, kwargs = example
    shapes = free_batch_axis(example, torch.export.Dim.DYNAMIC)
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as raised:  # of many kinds, from whatever in the model cannot be traced
        raise ValueError(f"{type(model).__name__} cannot be exported by torch.export: {reason(raised)}") from raised
    content = io.BytesIO()  # what torch writes to a full disk by itself ends the process
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())
    loaded = torch.export.load(path).module()
    return lambda inputs: flat_tensors(loaded(*inputs[0], **inputs[1]))
