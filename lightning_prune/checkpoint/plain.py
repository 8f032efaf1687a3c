"""Models that no Trainer trains: weights and plan in one file."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_prune.checkpoint.loading import load_onto
from lightning_prune.checkpoint.plans import save_plan
from lightning_prune.files import read_checkpoint, written_whole
from lightning_prune.surgery import check

__all__ = ["load", "save"]

Model = TypeVar("Model", bound=nn.Module)

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def save(model: nn.Module, path: str | Path, **others: Any) -> None:
    """Write the weights of a model, pruned or not, and the plan that it was pruned by into one file.

    The file loads with ``torch.load(path, weights_only=True)``: the weights are its ``state_dict``.

    Args:
        model: The model, wrapped by Fabric or by DistributedDataParallel or not.
        path: The file; one that is there is replaced.
        others: What else goes into the file, such as the state of an optimizer or the number of an epoch.

    Raises:
        TypeError: If something else than a tensor or a plain value is to be saved under a name of ours.

    Example:
        >>> import tempfile
        >>> from lightning_prune import prune, trace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> report = prune(model, trace(model, torch.zeros(1, 2)).plan({"0": torch.tensor([0, 2])}))
        >>> original = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/pruned.pt")
        ...     load(original, f"{folder}/pruned.pt")[0]
        Linear(in_features=2, out_features=2, bias=True)
    """
    network = _unwrapped(model)
    content: dict[str, Any] = {"state_dict": network.state_dict()}
    save_plan(network, content)
    taken = content.keys() & others.keys()
    if taken:
        raise TypeError(
            f"{', '.join(sorted(taken))}: the file has these names for the weights and the plan; use others."
        )
    with written_whole(path) as file:
        torch.save({**others, **content}, file)


def load(model: Model, path: str | Path, *, map_location: Any = "cpu") -> Model:
    """Load what `save` has written onto a model, which takes the pruned shape; it is trained on, or evaluated.

    Make the optimizer afterwards, or pass the model before it has one: the parameters stay the same objects, but have
    other shapes.

    Args:
        model: The model in its original shape, or pruned already, perhaps less. It keeps its mode.
        path: The file.
        map_location: Where to load the weights to before they are copied into those of the model.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or of another architecture.
        TypeError: If the model is wrapped for distributed training: load onto the module in it, and wrap that.
    """
    check(model)
    checkpoint = read_checkpoint(path, map_location, weights_only=True)
    try:
        load_onto(_unwrapped(model), checkpoint)
    except RuntimeError as raised:
        raise ValueError(f"{str(path)!r} is of another architecture. {raised}") from raised
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that wrappers for training on devices wrap; that of Fabric is known by its name."""
    wrapped: Any = model
    while isinstance(wrapped, _WRAPPERS) or type(wrapped).__name__ == "_FabricModule":
        wrapped = wrapped.module
    return wrapped
