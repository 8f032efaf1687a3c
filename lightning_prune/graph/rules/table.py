"""The table of rules, and what happens to operators that are not in it."""

from collections.abc import Callable

import torch

from lightning_prune.graph.tracer import Call, Tracer

__all__ = ["RULES", "Rule", "rule"]

Rule = Callable[[Tracer, Call], None]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, or for whole modules, by name.

    What runs inside a module that has a rule says nothing about channels and costs nothing; all of that is then up to
    the rule, which finds the module as ``call.operator``, and in it its tensors with their labels.

    Args:
        operators: Names of operators such as ``"aten.convolution"``, or full names of module classes such as
            ``"mylib.layers.ChannelScale"``; what has a rule already gets the new one.

    Returns:
        A decorator that registers the function and returns it unchanged.

    Example:
        >>> @rule("mylib.identity")
        ... def identity(tracer, call):
        ...     tracer.set_labels(call.output, tracer.all_labels(call.args[0]))
        >>> RULES.pop("mylib.identity") is identity
        True
    """

    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function
        return function

    return register


@rule("unknown")
def unknown(tracer: Tracer, call: Call) -> None:
    """Keep every channel that an operator without a rule touches."""
    for labels in tracer.labels_of(torch.utils._pytree.tree_leaves((call.args, call.kwargs))):
        tracer.mark_unprunable(labels, f"runs {call.name}, which has no rule")
    for output in call.outputs:  # an input again, where that is changed in place
        tracer.set_labels(output, {})


@rule(
    "aten.size", "aten.sym_size", "aten.stride", "aten.numel", "aten.is_same_size", "aten.new_zeros", "aten.new_ones",
    "aten.new_empty", "aten.new_full", "aten.new_empty_strided",
)  # fmt: skip
def nothing(tracer: Tracer, call: Call) -> None:
    """Say nothing: the operator makes no tensor, or one whose size is given as numbers."""
