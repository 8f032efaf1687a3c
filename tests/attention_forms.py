"""Attention as people write it, each form a small module whose stream, heads and widths are all of unlike size."""

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, WIDTH_OF_HEAD = 20, 6, 4
INNER = HEADS * WIDTH_OF_HEAD


class Form(nn.Module):
    """Projects to queries, keys and values, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH_OF_HEAD
        self.inner = INNER
        self.scale = WIDTH_OF_HEAD**-0.5
        self.q, self.k, self.v = (nn.Linear(WIDTH, INNER) for _ in range(3))
        self.proj = nn.Linear(INNER, WIDTH)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return self.merge((q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v)


class Scaled(Form):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return self.merge(functional.scaled_dot_product_attention(q, k, v))


class ScaledByNumber(Form):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return self.merge(functional.scaled_dot_product_attention(q, k, v, scale=self.scale))


class ScaledInForward(Form):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return self.merge((q @ k.transpose(-2, -1) / self.head_dim**0.5).softmax(-1) @ v)


class AnyNumberOfHeads(Form):
    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class AnyWidth(Form):
    def split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, -1).permute(0, 2, 1, 3)


class Literal(Form):
    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], 6, 4).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(1, 2).reshape(len(x), -1, 24))


class Unflattened(Form):
    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


class Fused(nn.Module):
    """One layer for all three, reshaped, as in timm; ``dim`` is the width of the stream and of all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.dim = HEADS, INNER
        self.scale = WIDTH_OF_HEAD**-0.5
        self.qkv = nn.Linear(INNER, 3 * INNER)
        self.proj = nn.Linear(INNER, INNER)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(n, t, c))


class FusedScaled(Fused):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)


class FusedByIndex(Fused):
    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(n, t, c))


class ScaledByStream(Fused):
    """Computes the scale in the middle of its forward pass, by the width of the stream."""

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = self.scaled(qkv[0], c // self.num_heads), qkv[1], qkv[2]
        return self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(n, t, c))

    @staticmethod
    def scaled(q: Tensor, width: int) -> Tensor:
        return q * width**-0.5


class DividedByStream(ScaledByStream):
    @staticmethod
    def scaled(q: Tensor, width: int) -> Tensor:
        return torch.div(q, width**0.5)


class Chunked(Fused):
    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (part.reshape(n, t, self.num_heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(n, t, -1))


class SplitBySize(Fused):
    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        parts = self.qkv(x).split(self.dim, dim=2)
        q, k, v = (part.view(n, t, self.num_heads, c // self.num_heads).transpose(1, 2) for part in parts)
        return self.proj(self.attend(q, k, v).transpose(1, 2).contiguous().view(n, t, c))


class Attributes(Fused):
    """Shapes by attributes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.inner = WIDTH_OF_HEAD, INNER

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(n, t, self.inner))


class Einsum(Form):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], self.num_heads, self.head_dim) for layer in (self.q, self.k, self.v))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale).softmax(-1)
        return self.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], self.inner))


class Grouped(Form):
    """Two heads of queries for each of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = (nn.Linear(WIDTH, INNER // 2) for _ in range(2))
        self.num_kv_heads = HEADS // 2

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.split(self.q(x))
        k, v = (layer(x).view(n, t, self.num_kv_heads, self.head_dim).transpose(1, 2) for layer in (self.k, self.v))
        k, v = (one.repeat_interleave(2, dim=1) for one in (k, v))
        return self.merge((q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v)


class GroupedScaled(Grouped):
    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.split(self.q(x))
        k, v = (layer(x).view(n, t, self.num_kv_heads, self.head_dim).transpose(1, 2) for layer in (self.k, self.v))
        k, v = (one[:, :, None].expand(n, self.num_kv_heads, 2, t, self.head_dim) for one in (k, v))
        k, v = (one.reshape(n, self.num_heads, t, self.head_dim) for one in (k, v))
        return self.merge(functional.scaled_dot_product_attention(q, k, v, scale=self.scale))


class Biased(Fused):
    """Adds a bias for each head and each pair of positions, from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, HEADS))
        self.register_buffer("places", torch.arange(25).view(5, 5) % 9)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.places.view(-1)].view(5, 5, -1).permute(2, 0, 1).contiguous()
        return (q * self.scale @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1) @ v


class TalkingHeads(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * self.scale
        weights = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        return self.behind(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class Rotated(Form):
    """Turns pairs of channels by the position."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.rand(WIDTH_OF_HEAD // 2))

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), self.frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        q, k = self.rotate(q), self.rotate(k)
        return self.merge((q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v)


class Normalised(Form):
    """Divides queries and keys by their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        return self.merge((q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v)


class OfKeys(Form):
    """Takes the width of heads from the keys, and multiplies it by their number."""

    def __init__(self, heads: int = HEADS, width: int = WIDTH_OF_HEAD) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v = (nn.Linear(WIDTH, heads * width) for _ in range(3))
        self.proj = nn.Linear(heads * width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        width = k.shape[-1] // self.num_heads
        q, k, v = (one.view(x.shape[0], -1, self.num_heads, width).transpose(1, 2) for one in (q, k, v))
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(x.shape[0], -1, self.num_heads * width))


class SingleHead(Form):
    def split(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.proj((q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v)


FORMS = [
    Form, Scaled, ScaledByNumber, ScaledInForward, AnyNumberOfHeads, AnyWidth, Literal, Unflattened, Fused, FusedScaled,
    FusedByIndex, Chunked, SplitBySize, Attributes, Einsum, Grouped, GroupedScaled, Biased, TalkingHeads, Rotated,
    Normalised, OfKeys, SingleHead, ScaledByStream, DividedByStream,
]  # fmt: skip


class Network(nn.Module):
    """Attention between layers of fixed size, beside which it is added."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        width = INNER if isinstance(attention, Fused) else WIDTH
        self.embed = nn.Linear(7, width)
        self.attention = attention
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attention(x))
