"""Size attributes: what modules write down of the shapes of their tensors, brought in step with them."""

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["class_name", "size_attributes", "sync_attributes"]

_GROUPED = "_was_grouped"


def _sync_conv(module: Any) -> None:
    first, second = module.weight.shape[:2]
    if module.groups > 1 or _GROUPED in module.__dict__:
        # Whole convolution groups leave together, so each keeps the size it had. One that is left alone would look
        # like an ordinary convolution, and could not grow back.
        module.__dict__[_GROUPED] = True
        module.groups = module.groups * first // (module.in_channels if module.transposed else module.out_channels)
    if module.transposed:
        module.in_channels, module.out_channels = first, second * module.groups
    else:
        module.in_channels, module.out_channels = second * module.groups, first


def _sync_linear(module: Any) -> None:
    module.out_features, module.in_features = module.weight.shape


def _sync_batch_norm(module: Any) -> None:
    per_channel = module.weight if module.weight is not None else module.running_mean
    if per_channel is not None:
        module.num_features = per_channel.shape[0]


def _sync_layer_norm(module: Any) -> None:
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def _sync_group_norm(module: Any) -> None:
    if module.weight is not None:
        channels = module.weight.shape[0]
        module.num_groups = module.num_groups * channels // module.num_channels
        module.num_channels = channels


def _sync_prelu(module: Any) -> None:
    module.num_parameters = module.weight.shape[0]


def _sync_embedding(module: Any) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


_SYNC: list[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[nn.Module], None]]] = [
    (nn.modules.conv._ConvNd, _sync_conv),
    (nn.Linear, _sync_linear),
    (nn.modules.batchnorm._NormBase, _sync_batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _sync_layer_norm),
    (nn.GroupNorm, _sync_group_norm),
    (nn.PReLU, _sync_prelu),
    (nn.Embedding, _sync_embedding),
]


_OWN_SYNC: dict[str, Callable[[Any], None]] = {}


def size_attributes(*classes: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function that brings the size attributes of a module class of your own in step with its tensors.

    Args:
        classes: Full names of module classes, ``"mylib.layers.ChannelScale"``.

    Returns:
        A decorator that registers the function and returns it unchanged.

    Example:
        >>> @size_attributes("mylib.layers.ChannelScale")
        ... def sizes_of_channel_scale(module):
        ...     module.channels = module.weight.shape[0]
    """

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        for name in classes:
            _OWN_SYNC[name] = function
        return function

    return register


def class_name(module: nn.Module) -> str:
    """Return the full name of the class of a module, ``"torch.nn.modules.linear.Linear"``."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def sync_attributes(module: nn.Module) -> None:
    """Make the size attributes of one module (``out_channels``, ``num_features``, ``groups`` ...) fit its tensors.

    Args:
        module: A module whose tensors may just have changed shape. Its children are not visited.

    Example:
        >>> convolution = nn.Conv2d(3, 8, 1)
        >>> convolution.weight.data = convolution.weight.data[:6]
        >>> sync_attributes(convolution)
        >>> convolution
        Conv2d(3, 6, kernel_size=(1, 1), stride=(1, 1))
    """
    own = _OWN_SYNC.get(class_name(module))
    if own is not None:
        own(module)
        return
    for kinds, sync in _SYNC:
        if isinstance(module, kinds):
            sync(module)
            return
