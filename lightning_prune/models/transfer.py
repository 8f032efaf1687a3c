"""Reusing published weights for other classes: a new head on features that may be frozen at first."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Transfer:
    """Say which submodule of a network is new, and which parameters are not trained.

    Names are those within the network, without ``network.`` before them. Frozen BatchNorm layers still follow the
    statistics of the images.

    Args:
        head: Dotted name of the module that is drawn afresh, whatever the weights say of it; default the network's
            last linear layer.
        frozen: Patterns of the names of parameters that are not trained, such as ``features.*``.
        unfreeze_epoch: Epoch (counted from 0) from which on these are trained as well; default never. Pruning by the
            Taylor criterion needs gradients, so let it start at least one epoch later.

    Raises:
        ValueError: If ``unfreeze_epoch`` is below 1; when applied also if a name or a pattern fits nothing.

    Example:
        >>> from torch import nn
        >>> from lightning_prune.models import Transfer
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> transfer = Transfer(frozen=["0.*"], unfreeze_epoch=5)
        >>> transfer.head_of(network)
        '2'
        >>> transfer.freeze(network, epoch=0)
        True
        >>> [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        ['2.weight', '2.bias']
    """

    head: str = ""
    frozen: list[str] = field(default_factory=list)
    unfreeze_epoch: int | None = None

    def __post_init__(self) -> None:
        if self.unfreeze_epoch is not None and self.unfreeze_epoch < 1:
            raise ValueError(f"unfreeze_epoch={self.unfreeze_epoch} freezes nothing: set it to 1 or above.")

    def head_of(self, network: nn.Module) -> str:
        """Return the dotted name of the new head.

        Args:
            network: The network.

        Raises:
            ValueError: If there is no module of that name, or no linear layer.
        """
        modules = dict(network.named_modules())
        linear_layers = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        name = self.head
        if not name and linear_layers:
            name = linear_layers[-1]
        if name and name in modules:
            return name
        wanted = f"module {self.head!r}" if self.head else "linear layer"
        raise ValueError(f"{type(network).__name__} has no {wanted} to be the new head: name one with `head`.")

    def freeze(self, network: nn.Module, epoch: int) -> bool:
        """Freeze or unfreeze parameters as it is to be in an epoch, and tell whether that changed anything.

        Args:
            network: The network, changed in place.
            epoch: The epoch, from 0.

        Raises:
            ValueError: If a pattern fits no parameter.
        """
        is_trained = self.unfreeze_epoch is not None and epoch >= self.unfreeze_epoch
        named_parameters = dict(network.named_parameters())
        changed = False
        for pattern in self.frozen:
            names = [name for name in named_parameters if fnmatch.fnmatchcase(name, pattern)]
            if not names:
                raise ValueError(f"No parameter of {type(network).__name__} fits {pattern!r}: correct `frozen`.")
            for name in names:
                parameter = named_parameters[name]
                changed = changed or parameter.requires_grad != is_trained
                parameter.requires_grad_(is_trained)
        return changed
