"""Registry of criteria by name, and the one call that runs any of them."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_prune.criteria.channel_scores import Scores, refuse_blocks, with_blocks
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.importing import imported

__all__ = [
    "CRITERIA", "Criterion", "Loss", "find", "needs_data", "needs_loss", "register", "score", "scores_blocks",
    "takes_data",
]  # fmt: skip

Criterion = Callable[..., Scores]
"""Given the graph, and for some also batches and a loss, returns scores."""
Loss = Callable[[nn.Module, Any], Tensor]
"""Given the model and a batch, returns the loss as a scalar."""
Setting = str | Mapping[str, Any]
"""A name or an import path, or a mapping with a ``name`` and settings."""
_Function = TypeVar("_Function", bound=Criterion)

Blocks = str | Callable[[dict[str, Any]], str]

CRITERIA: dict[str, Criterion] = {}
_BLOCKS: dict[str, Blocks] = {}


def register(name: str, blocks: Blocks = "mean") -> Callable[[_Function], _Function]:
    """Give a criterion a name that `score` and the settings of callbacks know it by.

    Args:
        name: The name. A name that is taken is given to the new criterion.
        blocks: What it says of residual blocks, where these can be pruned: ``"mean"``: a block scores as the channels
            inside it do on average; ``"own"``: it scores blocks as it does channels; ``"none"``: it compares channels
            with others of their group, which tells nothing of blocks, and is refused. Or a function that is given its
            settings, and returns ``"own"`` or ``"none"``.

    Returns:
        A decorator for a function whose first parameter is the graph. One that takes data names its next two
        parameters ``batches`` and ``loss``, with None as the default of what it can do without; all others are
        settings, and need defaults. It returns the (channels,) score of each group, higher is kept; ``-inf`` for
        channels that have been pruned.

    Example:
        >>> import torch
        >>> from lightning_prune import criteria, trace
        >>> @register("first_come")
        ... def first_come(graph, power=1):
        ...     return {name: -(torch.arange(group.size) ** power) for name, group in graph.groups.items()}
        >>> graph = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.zeros(1, 2))
        >>> score(graph, {"name": "first_come", "power": 2})
        {'0': tensor([ 0, -1, -4])}
    """

    def note(function: _Function) -> _Function:
        scoring: Any = function
        if blocks in ("mean", "none"):
            scoring = _scoring_blocks(function, name if blocks == "none" else "")
        CRITERIA[name] = scoring
        _BLOCKS[name] = blocks
        return scoring

    return note


def _scoring_blocks(function: Criterion, refused: str = "") -> Criterion:
    """Return a criterion that is shown channels alone, and scores residual blocks by them.

    Args:
        function: The criterion.
        refused: The name of one that tells nothing of blocks; empty for others.
    """

    @wraps(function)
    def scoring(graph: ChannelGraph, *args: Any, **settings: Any) -> Scores:
        if graph.blocks and refused:
            refuse_blocks(refused)
        return with_blocks(graph, function(graph.channels(), *args, **settings))

    return scoring


def score(
    graph: ChannelGraph,
    criterion: Setting = "l1",
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Scores:
    """Score the channels by any criterion.

    Args:
        graph: The traced model.
        criterion: A name in `CRITERIA`, or the import path of a function; with settings as a mapping such as
            ``{"name": "magnitude", "p": 2}``.
        batches: Batches of data, for criteria that take them.
        loss: Given the model and a batch, returns the loss as a scalar; those that can do without it run the model
            by it, if it is given.

    Returns:
        (channels,) score of each group, higher is kept; ``-inf`` for channels that have been pruned.

    Raises:
        ValueError: If there is no such criterion or setting, or it needs data and there are none.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 1.0]]))
        >>> score(trace(model, torch.zeros(1, 2)), {"name": "magnitude", "p": 1})["0"]
        tensor([1.0000, 1.5000, 0.5000])
    """
    function = find(criterion)
    if not takes_data(function):
        return function(graph)
    name, _ = _name_and_settings(criterion)
    if batches is None and needs_data(function):
        raise ValueError(f"Criterion {name!r} needs data: give `batches` and `loss`.")
    if batches is None:
        return function(graph)
    if loss is None and needs_loss(function):
        raise ValueError(f"Criterion {name!r} needs a loss: give `loss`, which is called with the model and a batch.")
    return function(graph, batches, loss)


def find(criterion: Setting) -> Criterion:
    """Return the criterion of a setting, with its own settings filled in.

    Args:
        criterion: As for `score`.

    Raises:
        ValueError: If there is no such criterion, or it has no such setting.
    """
    name, settings = _name_and_settings(criterion)
    function = CRITERIA.get(name)
    if function is None and "." in name:
        function = _imported(name)
    if function is None:
        raise ValueError(
            f"There is no criterion {name!r}; those known are {', '.join(sorted(CRITERIA))}. Yours needs "
            "@lightning_prune.criteria.register(...) in a module that is imported, or is named by its import path."
        )
    if not settings:
        return function
    _check_settings(name, function, settings)
    return partial(function, **settings)


def scores_blocks(criterion: Setting) -> bool:
    """Tell whether a criterion says anything of residual blocks.

    Args:
        criterion: As for `score`.
    """
    name, settings = _name_and_settings(criterion)
    blocks = _BLOCKS.get(name, "mean")
    said = blocks if isinstance(blocks, str) else blocks(settings)
    return said != "none"


def takes_data(function: Criterion) -> bool:
    """Tell whether a criterion takes batches of data."""
    return "batches" in inspect.signature(function).parameters


def needs_data(function: Criterion) -> bool:
    """Tell whether a criterion takes batches of data and cannot do without."""
    return _needs(function, "batches")


def needs_loss(function: Criterion) -> bool:
    """Tell whether a criterion takes a loss and cannot do without."""
    return _needs(function, "loss")


def _needs(function: Criterion, name: str) -> bool:
    signature = inspect.signature(function)
    if name not in signature.parameters:
        return False
    parameter = signature.parameters[name]
    return parameter.default is not None


def _name_and_settings(criterion: Setting) -> tuple[str, dict[str, Any]]:
    settings = {"name": criterion} if isinstance(criterion, str) else dict(criterion)
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"A criterion is a name, or a mapping with a name and settings; got {criterion!r}.")
    return name, settings


def _check_settings(name: str, function: Criterion, settings: Mapping[str, Any]) -> None:
    _, *parameters = inspect.signature(function).parameters  # the first is the graph
    known = [parameter for parameter in parameters if parameter not in ("batches", "loss")]
    for key in settings:
        if key not in known:
            raise ValueError(f"Criterion {name!r} has no setting {key!r}; it has {', '.join(known) or 'none'}.")


def _imported(path: str) -> Criterion | None:
    try:
        found: Any = imported(path)
    except ImportError as error:
        raise ValueError(f"There is no criterion {path!r} ({error}): check the path and the PYTHONPATH.") from error
    if found in CRITERIA.values():
        return found
    return _scoring_blocks(found) if callable(found) else None
