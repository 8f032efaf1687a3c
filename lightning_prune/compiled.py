"""Compiled code: what `torch.compile` has made of a model or of submodules."""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

__all__ = ["as_written", "forget_compiled", "in_use", "is_compiled"]


def as_written() -> AbstractContextManager[object]:
    """Run what is compiled as it was written, in a context: sizes that are only tried out are not worth compiling."""
    return torch.compiler.set_stance("force_eager") if in_use() else nullcontext()


def forget_compiled() -> None:
    """Forget compiled code: it does not notice hooks that come or go, and few sizes of a network are kept at once."""
    if in_use():
        torch.compiler.reset()


def is_compiled(model: nn.Module) -> bool:
    """Tell whether a model, a submodule of it or one of their methods runs as compiled code.

    Args:
        model: The model.
    """
    for module in model.modules():
        if getattr(module, "_compiled_call_impl", None) is not None:  # by `module.compile()`
            return True
        attributes = (*vars(module).values(), *vars(type(module)).values())
        if any(hasattr(value, "_torchdynamo_orig_callable") for value in attributes):
            return True
    return False


def in_use() -> bool:
    """Tell whether anything can have been compiled."""
    return "torch._dynamo" in sys.modules
