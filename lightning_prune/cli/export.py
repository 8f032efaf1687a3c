"""``lightning-prune export CKPT OUT``: a checkpoint as ONNX, as a program of torch.export, or as plain weights."""

from collections.abc import Sequence
from pathlib import Path

from lightning_prune.cli.loading import add_loading_options, load_given
from lightning_prune.cli.option_errors import CommandParser
from lightning_prune.export import BATCH_SIZES, export

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-prune export``.

    Args:
        arguments: The command line after ``export``.
    """
    parser = CommandParser(
        "lightning-prune export",
        description="Export the model of a checkpoint, and check the file against the model on random inputs.",
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a pruned or an unpruned model")
    parser.add_argument(
        "out", type=Path, help="file to write: .onnx, .pt2 (torch.export), or .pt (weights; the plan goes beside it)"
    )
    parser.add_argument("--tolerance", type=float, default=1e-5, help="how far outputs may be apart (default: 1e-5)")
    add_loading_options(parser)
    given = parser.parse_args(arguments)
    loaded = load_given(given.checkpoint, given)
    apart = export(loaded.model, loaded.inputs, given.out, given.tolerance)
    sizes = ", ".join(map(str, BATCH_SIZES))
    print(f"Written to {given.out}: batches of {sizes} give the model's outputs, at most {apart:.1e} apart")
