"""The one way in which the networks of this package draw their first weights."""

from __future__ import annotations

from torch import nn


def initialize_he(network: nn.Module) -> None:
    """Draw the weights of all convolutions and linear layers after He et al. 2015, and set their biases to 0.

    Convolutions keep the variance of what flows back ("fan_out"), as is usual before BatchNorm. Linear layers keep the
    variance of what flows forward ("fan_in"): a classifier has few outputs, and "fan_out" would make its first logits
    far too large.

    Args:
        network: The network, changed in place.

    Example:
        >>> from torch import nn
        >>> from lightning_prune.models.initialization import initialize_he
        >>> layer = nn.Linear(4, 2)
        >>> initialize_he(layer)
        >>> layer.bias.tolist()
        [0.0, 0.0]
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
