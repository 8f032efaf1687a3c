"""What each operator says about channels: one table, from an operator's name to its rule.

A rule is a function of the tracer and the call. It gives the output its labels (`Tracer.set_labels`) and says which
channels leave together (`tie`), which stay whole and why (`hold`), whose removal is not the same as zeroing them
(`inexact`), which side of a weight makes channels (`produce`) and which reads them (`read`). Operators tagged as
pointwise by PyTorch share one rule. Whatever has no rule keeps the channels it touches whole: nothing is guessed.

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

from lightning_prune.graph.rules import elementwise, mixing, moving, normalising, reducing  # noqa: F401  fill the table
from lightning_prune.graph.rules.table import RULES, rule

__all__ = ["RULES", "rule"]
