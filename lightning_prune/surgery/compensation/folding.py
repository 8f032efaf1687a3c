"""Folding: what consumed a pruned channel consumes the kept ones in its place, by one linear map a layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.substitution import named_tensors
from lightning_prune.surgery.compensation.inputs import Block
from lightning_prune.surgery.compensation.least_squares import Moments, fit_apart, set_aside
from lightning_prune.surgery.compensation.lockstep import MakeNetwork
from lightning_prune.surgery.compensation.operators import Step
from lightning_prune.surgery.compensation.runs import Watch
from lightning_prune.surgery.compensation.sampling import at_places, places_in
from lightning_prune.surgery.compensation.survey import names_of
from lightning_prune.surgery.compensation.work import Work

__all__ = ["InputMoments", "KnownMoments", "channel_map", "fold", "folded_weight", "keeping"]

Apart = tuple[Moments, Moments]
"""Of samples that are fitted to, and of those that are set aside."""

_Key = tuple[str, tuple[int, ...], bytes]

KnownMoments = dict[_Key, Apart]
"""Moments by the name of a weight and the positions of the channels that it consumes."""

Blocks = Mapping[str, Sequence[Block]]
"""The input channels of layers, by the names of their weights."""


@torch.no_grad()
def fold(work: Work, names: Sequence[str], seen: "InputMoments") -> None:
    """Fold some weights of the pruned network, by what their layers are given in the network before the prune.

    Args:
        work: What the compensation works with.
        names: Names of the weights.
        seen: What the layers are given.
    """
    blocks = {name: work.blocks(name) for name in names}
    seen.collect(blocks)
    for name in names:
        moments = [seen.of_kept(name, block) for block in blocks[name]]
        _fold_weight(work, name, blocks[name], moments)


def _fold_weight(work: Work, name: str, blocks: Sequence[Block], moments: Sequence[Apart]) -> None:
    """Fold one weight, and the means into the bias that goes with it."""
    axis = work.survey.in_axis[name]
    assert axis is not None
    intercept = work.takes_up_means(name)
    maps = []
    for block, found in zip(blocks, moments, strict=True):
        of_kept = channel_map(*found, block.kept, intercept)
        maps.append(of_kept)
    weight = work.with_kept_outputs(name)
    kept = work.kept_along(name, axis)
    folded = folded_weight(weight, axis, kept, blocks, maps)
    uncompensated = work.tensors[name]
    work.uncompensated[name] = uncompensated.detach().clone()
    work.write(uncompensated, folded)
    bias = work.bias_taking_means(name)
    if bias is None:
        return
    constant = bias.double()
    fitted_to = [found for found, _ in moments]
    for block, seen, of_kept in zip(blocks, fitted_to, maps, strict=True):
        unexplained = seen.mean_y - of_kept @ seen.mean_x  # (channels,)
        taps = _taps(weight, axis)
        consumed = taps[:, block.positions].double()
        by_channel = consumed.sum((2, 3))
        constant = constant + by_channel @ unexplained
    work.write(bias, constant)


class InputMoments:
    """Moments of the channels that layers consume in the network before the prune: the same for every plan.

    Args:
        model: The network.
        make: Makes the network that is run.
        batches: The batches.
        known: What others have collected of the same network and batches, to which more is added.
    """

    def __init__(
        self, model: nn.Module, make: MakeNetwork, batches: Iterable[Any], known: KnownMoments | None = None
    ) -> None:
        self._tensors = named_tensors(model)
        self._make = make
        self._batches = batches
        self._found: KnownMoments = {} if known is None else known
        self._new: KnownMoments = {}  # of this pass
        self._earlier = 0  # samples, in batches before
        self._samples = 0  # in this one

    def collect(self, blocks: Blocks) -> None:
        """Run the batches once, if anything is not known yet of some channels.

        Args:
            blocks: The channels.
        """
        unknown = {}
        for name, of_name in blocks.items():
            new = [block for block in of_name if _key(name, block) not in self._found]
            if new:
                unknown[name] = new
        if not unknown:
            return

        def note(name: str, step: Step, proceed: Callable[[], Any]) -> Any:
            if name in unknown:
                self._add(name, step.x, unknown[name])
            return proceed()

        run = self._make(self._tensors, None)
        self._new = {}
        self._earlier = 0
        with Watch(names_of(self._tensors), note):
            for batch in self._batches:
                self._samples = 0
                run(batch)
                self._earlier += self._samples
        self._found.update(self._new)  # all of them, or none where a pass has failed

    def of_kept(self, name: str, block: Block) -> Apart:
        """Return the moments of the kept channels, and with these of all.

        Args:
            name: Name of a weight.
            block: Channels that it consumes, which have been collected.
        """
        seen, aside = self._found[_key(name, block)]
        kept = block.kept.to(seen.x.device)
        return seen.of_some(kept), aside.of_some(kept)

    def _add(self, name: str, x: Tensor, blocks: Sequence[Block]) -> None:
        self._samples = max(self._samples, len(x))
        places = places_in(x, x.shape[1], share=1, seed=0)
        inputs = at_places(x, places)
        is_aside = set_aside(places.sample + self._earlier)
        for block in blocks:
            channels = block.rows(inputs)
            nothing = channels[:, :0]
            key = _key(name, block)
            if key not in self._new:
                like = Moments.like(channels, nothing)
                self._new[key] = (like, like.empty())
            parts = is_aside.repeat_interleave(len(channels) // len(is_aside))
            for part, some in zip((~parts, parts), self._new[key], strict=True):
                some.add(channels[part], nothing[part])


def _key(name: str, block: Block) -> _Key:
    """Return what tells the channels of a block from others, whichever of them are kept."""
    positions = block.positions.cpu().contiguous()
    return name, tuple(positions.shape), positions.numpy().tobytes()


def channel_map(moments: Moments, aside: Moments, kept: Tensor, intercept: bool) -> Tensor:
    """Return the map from the kept channels to all that fits moments: (channels, kept channels) float64.

    Args:
        moments: Of the kept channels, and with these of all.
        aside: The same of samples that are set aside where there are few; they are joined otherwise.
        kept: (kept channels,) int64.
        intercept: Whether something behind takes up a constant.
    """
    channels = len(moments.yx)
    prior = keeping(kept.to(moments.yx.device), channels)
    return fit_apart(moments, aside, prior, intercept)


def keeping(kept: Tensor, channels: int) -> Tensor:
    """Return the map that leaves kept channels as they are: (channels, kept channels) float64.

    Args:
        kept: (kept channels,) int64.
        channels: How many there are.
    """
    every = torch.eye(channels, dtype=torch.float64, device=kept.device)
    return every[:, kept]


def folded_weight(weight: Tensor, axis: int, kept: Tensor, blocks: Sequence[Block], maps: Sequence[Tensor]) -> Tensor:
    """Return a weight, shorter along the axis of its inputs, that consumes the kept channels as it consumed all.

    Args:
        weight: The weight before the prune, less the outputs that are pruned.
        axis: The axis along which it consumes channels.
        kept: (n,) int64 positions of that axis that are kept.
        blocks: The channels that lie there.
        maps: What `channel_map` returned for each of them.
    """
    taps = _taps(weight, axis)
    folded = taps.index_select(1, kept)
    for block, of_kept in zip(blocks, maps, strict=True):
        consumed = taps[:, block.positions]  # (out_channels, channels, positions of a channel, taps)
        shares = of_kept.to(weight.dtype)
        positions = block.kept_positions_in(kept)
        folded[:, positions] = torch.einsum("ocwt,ck->okwt", consumed, shares)
    inputs_second = weight.movedim(axis, 1)
    shape = list(inputs_second.shape)
    shape[1] = len(kept)
    inputs_second = folded.reshape(shape)
    return inputs_second.movedim(1, axis)


def _taps(weight: Tensor, axis: int) -> Tensor:
    """Bring a weight into the form (out_channels, in_channels, taps)."""
    inputs_second = weight.movedim(axis, 1)
    if weight.dim() == 2:
        return inputs_second[:, :, None]
    return inputs_second.flatten(2)
