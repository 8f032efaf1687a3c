"""Published weights, loaded into a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

from lightning_prune.models.registry import TORCHVISION_PREFIX

# Names under which training scripts store the state_dict in a larger dictionary, and prefixes that wrappers
# (DataParallel, a LightningModule) put before every key.
CONTAINERS = ("state_dict", "model")
PREFIXES = ("module.", "model.", "network.")
# What the same layers of residual networks are called in one collection of checkpoints and in another.
SYNONYMS = {"fc": "linear", "linear": "fc", "downsample": "shortcut", "shortcut": "downsample"}
NAMED_KEYS = 3


def load_pretrained(network: nn.Module, name: str, weights: str, new_head: str = "") -> nn.Module:
    """Load the weights that torchvision publishes under a name, or those of a file.

    Args:
        network: The network, changed in place; unchanged where the weights do not fit.
        name: What the network was built by, as for :func:`lightning_prune.models.build_network`.
        weights: The file; for ``torchvision/<name>`` also "IMAGENET1K_V1", "DEFAULT" and so on, which torchvision
            downloads where its cache does not have them.
        new_head: Dotted name of a module that keeps the weights it has.

    Returns:
        The same network.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the weights do not fit the network.
        ConnectionError: If the weights cannot be downloaded; says which file goes where.
    """
    if not name.startswith(TORCHVISION_PREFIX):
        return load_weights(network, weights, new_head)
    torchvision_name = name.removeprefix(TORCHVISION_PREFIX)
    published = torchvision_models.get_model_weights(torchvision_name).__members__
    if weights not in published:
        return load_weights(network, weights, new_head)
    try:
        # Built by torchvision, which knows how to bring older files into today's names.
        trained = torchvision_models.get_model(torchvision_name, weights=weights)
    except OSError as error:
        url = published[weights].url
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ConnectionError(
            f"The weights {weights!r} of {name!r} cannot be downloaded ({error}): put the file {url} into "
            f"{str(folder)!r}, or give `weights` the path of a file."
        ) from error
    return _load(network, trained.state_dict(), f"Weights {weights!r} of {name!r}", new_head)


def load_weights(network: nn.Module, path: str | Path, new_head: str = "") -> nn.Module:
    """Load a published state_dict file into a network, all of it or nothing.

    The file may be a plain state_dict, a dictionary that has one under "state_dict" or "model", or a Lightning
    checkpoint; key prefixes "module.", "model." and "network." are dropped, and the layers of residual networks may be
    named "fc" or "linear", "downsample" or "shortcut". It is read with ``weights_only=True``.

    Args:
        network: The network, changed in place; unchanged where the file does not fit.
        path: The file.
        new_head: Dotted name of a module that keeps the weights it has, such as a classifier for other classes.

    Returns:
        The same network.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has no state_dict, or one whose keys or shapes do not fit the network.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from lightning_prune.models import load_weights
        >>> trained = nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     published = {f"module.{name}": value for name, value in trained.state_dict().items()}
        ...     torch.save({"state_dict": published}, f"{folder}/trained.th")
        ...     network = load_weights(nn.Linear(2, 1), f"{folder}/trained.th")
        >>> torch.equal(network.weight, trained.weight)
        True
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weights file {str(path)!r}: correct the path given as `weights`.")
    state = _read(path)
    return _load(network, state, f"Weights file {str(path)!r}", new_head)


def _load(network: nn.Module, state: Mapping[str, Any], source: str, new_head: str) -> nn.Module:
    expected = network.state_dict()
    state = _unwrap(state, expected)
    if new_head:
        state = _without(state, new_head)
        expected = _without(expected, new_head)
    problems = _problems(state, expected)
    if problems:
        raise ValueError(
            f"{source} does not fit {type(network).__name__} ({problems}): use the network and the number of classes "
            "that it was made with, or give the network a new head with `transfer`."
        )
    network.load_state_dict(state, strict=False)
    return network


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # What a damaged file raises depends on the byte at which reading stumbles: UnpicklingError, EOFError,
    # struct.error, KeyError, IndexError, RuntimeError and more have been seen.
    except Exception as error:
        raise ValueError(
            f"Weights file {str(path)!r} cannot be read as tensors only: it is damaged, no PyTorch file, or a pickled "
            "module; save the state_dict of the network instead."
        ) from error
    for container in CONTAINERS:
        inside = content.get(container) if isinstance(content, Mapping) else None
        if isinstance(inside, Mapping):
            content = inside
    values = content.values() if isinstance(content, Mapping) else []
    if not any(isinstance(value, Tensor) for value in values):
        raise ValueError(f"Weights file {str(path)!r} has no state_dict: save network.state_dict() into it.")
    return content


def _unwrap(state: Mapping[str, Any], expected: Mapping[str, Tensor]) -> dict[str, Any]:
    """Drop prefixes that wrappers put before every key, and call layers what the network calls them."""
    state = dict(state)
    # As soon as one key fits, prefixes belong to the network itself.
    while not any(key in expected for key in state):
        prefix = _common_prefix(state)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {_expected_name(key, expected): value for key, value in state.items()}


def _common_prefix(state: Mapping[str, Any]) -> str | None:
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            return prefix
    return None


def _expected_name(key: str, expected: Mapping[str, Tensor]) -> str:
    if key in expected:
        return key
    names = [SYNONYMS.get(name, name) for name in key.split(".")]
    renamed = ".".join(names)
    return renamed if renamed in expected else key


def _without(state: Mapping[str, Any], module: str) -> dict[str, Any]:
    prefix = f"{module}."
    return {key: value for key, value in state.items() if not key.startswith(prefix)}


def _problems(state: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str:
    # Files from before PyTorch 0.4.1 lack this counter, and load_state_dict starts it at 0.
    missing = [key for key in expected if key not in state]
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    problems = {
        "missing": missing,
        "unexpected": [key for key in state if key not in expected],
        "of another shape": _reshaped(state, expected),
    }
    return "; ".join(f"{kind}: {_first_few(keys)}" for kind, keys in problems.items() if keys)


def _reshaped(state: Mapping[str, Any], expected: Mapping[str, Tensor]) -> list[str]:
    reshaped = []
    for key, tensor in expected.items():
        if key not in state:
            continue
        found, wanted = _shape(state[key]), _shape(tensor)
        if found != wanted:
            reshaped.append(f"{key} {found} instead of {wanted}")
    return reshaped


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _first_few(keys: list[str]) -> str:
    named = ", ".join(keys[:NAMED_KEYS])
    unnamed = len(keys) - NAMED_KEYS
    return f"{named} and {unnamed} more" if unnamed > 0 else named
