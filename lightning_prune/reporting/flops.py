"""FLOPs of a network as it is now, counted by fvcore and what it leaves out; the cost model counts those of a plan."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_prune.compiled import as_written
from lightning_prune.graph.entry import let_in
from lightning_prune.graph.neutral import unfused_attention
from lightning_prune.graph.twin import twin_in_evaluation
from lightning_prune.planning.timing import placed
from lightning_prune.reporting.left_out import HANDLES, left_out

if TYPE_CHECKING:
    from fvcore.nn import FlopCountAnalysis

__all__ = ["FlopCount", "count_flops", "flop_table", "told"]


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one forward pass in evaluation mode.

    Attributes:
        total: Their number, where one FLOP is one multiply-add; None if fvcore cannot run the network.
        left_out: Those of them that fvcore by itself leaves out, by what it does not count.
        uncounted: How often operators ran that fvcore has no count for, by name.
        failure: Why there is no number; empty if there is one.
    """

    total: int | None
    left_out: dict[str, int] = field(default_factory=dict)
    uncounted: dict[str, int] = field(default_factory=dict)
    failure: str = ""


def count_flops(network: nn.Module, example_inputs: Any) -> FlopCount:
    """Count the FLOPs of a network with fvcore, and what fvcore leaves out by mistake.

    Args:
        network: The network; it is not changed.
        example_inputs: What its ``forward`` takes, as for `lightning_prune.trace`.

    Example:
        >>> count_flops(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), torch.zeros(1, 8)).total
        40
    """
    try:
        with _analysis(network, example_inputs) as analysis:
            total = int(analysis.total())
            return FlopCount(total, left_out(analysis.by_operator()), dict(analysis.unsupported_ops()))
    except Exception as raised:  # of many kinds, from whatever in the network cannot be traced
        return FlopCount(None, failure=_first_line(raised))


def flop_table(network: nn.Module, example_inputs: Any) -> str:
    """Return fvcore's table of the parameters and FLOPs of a network and its submodules, or why there is none.

    Below the table are the operators that fvcore has no count for.

    Args:
        network: The network; it is not changed.
        example_inputs: What its ``forward`` takes, as for `lightning_prune.trace`.
    """
    try:
        with _analysis(network, example_inputs) as analysis:
            from fvcore.nn import flop_count_table

            table = flop_count_table(analysis, max_depth=_depth(network) + 1)
            uncounted = analysis.unsupported_ops()
    except Exception as raised:  # as above
        return f"fvcore cannot count {type(network).__name__}: {_first_line(raised)}"
    operators = [f"{operator} ({times})" for operator, times in sorted(uncounted.items())]
    return f"{table}\nNot counted: {', '.join(operators)}" if operators else table


def told(count: FlopCount, modelled: int | None) -> str:
    """Say who has counted some FLOPs, and by how much the counts differ.

    Args:
        count: What was counted with fvcore.
        modelled: What the cost model counts, if that is known.

    Example:
        >>> told(FlopCount(1000), 1010)
        '1,000 counted by fvcore, 1,010 by the cost model (+10)'
        >>> told(FlopCount(1000, {"recurrent layers": 900}), 1000)
        '1,000 counted, 100 of them by fvcore, which leaves out 900 of recurrent layers'
    """
    if count.total is None:
        return f"{modelled:,} counted by the cost model, as fvcore cannot: {count.failure}"
    by_fvcore = f"{count.total:,} counted by fvcore"
    if count.left_out:
        by_itself = count.total - sum(count.left_out.values())
        left_out = ", ".join(f"{flops:,} of {what}" for what, flops in count.left_out.items())
        by_fvcore = f"{count.total:,} counted, {by_itself:,} of them by fvcore, which leaves out {left_out}"
    if modelled in (None, count.total):
        return by_fvcore
    return f"{by_fvcore}, {modelled:,} by the cost model ({modelled - count.total:+,})"


@contextmanager
def _analysis(network: nn.Module, example_inputs: Any) -> Iterator["FlopCountAnalysis"]:
    """Let fvcore run a twin of a network, which it may leave its hooks on."""
    with warnings.catch_warnings(), as_written(), unfused_attention(), torch.no_grad():
        warnings.simplefilter("ignore")  # about the insides of tracing
        from fvcore.nn import FlopCountAnalysis

        with twin_in_evaluation(network) as twin:
            call = _FlatCall(twin.model, example_inputs)
            analysis = FlopCountAnalysis(call, tuple(call.tensors))
            analysis.set_op_handle(**HANDLES)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            yield analysis


class _FlatCall(nn.Module):
    """A call of a network from tensors to tensors, which is all that fvcore takes and returns.

    Args:
        network: The network, named by its class in fvcore's table.
        example_inputs: What its ``forward`` takes.
    """

    def __init__(self, network: nn.Module, example_inputs: Any) -> None:
        super().__init__()
        self.name = type(network).__name__
        let_in(network, example_inputs)
        self.add_module(self.name, network)
        self.leaves, self.structure = tree_flatten(placed(example_inputs, network))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the inputs."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.structure)
        outputs = tuple(_tensors_in(self.get_submodule(self.name)(*args, **kwargs)))
        if not outputs:  # what nothing comes of is not counted
            raise ValueError("there are no tensors in what forward returns, as far as tuples and the like are searched")
        return outputs


def _tensors_in(value: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf):
            yield from _tensors_in(vars(leaf))


def _depth(network: nn.Module) -> int:
    """Return how deep submodules lie in a network."""
    return max(name.count(".") for name, _ in network.named_modules()) + 1


def _first_line(raised: Exception) -> str:
    lines = str(raised).strip().splitlines()
    return lines[0] if lines else type(raised).__name__
