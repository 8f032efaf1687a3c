"""Samples of a layer: what it is given at some positions of its output, and what it returned there before the prune."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_prune.surgery.compensation.lockstep import Meeting
from lightning_prune.surgery.compensation.operators import Linear
from lightning_prune.surgery.compensation.sampling import Places, at_places, places_in
from lightning_prune.surgery.compensation.work import Work

__all__ = ["Samples", "samples_of", "with_drift"]

_SMALL = 1e-2  # times the mean factor: channels that normalisation all but mutes cannot make up for anything


@dataclass(frozen=True)
class Samples:
    """What a layer is given and is to return.

    Attributes:
        places: The samples and positions of each batch.
        windows: (n, taps, in_channels) what the pruned layer is given.
        outputs: (n, out_channels) what its kept channels are to be.
        owners: (n,) int64 the number of the sample, such as an image, among all batches.
    """

    places: list[Places]
    windows: Tensor
    outputs: Tensor
    owners: Tensor


def samples_of(work: Work, name: str, meetings: Sequence[Meeting]) -> Samples:
    """Return samples of all batches, with the outputs before the prune.

    Args:
        work: What the compensation works with.
        name: Name of the weight.
        meetings: The calls of the layer.
    """
    places = []
    windows = []
    outputs = []
    owners = []
    before = 0
    for number, meeting in enumerate(meetings):
        layer = meeting.pruned
        assert isinstance(layer, Linear)
        output = layer.shaped(meeting.output)
        inputs = layer.x.shape[1] * layer.taps
        numbers = inputs + output.shape[1]
        chosen = places_in(output, numbers, len(meetings), number)
        places.append(chosen)
        windows.append(layer.windows(chosen, output.shape[2:]))
        outputs.append(work.kept_outputs(name, meeting, at_places(output, chosen)))
        owners.append(chosen.sample + before)
        before += len(output)
    return Samples(places, torch.cat(windows), torch.cat(outputs), torch.cat(owners))


def with_drift(work: Work, name: str, meetings: Sequence[Meeting], samples: Samples) -> Samples:
    """Add to the outputs what is missing in the stream that they are added to, and note the mean of it.

    Args:
        work: What the compensation works with.
        name: Name of the weight.
        meetings: The calls of the layer.
        samples: The samples.
    """
    parts = zip(meetings, samples.places, strict=True)
    drifts = [_drift(work, name, meeting, places) for meeting, places in parts]
    known = [drift for drift in drifts if drift is not None]
    if len(known) < len(drifts):
        return samples
    drift = torch.cat(known)
    norm = work.survey.normalised.get(name)
    if norm is not None:
        factor = work.survey.norms[norm].factor(work.tensors)
        is_small = factor.abs() < _SMALL * factor.abs().mean()
        drift = torch.where(is_small, 0, drift / factor)
    if not bool(drift.any()):
        return samples
    if norm is not None:
        work.drifts[norm] = drift.double().mean(0)
    return replace(samples, outputs=samples.outputs + drift)


def _drift(work: Work, name: str, meeting: Meeting, places: Places) -> Tensor | None:
    """Return how far a stream is from what it was, at some places: (n, channels); None where nothing is known of it."""
    if meeting.stream is None:
        return None
    before, now = meeting.stream
    before = work.kept_outputs(name, meeting, before)
    if before.shape != now.shape:
        return None
    return at_places(before, places) - at_places(now, places)
