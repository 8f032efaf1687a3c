"""``lightning-prune profile CKPT``: how long a network takes at any widths in ONNX Runtime, here or elsewhere."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_prune.export.latency_table import measure_pack

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-prune profile``.

    Args:
        arguments: The command line after ``profile``.
    """
    given = _parser().parse_args(arguments)
    try:
        if given.source.suffix == ".zip":
            table = measure_pack(given.source, given.threads, given.runs)
        elif given.pack is not None:
            _pack(given.source, given.pack, given)
            print(f"Written to {given.pack}: there, run `lightning-prune profile {given.pack.name} > table.json`")
            return
        else:
            table = _measured(given)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(str(error))
    print(json.dumps(table))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-prune profile",
        description="Print a table of how long a network takes at random widths, which budgets of latency go by: "
        "PruningCallback(metric='latency', runtime='table.json'). For another machine, --pack writes what it is to "
        "time; there, neither the code of the network nor Lightning is needed.",
    )
    parser.add_argument("source", type=Path, help="checkpoint, or a pack (.zip) that was written by --pack")
    parser.add_argument("--pack", type=Path, metavar="OUT.zip", help="write a pack in place of timing here")
    parser.add_argument("--runtime", choices=["onnxruntime"], default="onnxruntime", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=20, help="timed runs of each network (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=32, help="networks at random widths (default: %(default)s)")
    # As in the other commands; the module that adds them there needs torch, and what it loads Lightning.
    parser.add_argument("--model", metavar="CLASS_PATH", help="import path of the LightningModule, if it is not found")
    parser.add_argument("--import", dest="modules", nargs="+", default=[], metavar="MODULE", help="modules it names")
    parser.add_argument("--input_shape", type=int, nargs="+", metavar="N", help="shape of the input with its batch")
    return parser


def _measured(given: argparse.Namespace) -> dict[str, Any]:
    with TemporaryDirectory(prefix="lightning-prune-") as folder:
        pack = Path(folder, "pack.zip")
        _pack(given.source, pack, given)
        return measure_pack(pack, given.threads, given.runs)


def _pack(checkpoint: Path, pack: Path, given: argparse.Namespace) -> None:
    from lightning_prune.cli.benchmark import original_of
    from lightning_prune.cli.loading import load_given
    from lightning_prune.export.latency_pack import write_pack
    from lightning_prune.graph import trace
    from lightning_prune.pruning_plan import plan_in_force

    loaded = load_given(checkpoint, given)
    model = loaded.model if plan_in_force(loaded.model) is None else original_of(loaded.model)
    write_pack(trace(model, loaded.inputs), pack, given.samples)
