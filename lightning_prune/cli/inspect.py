"""``lightning-prune inspect --config FILE``: what can be pruned in the model of a config, and what it costs."""

import sys
from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_prune.cli.training import PruneCLI, parsed
from lightning_prune.graph import trace
from lightning_prune.reporting.flops import flop_table
from lightning_prune.reporting.inspect import describe

__all__ = ["main"]


class _InspectCLI(PruneCLI):
    """The options of training, and one more."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--verbose", action="store_true", help="also print the FLOPs of each layer, by fvcore")


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-prune inspect``.

    Args:
        arguments: The command line after ``inspect``.
    """
    sys.argv[1:] = arguments  # LightningCLI warns where these are others than it is given
    cli = parsed(_InspectCLI, arguments, run=False)
    inputs = cli.model.example_input_array
    if inputs is None:
        sys.exit(f"{type(cli.model).__name__} has no example_input_array; set it to what its forward takes.")
    print(describe(trace(cli.model, inputs)))
    if cli.config.verbose:
        print()
        print(flop_table(cli.model, inputs))
