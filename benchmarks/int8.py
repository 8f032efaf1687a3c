"""Half the FLOPs, and int8 on top: how many times as fast networks are in torch and in ONNX Runtime.

Each network of torchvision has freshly drawn weights, is pruned to half the FLOPs by magnitude, and is run on random
images, one at a time: in torch and in ONNX Runtime, as it was and pruned, and in int8 in ONNX Runtime, all turn and
turn about on one thread. Widths are multiples of 16, since CPUs work on so many channels at once. Outputs of the int8
file are compared with those of the pruned float one. The page is written beside the file of results, which is added to
as it comes::

    python benchmarks/int8.py [--turns 9] [--results FILE] [networks ...]
"""

import argparse
import copy
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import stored
import torch
import torchvision

import lightning_prune as lp
from lightning_prune.export.onnx import open_session
from lightning_prune.export.quantizing import export_int8
from lightning_prune.export.runtimes import ready_in
from lightning_prune.planning.spread import ratios
from lightning_prune.planning.timing import median_time, times_in_turns

RESULTS = Path(__file__).parent / "results" / "int8.json"
NETWORKS = ("resnet50", "resnet18", "mobilenet_v2", "vgg11_bn")
IMAGE = (1, 3, 224, 224)
ROUND_TO = 16  # channels that kernels work on at once: blocks that are partly empty take as long as full ones
PAIRS = {
    "torch, pruned": ("torch", "torch, pruned"),
    "onnxruntime, pruned": ("onnxruntime", "onnxruntime, pruned"),
    "int8 against pruned": ("onnxruntime, pruned", "int8, pruned"),
    "int8 against original": ("onnxruntime", "int8, pruned"),
}


@torch.no_grad()
def timed(name: str, turns: int) -> dict[str, Any]:
    """Time one network in all forms; returns milliseconds of each turn, and how far the outputs of int8 are apart."""
    torch.manual_seed(0)
    original = torchvision.models.get_model(name, weights=None).eval()
    pruned = copy.deepcopy(original)
    graph = lp.trace(pruned, torch.zeros(IMAGE))
    plan = lp.plan(graph, lp.criteria.magnitude(graph), keep=0.5, round_to=ROUND_TO)
    lp.prune(pruned, plan)
    image = torch.randn(IMAGE)
    runs = {}
    with TemporaryDirectory() as folder:
        for runtime in ("torch", "onnxruntime"):
            for form, model in (("", original), (", pruned", pruned)):
                place = Path(folder, runtime + form)
                place.mkdir()
                runs[runtime + form] = ready_in(runtime, model, torch.zeros(IMAGE), place)(image)
        file = Path(folder, "int8.onnx")
        found = export_int8(pruned, [torch.randn(IMAGE) for _ in range(6)], file, calibrate=4)
        session = open_session(file)
        (entry,) = session.get_inputs()
        runs["int8, pruned"] = partial(session.run, None, {entry.name: image.numpy()})
        every = [partial(median_time, run, torch.device("cpu"), 300, 10) for run in runs.values()]
        times = dict(zip(runs, times_in_turns(every, turns), strict=True))
    return {"kept": plan.budget["achieved"], "apart": found.apart, "megabytes": found.megabytes, "ms": times}


def page(records: dict[str, Any]) -> str:
    """Return how many times as fast each form of a network is, with quartiles."""
    lines = [
        "# Half the FLOPs, and int8",
        "",
        "How many times as fast, median (quartiles) of turns: one image of 224 x 224, one thread, freshly drawn "
        "weights; widths are multiples of 16. Apart is the root mean square of the difference of outputs in int8 "
        "and in float of the pruned network.",
        "",
        f"| network | FLOPs kept | {' | '.join(PAIRS)} | apart |",
        "|---|---|" + "---|" * (len(PAIRS) + 1),
    ]
    for name, record in records.items():
        cells = [str(ratios(record["ms"][before], record["ms"][after])) for before, after in PAIRS.values()]
        lines.append(f"| {name} | {record['kept']:.3f} | {' | '.join(cells)} | {record['apart']:.3f} |")
    lines += ["", "| network | form | ms |", "|---|---|---|"]
    for name, record in records.items():
        lines += [f"| {name} | {form} | {np.median(times):.1f} |" for form, times in record["ms"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    made = stored.made_with(settings)
    runs = {name: partial(timed, name, settings.turns) for name in settings.networks}
    stored.complete_page(settings.results, runs, made, page)


if __name__ == "__main__":
    main()
