"""Options that say how a trained network is pruned, for `prune` and `plan` alike."""

from argparse import ArgumentParser, Namespace
from typing import Any

from lightning_prune.reporting.survey import ALL_BATCHES

__all__ = ["add_prune_options", "settings_of"]

_SETTINGS = (
    "metric",
    "round_to",
    "min_channels",
    "ignore",
    "compensate",
    "compensate_batches",
    "validate_batches",
    "example_inputs",
)


def add_prune_options(parser: ArgumentParser) -> None:
    """Add the options that say how channels are pruned, whatever the method and the budget."""
    parser.add_argument(
        "--metric", default="flops", help="what keep is a fraction of: flops, params, channels or latency"
    )
    parser.add_argument("--round_to", type=_number_or_auto, default=8, help="widths are multiples of this (default: 8)")
    parser.add_argument("--min_channels", type=int, default=1, help="least number of channels of a layer (default: 1)")
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="PATTERN", help="module names whose channels are not pruned"
    )
    parser.add_argument(
        "--blocks", action="store_true", help="prune whole residual blocks too, by criteria that score them"
    )
    parser.add_argument(
        "--compensate", default="auto", help="none, statistics, fold, refit, or auto, the last where it can be"
    )
    parser.add_argument(
        "--compensate_batches", type=int, default=8, help="training batches that are looked at (default: 8)"
    )
    parser.add_argument(
        "--validate_batches",
        type=int,
        default=ALL_BATCHES,
        help="most validation batches to validate on (default: all)",
    )


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def settings_of(given: Namespace) -> dict[str, Any]:
    """Return the settings of the callback that options name."""
    values = {**vars(given), "example_inputs": given.input_shape}
    settings = {name: values[name] for name in _SETTINGS}
    return {**settings, "blocks": True} if given.blocks else settings
