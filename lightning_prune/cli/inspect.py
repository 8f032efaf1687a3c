"""``lightning-prune inspect --config FILE``: what can be pruned in a model, what it costs, and what cannot, and why."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_prune.cli.option_errors import CommandParser
from lightning_prune.cli.project import add_network_options, load_network, without_settings
from lightning_prune.export.inputs import refuse_misfit
from lightning_prune.graph import trace
from lightning_prune.reporting.flops import flop_table
from lightning_prune.reporting.inspect import describe

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-prune inspect``.

    Args:
        arguments: The command line after ``inspect``.
    """
    parser = CommandParser(
        "lightning-prune inspect",
        description="Print which channels of a model can be pruned, which layers share them, what they cost, and what "
        "cannot be pruned and why. No data are needed.",
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="checkpoint of a model; without it, that of --config")
    parser.add_argument("--verbose", action="store_true", help="also print the FLOPs of each layer, by fvcore")
    add_network_options(parser)
    own, settings = without_settings(arguments)
    given = parser.parse_args(own)
    if given.checkpoint is None and given.config is None and given.model is None:
        raise ValueError("inspect needs a model: give a --config, a checkpoint, or --model.")
    model = load_network(given.checkpoint, given, settings)
    inputs = torch.zeros(given.input_shape) if given.input_shape else getattr(model, "example_input_array", None)
    if inputs is None:
        raise ValueError(
            f"{type(model).__name__} has no example_input_array; say what its forward takes with --input_shape, such "
            "as --input_shape 1 3 224 224."
        )
    refuse_misfit(model.eval(), inputs)
    print(describe(trace(model, inputs)))
    if given.verbose:
        print()
        print(flop_table(model, inputs))
