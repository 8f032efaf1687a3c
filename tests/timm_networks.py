"""Networks of timm, which is no dependency: drawn by a seed, one of each family, and built at a small size."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from engine import randomised
from torch import Tensor, nn

LARGEST = 100_000_000
SIZES = (64, 128, 224, 256)


def drawn(seed: int) -> Iterator[str]:
    """Yield names of networks in a random order: one of each family (a file of timm), then another one of each."""
    import timm

    chance = random.Random(seed)
    families = []
    for family in sorted(timm.list_modules()):
        members = sorted(timm.list_models(module=family))
        chance.shuffle(members)
        families.append(members)
    chance.shuffle(families)
    while any(families):
        for members in families:
            if members:
                yield members.pop()


def is_small(name: str) -> bool:
    """Tell whether a network has at most `LARGEST` parameters."""
    import timm

    try:
        with torch.device("meta"):  # where numbers cost nothing
            model = timm.create_model(name)
    except (RuntimeError, NotImplementedError):  # it looks at numbers
        model = timm.create_model(name)
    return sum(parameter.numel() for parameter in model.parameters()) <= LARGEST


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Build a network in float64, filled with random numbers, and the smallest images that it runs on."""
    import timm

    config = timm.get_pretrained_cfg(name)
    channels, own, _ = config.input_size
    for size in SIZES:
        arguments = {"img_size": size} if config.fixed_input_size else {}
        if size < own and (found := _running(name, (2, channels, size, size), arguments)):
            return found
    found = _running(name, (2, channels, own, own), {})
    assert found, f"{name} does not run"
    return found


def _running(name: str, shape: tuple[int, ...], arguments: dict[str, Any]) -> tuple[nn.Module, Tensor] | None:
    """Build a network and run it; returns None where it refuses the size."""
    import timm

    x = torch.randn(shape, dtype=torch.float64)
    try:
        model = _filled(timm.create_model(name, **arguments).double()).eval()
        with torch.no_grad():
            model(x)
    except (RuntimeError, AssertionError, ValueError, TypeError):
        return None
    return model, x


@torch.no_grad()
def _filled(model: nn.Module) -> nn.Module:
    """Fill a network with random numbers, but for its tables: of buffers, only running statistics are random."""
    tables = {}
    for name, buffer in model.named_buffers():
        if not name.endswith(("running_mean", "running_var")):
            tables[name] = buffer.clone()
    randomised(model)
    for name, buffer in model.named_buffers():
        if name in tables:
            buffer.copy_(tables[name])
    return model
