"""Names of compiled modules: ``torch.compile`` puts ``_orig_mod`` into them, on one side of a checkpoint or on both."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_prune.checkpoint.plans import CHECKPOINT_KEY, saved_plan
from lightning_prune.pruning_plan import renamed

__all__ = ["renamed_for"]

_COMPILED = "_orig_mod"


def renamed_for(model: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with the names that a model has, where they differ only by what is compiled.

    Args:
        model: The model that the weights go into.
        checkpoint: The checkpoint; it is not changed.

    Example:
        >>> import torch
        >>> compiled = torch.compile(nn.Sequential(nn.Linear(1, 1)))
        >>> checkpoint = renamed_for(nn.Sequential(nn.Linear(1, 1)), {"state_dict": compiled.state_dict()})
        >>> list(checkpoint["state_dict"])
        ['0.weight', '0.bias']
    """
    weights = checkpoint["state_dict"]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    names = _Names([*parameters, *buffers, *model.state_dict()])
    if all(names(name) == name for name in weights):
        return dict(checkpoint)
    result = {**checkpoint, "state_dict": {names(name): value for name, value in weights.items()}}
    if CHECKPOINT_KEY in checkpoint:
        result[CHECKPOINT_KEY] = _renamed_entry(model, checkpoint, names)
    return result


class _Names:
    """The names that a model has for what others have, compiled or not.

    Args:
        known: The names of the model.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self._known = {_as_written(name): name for name in known}  # of a wrapper and what is in it, the latter

    def __call__(self, name: str) -> str:
        return self._known.get(_as_written(name), name)


def _as_written(name: str) -> str:
    return ".".join(step for step in name.split(".") if step != _COMPILED)


def _renamed_entry(model: nn.Module, checkpoint: Mapping[str, Any], names: _Names) -> dict[str, Any]:
    """Return what `save_plan` has put into a checkpoint with other names."""
    plan = saved_plan(checkpoint)
    assert plan is not None
    entry = checkpoint[CHECKPOINT_KEY]
    modules = _Names(name for name, _ in model.named_modules(remove_duplicate=False))

    def group_name(name: str) -> str:
        layer, number, digits = name.partition("#")
        return modules(layer) + number + digits

    content = {**entry, "plan": renamed(plan, names, group_name).to_json()}
    if entry.get("aliases"):
        content["aliases"] = {names(name): names(known) for name, known in entry["aliases"].items()}
    return content
