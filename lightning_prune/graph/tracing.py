"""Tracing a model into a channel graph that has been tried out on smaller networks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from lightning_prune.compiled import as_written
from lightning_prune.graph.blocks import Block, Flow, find_blocks
from lightning_prune.graph.blocks_trial import adaptations_with, why_not_pruned
from lightning_prune.graph.channel_graph import ChannelGraph, Group, Unprunable
from lightning_prune.graph.entry import Step
from lightning_prune.graph.fitting import Fitting
from lightning_prune.graph.nearest import nearest_names
from lightning_prune.graph.neutral import unsearched_memory
from lightning_prune.graph.operators import OperatorTables
from lightning_prune.graph.records import Known, Record, Split
from lightning_prune.graph.records import Sheet as Which
from lightning_prune.graph.relations import NO_RELATIONS, Relations
from lightning_prune.graph.rules import RULES
from lightning_prune.graph.rules.rearranging import TWO_KINDS
from lightning_prune.graph.run import Forward
from lightning_prune.graph.settling import Network, Search, matches_any
from lightning_prune.graph.sheets import Sheet, joined_groups
from lightning_prune.graph.steps import StepRun
from lightning_prune.graph.terms import cost_terms, take_out
from lightning_prune.graph.ties import TiedPairs, components, of_attention
from lightning_prune.graph.unnamed import name_the_rest
from lightning_prune.progress import progress
from lightning_prune.pruning_plan import Adaptation

__all__ = ["trace"]


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    module: str = "",
    ignore: Sequence[str] = (),
    steps: Sequence[Step] = (),
    relations: Relations = NO_RELATIONS,
    blocks: bool = False,
) -> ChannelGraph:
    """Find out which channels of a model can only be pruned together, which cannot be pruned, and why.

    The model's forward pass runs on tensors without data, and then once more with fewer channels, to see that nothing
    in it relies on their number, in evaluation and in training mode. Where data is needed (control flow that depends
    on values) the example inputs are run for real. The model is as it was afterwards: mode, parameters, buffers,
    hooks, gradients and random state.

    Args:
        model: Any module; a model that has been pruned before is traced in its original shape.
        example_inputs: What ``forward`` takes: a tensor, a tuple of positional arguments or a dictionary of named
            ones; a `Step` where a model has no ``forward``. Costs are counted for these inputs.
        module: Dotted name of the submodule to trace, whose ``forward`` then takes the example inputs; default the
            model itself.
        ignore: Patterns (``"layer1.*"``) of names of modules whose channels are not to be pruned.
        steps: Methods of the model that run it in other ways, such as one that trains it: what these do with channels
            counts too. One that cannot be traced is in ``untraced`` of the graph.
        relations: What is known of its submodules: which are frozen, and which follow others.
        blocks: Let residual blocks be groups too, each of one channel that is pruned with all that the block runs.
            Where ``x + f(x)`` is computed, the layers of ``f`` are a block: without it, the sum is ``x``.

    Returns:
        The graph.

    Raises:
        ValueError: If the inputs do not fit, a pattern matches no module, ``module`` names no submodule, or the model
            is quantized, not initialised, or spread over several devices.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
        >>> graph = trace(model, torch.zeros(1, 3, 8, 8))
        >>> graph.groups["0"].size
        8
        >>> graph.unprunable
        {'3': Unprunable(channels=10, reason='3: is an output of the network')}
    """
    with progress(f"Tracing {type(model).__name__}"), as_written(), unsearched_memory():
        forward = Forward(
            model,
            module,
            example_inputs,
        )
        forward.outside = relations.outside
        forward.remembered = bool(steps)
        patterns = _checked_patterns(ignore, forward.module_names)
        runs = partial(_step_runs, forward, model, steps)
        network = Network(
            forward,
            patterns,
            runs,
            relations,
        )
        return _graph(model, network, blocks)


def _graph(model: nn.Module, network: Network, with_blocks: bool) -> ChannelGraph:
    """Return the graph of a network; what passes have shown is let go before memory is searched again."""
    forward = network.forward
    seen = _see(network)
    terms = cost_terms(
        forward,
        seen.groups,
        seen.sheets,
    )
    found = _Blocks()
    if with_blocks:
        found = _blocks(forward, seen, network.ignored)
    return ChannelGraph(
        model,
        {**seen.groups, **{block.group.name: block.group for block in found.blocks}},
        {**seen.unprunable, **found.unprunable},
        forward.shapes,
        terms,
        forward.module,
        forward.example_inputs,
        untraced=seen.untraced,
        frozen=take_out(terms, seen.frozen),
        adaptations=adaptations_with(seen.adaptations, found.blocks),
        blocks={block.group.name: block.modules for block in found.blocks},
    )


def _step_runs(forward: Forward, model: nn.Module, steps: Sequence[Step]) -> list[StepRun]:
    return [
        StepRun(
            forward,
            model,
            step,
        )
        for step in steps
    ]


def _checked_patterns(ignore: Sequence[str], module_names: Sequence[str]) -> list[str]:
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    for pattern in patterns:
        if not matches_any(pattern, module_names):
            known = nearest_names(pattern, module_names)
            raise ValueError(f"The ignore pattern {pattern!r} matches no module of the model; {known}.")
    return patterns


@dataclass(frozen=True)
class _Seen:
    """What is known of a network once all has been tried out.

    Attributes:
        groups: Its groups, by name.
        sheets: What it showed, in one or two ways.
        unprunable: The channels that cannot be pruned.
        adaptations: What follows the groups in modules, by the names of these.
        untraced: Why steps could not be traced, by name.
        frozen: The frozen submodules that keep their channels.
    """

    groups: dict[str, Group]
    sheets: Sequence[Sheet]
    unprunable: Mapping[str, Unprunable]
    adaptations: Mapping[str, Adaptation]
    untraced: Mapping[str, str]
    frozen: Sequence[str]


@dataclass(frozen=True)
class _Blocks:
    """The residual blocks of a network: those that can be pruned, and those that cannot, with the reason."""

    blocks: Sequence[Block] = ()
    unprunable: Mapping[str, Unprunable] = field(default_factory=dict)


def _blocks(forward: Forward, seen: _Seen, patterns: Sequence[str]) -> _Blocks:
    """Find the residual blocks of a network, and try it without them."""
    ignored = [name for name in forward.module_names if any(matches_any(pattern, [name]) for pattern in patterns)]
    flow = Flow(OperatorTables(RULES, {}), Known())
    fitting = Fitting(seen.sheets, seen.groups)
    blocks, reasons = find_blocks(forward, flow, fitting, [*ignored, *seen.frozen])
    while True:
        adaptations = adaptations_with(seen.adaptations, blocks)
        found = why_not_pruned(forward, adaptations, blocks)
        reasons.update(found)
        blocks = [block for block in blocks if block.group.name not in found]
        if not found:
            unprunable = {name: Unprunable(1, reason) for name, reason in reasons.items()}
            return _Blocks(blocks, unprunable)


def _see(network: Network) -> _Seen:
    """Find the groups of a network, of which there are two kinds along one axis where that is split into heads."""
    search = Search(network, Known())
    evaluation = search.observe()
    splits = _split_into_heads(network.forward, evaluation)
    if not splits:
        sheet, joined = search.settle(evaluation)
        return _put_together(
            search,
            [sheet],
            joined,
        )
    inner = Search(
        network,
        _following(
            search.known,
            Which.WIDTHS,
            splits,
        ),
    )
    outer = Search(
        network,
        _following(
            search.known,
            Which.HEADS,
            splits,
        ),
    )
    of_widths = evaluation if _follows_widths(splits, evaluation) else inner.observe()
    outer.other = inner.first_sheet(of_widths)
    of_heads, _ = outer.settle(outer.observe())
    inner.other, inner.beside, inner.resized = of_heads, True, outer.resized
    inner.splitting = outer.splitting
    inner.found_unprunable.extend(outer.found_beside_attention)
    sheet, joined = inner.settle(of_widths)
    if not inner.runs_with_single_heads(sheet):
        of_heads = of_heads.without_pairs()
    return _put_together(
        inner,
        [sheet, of_heads],
        joined,
    )


def _follows_widths(splits: Sequence[Split], evaluation: Record) -> bool:
    """Tell whether labels have followed the width of heads all along."""
    merged = any(note.why == TWO_KINDS for note in evaluation.unprunable)
    return not merged and all(split.followed == split.site.axes - 1 for split in splits)


def _following(known: Known, which: Which, splits: Sequence[Split]) -> Known:
    """Return what is known, with the axes that labels follow where channels of attention are split."""
    behind = 1 if which is Which.WIDTHS else 2
    axes = {split.site: split.site.axes - behind for split in splits}
    shrinking_axis = {**known.shrinking_axis, **axes}
    return replace(known, shrinking_axis=shrinking_axis, sheet=which)


def _split_into_heads(forward: Forward, evaluation: Record) -> list[Split]:
    """Return the places that split channels of attention into several axes."""
    if not evaluation.splits:
        return []
    count = forward.labelled.count
    component_of = components(count, TiedPairs.of(evaluation.ties))
    is_of_attention = of_attention(component_of, evaluation)
    return [split for split in evaluation.splits if is_of_attention[component_of[split.labels.numpy()]].any()]


def _put_together(search: Search, sheets: Sequence[Sheet], joined: Record) -> _Seen:
    """Return what is known from one or two sheets, the first of which has been tried out last."""
    sheet, *others = sheets
    groups = sheet.grouping.groups
    for number, other in enumerate(others, start=1):
        groups, names = joined_groups(sheet.grouping, other)
        sheets = [*sheets[:number], replace(other, names=names)]
    name_the_rest(
        search.forward,
        sheet.grouping,
        groups,
        joined,
    )
    return _Seen(
        groups,
        sheets,
        sheet.grouping.unprunable,
        Fitting(
            sheets,
            groups,
            search.resized,
            search.splitting,
        ).adaptations(),
        search.untraced,
        search.frozen,
    )
