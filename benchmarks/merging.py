"""Merge channels by clusters instead of removing some: is what the next layer returns closer to what it was?

Model folding (Wang et al., ICLR 2025) puts the mean of a cluster of channels in the place of each of them. For every
convolution with batch normalisation whose channels a single layer consumes, alone: so many channels are kept, or as
many clusters are made by k-means (of filters as batch normalisation scales them, or of what the channels have over
images) and averaged before the activation; then the layer behind is fitted by least squares to what it returned before,
on the same images for all. Its error on other images is told, as a share of the variance of what it returned::

    python benchmarks/merging.py --root data/cifar10-jpeg --weights resnet20=resnet20.pt
        [--networks resnet20] [--seeds 3] [--table]
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import stored
import torch
from criteria_finetune import NETWORKS, Runner, add_usual, assignment, run_or_show
from finetune_rows import Batches, example_for
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp

SHARES = [0.5, 0.25]  # of the channels that are kept, or of clusters
ROUNDS = 25  # of k-means
POSITIONS = 8  # of each image
RIDGE = 1e-3
KEPT, BY_FILTERS, BY_ACTIVATIONS = "coherent OBS", "clusters of filters", "clusters of activations"


class Place:
    """A convolution, the batch normalisation behind it, and the one layer that consumes its channels."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, reader: nn.Module) -> None:
        self.conv, self.norm, self.reader = conv, norm, reader

    @torch.no_grad()
    def look(self, model: nn.Module, batches: Batches, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return windows that the reader is given once its channels are changed, and what it returned before that."""
        inputs, outputs = [], []
        for images, _ in batches:
            outputs.append(self._at_places(self._given(model, images, lambda x: x), weighed=True))
            inputs.append(self._at_places(self._given(model, images, change), weighed=False))
        return torch.cat(inputs).double(), torch.cat(outputs).double()

    def _given(self, model: nn.Module, images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        given: list[Tensor] = []
        hooks = [
            self.norm.register_forward_hook(lambda _, __, output: change(output)),
            self.reader.register_forward_pre_hook(lambda _, args: given.append(args[0])),
        ]
        model(images)
        for hook in hooks:
            hook.remove()
        return given[0]

    def _at_places(self, x: Tensor, weighed: bool) -> Tensor:
        """Return what the reader returns for its input, or its windows, at some positions: (n, numbers)."""
        if isinstance(self.reader, nn.Linear):
            return self.reader(x) if weighed else x
        taps = self.reader.kernel_size, self.reader.dilation, self.reader.padding, self.reader.stride
        seen = self.reader(x).flatten(2) if weighed else F.unfold(x, *taps)
        chosen = torch.randint(seen.shape[2], (POSITIONS,), generator=torch.Generator().manual_seed(0))
        return seen[:, :, chosen].transpose(1, 2).flatten(0, 1)

    def inputs_of(self, channels: Tensor) -> Tensor:
        """Return which columns of the windows belong to channels."""
        taps = self.reader.weight[0].numel() // self.conv.out_channels
        return (channels[:, None] * taps + torch.arange(taps)).flatten()


def places(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """Yield the places of a network by the names of their groups."""
    graph = lp.trace(model, example_for(model))
    modules = dict(model.named_modules())
    for name, group in graph.groups.items():
        made_by = {one.tensor.rpartition(".")[0] for one in group.out_slices}
        others = {one.tensor.rpartition(".")[0] for one in group.other_slices}
        readers = {one.tensor.rpartition(".")[0] for one in group.in_slices}
        if len(made_by) != 1 or len(readers) != 1 or len(others) != 1:
            continue
        conv, norm, reader = (modules[one.pop()] for one in (made_by, others, readers))
        yield name, Place(conv, norm, reader)


def clusters(features: Tensor, count: int) -> Tensor:
    """Return the cluster of each row by k-means, begun at rows far from each other, none of them empty."""
    centres = features[:1]
    while len(centres) < count:
        farthest = torch.cdist(features, centres).amin(1).argmax()
        centres = torch.cat([centres, features[farthest][None]])
    for _ in range(ROUNDS):
        nearest = torch.cdist(features, centres).argmin(1)
        for number in nearest.unique().tolist():
            centres[number] = features[nearest == number].mean(0)
    return nearest.unique(return_inverse=True)[1]


def merged(cluster: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what puts the mean of each cluster at its number."""
    share = F.one_hot(cluster).float()
    share /= share.sum(0)

    def change(x: Tensor) -> Tensor:
        means = torch.einsum("nchw,ck->nkhw", x, share)
        return torch.cat([means, torch.zeros_like(x[:, means.shape[1] :])], 1)

    return change


def features(place: Place, model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Return what clusters are made by: for each way, (channels, numbers)."""
    scale = place.norm.weight / (place.norm.running_var + place.norm.eps).sqrt()
    filters = place.conv.weight.flatten(1) * scale[:, None]
    shown: list[Tensor] = []
    hook = place.norm.register_forward_hook(lambda _, __, output: shown.append(output.detach()))
    with torch.no_grad():
        model(batches[0][0])
    hook.remove()
    return {BY_FILTERS: filters.detach(), BY_ACTIVATIONS: shown[0].transpose(0, 1).flatten(1)}


def error(place: Place, model: nn.Module, halves: tuple[Batches, Batches], channels: Tensor, change: Any) -> float:
    """Return the error of the reader on other images, once it is fitted to channels that are kept."""
    columns = place.inputs_of(channels)
    (x, y), (other_x, other_y) = ((place.look(model, half, change)) for half in halves)
    x, other_x = x[:, columns], other_x[:, columns]
    mean_x, mean_y = x.mean(0), y.mean(0)
    square = (x - mean_x).T @ (x - mean_x)
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    weight = torch.linalg.solve(square, (x - mean_x).T @ (y - mean_y))
    apart = (other_x - mean_x) @ weight + mean_y - other_y
    return float(apart.square().sum() / (other_y - other_y.mean(0)).square().sum())


def measured(runner: Runner) -> Iterator[tuple[float, dict[str, float]]]:
    """Yield, for each place and share, the error of each way."""
    model = runner.network().eval()
    batches = runner.batches()
    halves = batches[::2], batches[1::2]
    graph = lp.trace(model, example_for(model))
    scores = lp.criteria.score(graph, "coherent_obs", [images for images, _ in halves[0]])
    for name, place in places(model):
        for share in SHARES:
            count = int(share * place.conv.out_channels)
            found = {KEPT: error(place, model, halves, scores[name].topk(count).indices.sort()[0], lambda x: x)}
            for way, rows in features(place, model, halves[0]).items():
                cluster = clusters(rows, count)
                found[way] = error(place, model, halves, torch.arange(int(cluster.max()) + 1), merged(cluster))
            yield share, found


def run(settings: argparse.Namespace, results: dict[str, Any]) -> None:
    for seed in range(settings.seeds):
        for network in settings.networks:
            if f"{network}, {SHARES[-1]} | {BY_ACTIVATIONS} | {seed}" in results:
                continue
            found = list(measured(Runner(network, seed, settings)))
            for share in SHARES:
                by_place = [errors for each, errors in found if each == share]
                for way in (KEPT, BY_FILTERS, BY_ACTIVATIONS):
                    results[f"{network}, {share} | {way} | {seed}"] = {
                        "error": statistics.fmean(errors[way] for errors in by_place),
                        "nearer": statistics.fmean(errors[way] < errors[KEPT] for errors in by_place),
                        "made": stored.made_with(settings),
                    }
            stored.save(settings.results, results)


def table(results: dict[str, Any]) -> str:
    lines = ["| network, share | what stays | error of the layer behind (%) | layers where it is smaller (%) |"]
    lines += ["|---|---|---|---|"]
    for setting, rows in stored.by_setting(results).items():
        for row, seeds in rows.items():
            errors = [100 * record["error"] for record in seeds.values()]
            nearer = [100 * record["nearer"] for record in seeds.values()]
            told = "" if row == KEPT else stored.spread(nearer, 0)
            lines.append(f"| {setting} | {row} | {stored.spread(errors, 2)} | {told} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-jpeg", help="folder with train/ and test/, a folder per class")
    parser.add_argument(
        "--weights", nargs="+", type=assignment, default=[], help="published weights to start from, as network=file"
    )
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg11_bn/4"], choices=list(NETWORKS))
    parser.add_argument("--images", type=int, default=1024, help="training images, half of them to fit to")
    parser.add_argument("--seeds", type=int, default=3)
    add_usual(parser, "merging.json")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    run_or_show(settings, run, table)


if __name__ == "__main__":
    main()
