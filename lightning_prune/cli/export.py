"""``lightning-prune export CKPT OUT``: a checkpoint as ONNX, as a program of torch.export, or as plain weights."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from lightning_prune.cli.loading import load_given
from lightning_prune.cli.option_errors import CommandParser
from lightning_prune.cli.project import add_project_options, load_project, without_settings
from lightning_prune.export import BATCH_SIZES, export

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-prune export``.

    Args:
        arguments: The command line after ``export``.
    """
    own, settings = without_settings(arguments)
    parser = _parser()
    given = parser.parse_args(own)
    if given.quantize is None:
        lines = [_exported(given)]
    else:
        if min(given.calibrate_batches, given.check_batches) < 1:
            parser.error("--calibrate_batches and --check_batches must be at least 1")
        lines = _quantized(given, settings)
    print("\n".join(lines))


def _parser() -> CommandParser:
    parser = CommandParser(
        "lightning-prune export",
        description="Export the model of a checkpoint, and check the file against the model on random inputs; in int8 "
        "against the float network on validation data.",
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a pruned or an unpruned model")
    parser.add_argument(
        "out", type=Path, help="file to write: .onnx, .pt2 (torch.export), or .pt (weights; the plan goes beside it)"
    )
    parser.add_argument("--tolerance", type=float, default=1e-5, help="how far outputs may be apart (default: 1e-5)")
    parser.add_argument("--quantize", choices=["int8"], help="quantise .onnx statically, with ONNX Runtime")
    parser.add_argument(
        "--calibrate_batches", type=int, default=8, metavar="N", help="batches that ranges are seen on (default: 8)"
    )
    parser.add_argument(
        "--check_batches", type=int, default=32, metavar="N", help="most other batches to compare on (default: 32)"
    )
    parser.add_argument(
        "--symmetric", action="store_true", help="signed activations around zero, as TensorRT wants them"
    )
    add_project_options(parser)
    return parser


def _exported(given: Namespace) -> str:
    loaded = load_given(given.checkpoint, given)
    apart = export(loaded.model, loaded.inputs, given.out, given.tolerance)
    sizes = ", ".join(map(str, BATCH_SIZES))
    return f"Written to {given.out}: batches of {sizes} give the model's outputs, at most {apart:.1e} apart"


def _quantized(given: Namespace, settings: Sequence[str]) -> list[str]:
    if given.out.suffix != ".onnx":
        raise ValueError(f"int8 is written as ONNX alone: end the name of {str(given.out)!r} with .onnx.")
    from lightning_prune.cli.quantizing import export_quantized  # takes seconds, which --help need not

    return export_quantized(load_project(given.checkpoint, given, settings), given)
