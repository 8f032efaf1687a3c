"""Table of rules by operator, and what happens to operators that are not in it."""

from collections.abc import Callable

from torch.utils._pytree import tree_leaves

from lightning_prune.graph.tracer import Call, Tracer

__all__ = ["RULES", "Rule", "plain_name", "rule"]

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


def plain_name(call: Call) -> str:
    """Return the name of an operator as people know it: ``softmax`` for ``aten._softmax``."""
    return call.name.removeprefix("aten.").lstrip("_")


@rule("unknown")
def unknown(tracer: Tracer, call: Call) -> None:
    """Make every channel unprunable that an operator without a rule is given."""
    given = tree_leaves((call.args, call.kwargs))
    why = f"runs {call.name}, which has no rule"
    for labels in tracer.labels_of(given):
        tracer.mark_unprunable(labels, why)
    for output in call.outputs:  # an operator that works in place returns its input, labels and all
        tracer.set_labels(output, {})


@rule(
    "aten.size", "aten.sym_size", "aten.stride", "aten.numel", "aten.is_same_size", "aten.equal", "aten.new_zeros",
    "aten.new_ones", "aten.new_empty", "aten.new_full", "aten.new_empty_strided",
)  # fmt: skip
def no_channels(tracer: Tracer, call: Call) -> None:
    """Give the output no labels: the operator returns no tensor, or one whose size it was given as numbers."""
