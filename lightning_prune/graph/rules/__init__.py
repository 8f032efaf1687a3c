"""Rules of operators: one table, from the name of an operator to what it does to channels.

A rule is a function of the tracer and the operator's call. It gives the output its labels (`Tracer.set_labels`) and
says

- which channels can only be pruned together (`tie`),
- which are unprunable, and why (`mark_unprunable`),
- for which pruning is not the same as masking (`mark_not_mask_exact`),
- where a weight produces channels (`mark_out_slice`) and where it consumes them (`mark_in_slice`).

Operators that work element by element share one rule and are listed beside it. Every channel that an operator without
a rule touches is unprunable: nothing is guessed.

Example:
    A rule for an operator of your own, under the name that ``torch.library`` knows it by::

        from lightning_prune.graph import rule

        @rule("mylib.swish_scale")
        def swish_scale(tracer, call):
            x = call.argument(0, "x")
            tracer.set_labels(call.output, tracer.all_labels(x))

    A rule for a whole module, by the full name of its class, and what brings its size attributes in step::

        from lightning_prune.graph import rule, size_attributes

        @rule("mylib.layers.ChannelScale")
        def channel_scale(tracer, call):
            x = call.args[0]
            tracer.tie(tracer.labels(x, 1), tracer.labels(call.operator.weight, 0), "is scaled by channel")
            tracer.set_labels(call.output, tracer.all_labels(x))

        @size_attributes("mylib.layers.ChannelScale")
        def sizes_of_channel_scale(module):
            module.channels = module.weight.shape[0]
"""

from lightning_prune.graph.rules import (  # noqa: F401  importing them fills the table
    elementwise,
    joining,
    mixing,
    normalising,
    picking,
    rearranging,
    recurring,
    reducing,
    shuffling,
    slicing,
)
from lightning_prune.graph.rules.table import RULES, rule

__all__ = ["RULES", "rule"]
