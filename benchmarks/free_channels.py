"""Count the channels that can be pruned in networks that were not written for it, and prune each at random.

For each network: the share of channels that can be pruned so that pruning equals masking, of those that can be pruned
otherwise, and why the others cannot. What is an output of the network, or is not used by it, is left out. All groups
are pruned at random, and the network is run (is it broken?); all mask-exact ones are pruned again and compared with the
masked twin in float64 (at most 1e-9 apart, relative). Beside it, the share of channels that Torch-Pruning takes out
when it is asked for half of all, times two, or what it raises.

Networks come from packages in an environment of their own::

    python -m venv free && free/bin/pip install -e .[benchmark] timm segmentation-models-pytorch transformers \
        ultralytics monai diffusers torchaudio
    free/bin/python benchmarks/free_channels.py [--results benchmarks/results/free_channels.json] [families ...]

Each network has a process of its own, which is ended if it hangs. A run that is stopped goes on where it was. The page
is written beside the file, with a column for what an earlier engine left free, if there is a file of that: it is made
with that engine on ``PYTHONPATH`` and ``--shares_alone``, and given as ``--before``. Networks that only run in single
precision are compared in that, up to 1e-4. A network that is further apart is not called wrong if one rounding of its
weights moves the outputs of the pruned network alone at least a tenth as far; that is noted beside it.
"""

import argparse
import copy
import multiprocessing
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import stored
import torch
from free_networks import FAMILIES, Built
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from masked_twin import distance, draw_pruned, judge, outputs_of, pruned_copy

import lightning_prune as lp
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning.cost import CostModel

RESULTS = Path(__file__).parent / "results" / "free_channels.json"
PATIENCE = 120  # seconds of processor time for each network
PATIENCE_WITH_OTHERS = 10
LONGEST = (
    1800  # seconds after which a process is ended, for what takes no processor time or does not let itself be told
)
LARGE = 40_000_000  # parameters of networks that are not judged in float64
LIMIT, LIMIT_IN_SINGLE = 1e-9, 1e-4
LOOSEST = 100  # times the limit, which nothing excuses
BEFORE = Path(__file__).parent / "results" / "free_channels_before.json"
OUTPUT = "is an output of the network"
UNUSED = "is used by no operator of the forward pass in evaluation mode"
COLUMNS = [
    "network", "parameters (M)", "free before", "trace (s)", "mask-exact", "not mask-exact", "unprunable",
    "why most are", "masked - pruned", "Torch-Pruning",
]  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError in a block that takes too much processor time."""

    def expire(number: int, frame: object) -> None:
        raise TimeoutError(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGPROF, expire)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def examined_apart(build: Callable[[], Built], shares_alone: bool) -> dict[str, Any]:
    """Return the record of a network that is examined in a process of its own."""
    context = multiprocessing.get_context("fork")  # which has imported what the others need
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sending.send(examined(build, shares_alone)))
    process.start()
    sending.close()
    try:
        if receiving.poll(LONGEST):
            return receiving.recv()
        return {"wrong": f"TimeoutError: is not done after {LONGEST} s"}
    except EOFError:
        return {"wrong": "its process died"}
    finally:
        process.kill()
        process.join()


def examined(build: Callable[[], Built], shares_alone: bool) -> dict[str, Any]:
    """Return the record of a network, or what is raised."""
    torch.manual_seed(0)
    record: dict[str, Any] = {}
    try:
        with at_most(PATIENCE):
            model, inputs = build()
            model = model.eval()
            record["params"] = sum(parameter.numel() for parameter in model.parameters())
            start = time.process_time()
            graph = lp.trace(model, inputs)
            record["trace"] = time.process_time() - start
            record |= {**shares(graph), "wrong": "", "apart": None}
            if shares_alone:
                return record
            record |= judged(model, graph, inputs)
    except Exception as raised:
        record["wrong"] = f"{type(raised).__name__}: {raised}".splitlines()[0][:160]
        return record
    record["theirs"] = theirs(build)
    return record


def shares(graph: ChannelGraph) -> dict[str, Any]:
    """Return the share of channels of each kind, of all but the outputs of the network."""
    free = CostModel(graph, "channels").original
    of_exact = sum(group.channels for group in graph.groups.values() if group.mask_exact)
    of_all = sum(group.channels for group in graph.groups.values())
    exact = free * of_exact / max(of_all, 1)
    why: Counter[str] = Counter()
    for unprunable in graph.unprunable.values():
        reason = unprunable.reason.partition(": ")[2].partition(" (")[0]
        why[reason] += unprunable.channels
    outputs = why.pop(OUTPUT, 0)
    why.pop(UNUSED, None)
    total = max(free + why.total(), 1)
    return {
        "exact": exact / total,
        "inexact": (free - exact) / total,
        "unprunable": why.total() / total,
        "outputs": outputs,
        "why": {reason: channels / total for reason, channels in why.most_common(3)},
    }


@torch.no_grad()
def judged(model: nn.Module, graph: ChannelGraph, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Prune all groups at random, and compare the mask-exact ones with their masked twin."""
    original = outputs_of(model, inputs)
    smaller = outputs_of(pruned_copy(model, graph, draw_pruned(graph, list(graph.groups))), inputs)
    if of_other_shapes(original, smaller):
        return {"wrong": "outputs of other shapes"}
    if sum(parameter.numel() for parameter in model.parameters()) > LARGE:
        return {}
    in_double = copy.deepcopy(model).double(), torch.utils._pytree.tree_map(_in_double, inputs)
    try:
        return compared(*in_double, graph, LIMIT)
    except RuntimeError as raised:
        if "scalar type" not in str(raised):
            raise
    return compared(model, inputs, graph, LIMIT_IN_SINGLE)


def of_other_shapes(original: list[torch.Tensor], smaller: list[torch.Tensor]) -> bool:
    """Tell whether outputs have other shapes, but for how many boxes are found: as many as there are scores of them."""
    pairs = list(zip(original, smaller, strict=False))
    found = {(x.shape[:1], y.shape[:1]) for x, y in pairs if y.dim() in (1, 2)}
    for x, y in pairs:
        is_found = (x.shape[:1], y.shape[:1]) in found and x.shape[1:] == y.shape[1:]
        if y.dim() > 2 and x.shape != y.shape and not is_found:
            return True
    return False


def compared(model: nn.Module, inputs: tuple[Any, ...], graph: ChannelGraph, limit: float) -> dict[str, Any]:
    """Compare a network without random channels of its mask-exact groups with its masked twin."""
    pruned = draw_pruned(graph)
    found = judge(model, graph, pruned, inputs)
    if found.apart <= limit:
        return {"apart": found.apart, "wrong": ""}
    rounded = apart_by_rounding(pruned_copy(model, graph, pruned), inputs)
    is_rounding = found.apart <= min(10 * rounded, LOOSEST * limit)
    return {"apart": found.apart, "rounded": rounded, "wrong": "" if is_rounding else "falsely mask-exact"}


@torch.no_grad()
def apart_by_rounding(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Return how far the outputs of a network move, relative to the largest, when each of its weights is rounded once.

    A network that lets numbers grow and takes their difference moves by far more than one rounding.
    """
    before = outputs_of(model, inputs)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            rounding = torch.finfo(parameter.dtype).eps * torch.randint(-1, 2, parameter.shape)
            parameter.mul_(1 + rounding.to(parameter.dtype))
    return distance(before, outputs_of(model, inputs))


def _in_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def theirs(build: Callable[[], Built]) -> Any:
    """Return the share of channels that Torch-Pruning can prune, or what is raised."""
    try:
        with at_most(PATIENCE_WITH_OTHERS):
            torch.manual_seed(0)
            model, inputs = build()
            return taken_out(model.eval(), inputs)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}".splitlines()[0][:80]


def taken_out(model: nn.Module, inputs: tuple[Any, ...], **settings: Any) -> float:
    """Return twice the share of channels that Torch-Pruning takes out of a network when it is asked for half of all."""
    import torch_pruning

    before = channels_of(model)
    importance = torch_pruning.importance.MagnitudeImportance(p=1)
    pruner = torch_pruning.pruner.BasePruner(model, inputs, importance=importance, pruning_ratio=0.5, **settings)
    pruner.step()
    model(*inputs)
    return 2 * (1 - channels_of(model) / before)


def channels_of(model: nn.Module) -> int:
    """Count the channels that convolutions and linear layers produce."""
    count = 0
    for module in model.modules():
        count += getattr(module, "out_channels", 0) if hasattr(module, "kernel_size") else 0
        count += module.out_features if isinstance(module, nn.Linear) else 0
    return count


# -- the page ----------------------------------------------------------------------------------------------------------


def page(records: dict[str, Any], before: dict[str, Any]) -> str:
    """Return a table of the families, and one of the networks of each."""
    by_family: dict[str, dict[str, Any]] = {}
    for key, record in records.items():
        family, _, name = key.partition(" | ")
        by_family.setdefault(family, {})[name] = {**record, "before": before.get(key, {})}
    lines = ["# Free channels", "", "| family | networks | mean before | mean | smallest | wrong |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [_family(family, networks) for family, networks in by_family.items()]
    for family, networks in by_family.items():
        lines += ["", f"## {family}", "", HEAD]
        lines += [_row(name, record) for name, record in networks.items()]
    return "\n".join(lines) + "\n"


def _family(family: str, networks: dict[str, Any]) -> str:
    free, before = [], []
    for record in networks.values():
        free += free_of(record)
        before += free_of(record["before"])
    wrong = sum(1 for record in networks.values() if record["wrong"])
    mean, least = (f"{statistics.mean(free):.2f}", f"{min(free):.2f}") if free else ("-", "-")
    earlier = f"{statistics.mean(before):.2f} of {len(before)}" if before else "-"
    return f"| {family} | {len(networks)} | {earlier} | {mean} | {least} | {wrong} |"


def free_of(record: dict[str, Any]) -> list[float]:
    """Return the share of channels that can be pruned, if the network was traced."""
    return [record["exact"] + record["inexact"]] if "exact" in record else []


def _row(name: str, record: dict[str, Any]) -> str:
    other = record.get("theirs", "-")
    if isinstance(other, float):
        other = f"{other:.2f}"
    if "exact" not in record:
        return f"| {name} | - | - | - | - | - | - | {record['wrong']} | - | {other} |"
    why = "; ".join(f"{reason} {share:.2f}" for reason, share in record["why"].items())
    apart = "-" if record["apart"] is None else f"{record['apart']:.0e}"
    if "rounded" in record:
        apart += f" (one rounding: {record['rounded']:.0e})"
    apart = f"{record['wrong']} ({apart})" if record["wrong"] else apart
    cells = [f"{record[kind]:.2f}" for kind in ("exact", "inexact", "unprunable")]
    params = f"{record['params'] / 1e6:.1f}"
    earlier = "".join(f"{share:.2f}" for share in free_of(record.get("before", {}))) or "-"
    shown = [name, params, earlier, f"{record['trace']:.1f}", *cells, why, apart, str(other)]
    return f"| {' | '.join(shown)} |".replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--before", type=Path, default=BEFORE, help="what an earlier engine left free")
    parser.add_argument("--again", nargs="+", default=[], help="networks to examine again, and no others")
    parser.add_argument("--shares_alone", action="store_true", help="prune nothing, as for an earlier engine")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lp.trace(nn.Linear(2, 2), torch.zeros(1, 2))  # what is imported on first use
    results = stored.load(settings.results)
    for family in settings.families:
        for name, build in FAMILIES[family]():
            key = f"{family} | {name}"
            if name in settings.again or not (settings.again or key in results):
                results[key] = examined_apart(build, settings.shares_alone)
                stored.save(settings.results, results)
                print(_row(key, results[key]), flush=True)
    stored.save(settings.results, results)
    stored.save_page(settings.results, page(results, stored.load(settings.before)))


if __name__ == "__main__":
    main()
