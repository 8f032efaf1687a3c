"""A vision transformer for small images, which trains on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 4  # pixels along either side: two convolutions of stride 2


class _Attention(nn.Module):
    """Let each token attend to all tokens, with several heads (Vaswani et al. 2017).

    The scale is that of the width that heads start with, so that narrower queries and keys give the scores that masked
    ones do; how wide heads are is read off the weights. Keys have no bias, which would change no weight of the softmax.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (width // num_heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (n, tokens, width) to the same shape."""
        query, key, value = (self._heads(layer(tokens)) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _heads(self, channels: Tensor) -> Tensor:
        """Map (n, tokens, heads * width of a head) to (n, heads, tokens, width of a head)."""
        return channels.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class _Block(nn.Module):
    """Add attention and two linear layers to what comes in, each after a LayerNorm."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (n, tokens, width) to the same shape."""
        tokens = tokens + self.attention(self.norm1(tokens))
        hidden = F.gelu(self.linear1(self.norm2(tokens)))
        return tokens + self.linear2(hidden)


class SmallImageViT(nn.Module):
    """Classify small images with a vision transformer (Dosovitskiy et al. 2021).

    Two 3x3 convolutions with stride 2 make a token of each 4x4 pixels, since a transformer trains faster and better
    behind convolutions (Xiao et al., "Early Convolutions Help Transformers See Better", 2021). The mean of all tokens
    is classified, without a token of its own.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images.
        image_size: Height and width of the images in pixels, a multiple of 4.
        width: Channels of a token, a multiple of ``num_heads``.
        depth: Number of blocks, at least 1.
        num_heads: Number of attention heads in each block.
        hidden: Channels of the hidden layer in each block.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> import torch
        >>> from lightning_prune.models import SmallImageViT
        >>> SmallImageViT(depth=2)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        width: int = 96,
        depth: int = 6,
        num_heads: int = 4,
        hidden: int = 192,
    ) -> None:
        if image_size < PATCH or image_size % PATCH:
            raise ValueError(f"image_size={image_size} cannot be cut into tokens: use a multiple of {PATCH}.")
        if num_heads < 1 or width < 1 or width % num_heads:
            raise ValueError(f"width={width} cannot be shared by {num_heads} heads: use a multiple of num_heads.")
        if depth < 1:
            raise ValueError(f"depth={depth} leaves no block: use 1 or more.")
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
        )
        tokens = (image_size // PATCH) ** 2
        self.position = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.Sequential(*(_Block(width, num_heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        """Draw small weights, as is usual for transformers."""
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, in_channels, image_size, image_size) to logits (n, num_classes)."""
        tokens = self.stem(x).flatten(2).transpose(1, 2)  # (n, tokens, width)
        tokens = self.blocks(tokens + self.position)
        return self.head(self.norm(tokens).mean(1))
