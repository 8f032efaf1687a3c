"""Multi-head attention whose heads, their widths and the stream have nothing to do with each other's numbers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FreeMultiheadAttention", "free", "sync_attention", "sync_encoder", "sync_encoder_layer"]

_ATTENTION = nn.MultiheadAttention
_NESTED_BEFORE = "_use_nested_tensor_before"


class FreeMultiheadAttention(nn.MultiheadAttention):
    """Do what `torch.nn.MultiheadAttention` does, with any number of heads of any width.

    PyTorch's own function takes the width of the stream for that of all heads together. One that has fewer heads, or
    narrower ones, is of this class instead: the same tensors under the same names, and the same arguments. It is
    made by `lightning_prune.prune`, and by loading what that has made; nobody calls its constructor. Scores are scaled
    by the width that heads had at first.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see `torch.nn.MultiheadAttention`."""
        is_batched = query.dim() == 3
        if query is key and key is value:
            query = key = value = self._batch_first(query)
        else:
            query, key, value = (self._batch_first(x) for x in (query, key, value))
        q, k, v = self._projected(
            query,
            key,
            value,
        )
        mask = self._mask(
            attn_mask,
            key_padding_mask,
            q,
            is_batched,
        )
        k, v, mask = self._with_additions(
            k,
            v,
            mask,
        )
        heads = tuple(x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        is_causal = is_causal and key_padding_mask is None and not need_weights
        attended, weights = self._attend(
            heads,
            None if is_causal else mask,
            is_causal,
            need_weights,
        )
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _batch_first(self, x: Tensor) -> Tensor:
        """Return (batch, positions, width)."""
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> list[Tensor]:
        """Return queries, keys and values of all heads: (batch, positions, heads * width of one) each."""
        rows = self._rows()
        if self.in_proj_weight is not None and query is key and key is value:
            joined = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
            return list(joined.split(rows, dim=-1))
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split(rows)
        biases: Any = (None, None, None)
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.split(rows)
        return list(
            map(
                functional.linear,
                (query, key, value),
                weights,
                biases,
            )
        )

    def _rows(self) -> list[int]:
        """Return how many rows queries, keys and values have in the weights that are one."""
        of_values = self.out_proj.weight.shape[1]
        if self.in_proj_weight is None:
            of_keys = self.q_proj_weight.shape[0]
        else:
            of_keys = (self.in_proj_weight.shape[0] - of_values) // 2
        return [of_keys, of_keys, of_values]

    def _mask(
        self,
        mask: Tensor | None,
        padding: Tensor | None,
        q: Tensor,
        is_batched: bool,
    ) -> Tensor | None:
        """Return what is added to scores, (batch or 1, heads or 1, queries or 1, keys), if anything is."""
        masks = []
        if mask is not None:
            if mask.dim() == 3:
                masks.append(_added(mask, q).unflatten(0, (len(q), -1)))
            else:
                masks.append(_added(mask, q)[None, None])
        if padding is not None:
            if not is_batched:
                padding = padding.unsqueeze(0)
            masks.append(_added(padding, q)[:, None, None])
        if not masks:
            return None
        return masks[0] if len(masks) == 1 else masks[0] + masks[1]

    def _with_additions(
        self,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add the positions that the settings ask for behind the keys and values."""
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = _lengthened(k, self.bias_k)
            v = _lengthened(v, self.bias_v)
            added += 1
        if self.add_zero_attn:
            k = functional.pad(k, (0, 0, 0, 1))
            v = functional.pad(v, (0, 0, 0, 1))
            added += 1
        if mask is not None and added:
            mask = functional.pad(mask, (0, added))
        return k, v, mask

    def _attend(
        self,
        heads: tuple[Tensor, ...],
        mask: Tensor | None,
        is_causal: bool,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what heads attend to, (batch, heads, queries, width), and the weights if they are needed."""
        q, k, v = heads
        dropout = self.dropout if self.training else 0.0
        scale = self.head_dim**-0.5
        if not need_weights:
            attended = functional.scaled_dot_product_attention(
                q,
                k,
                v,
                mask,
                dropout,
                is_causal,
                scale=scale,
            )
            return attended, None
        scores = (q * scale) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask
        weights = functional.dropout(scores.softmax(dim=-1), p=dropout)
        return weights @ v, weights


def _lengthened(states: Tensor, position: Tensor) -> Tensor:
    """Add one position behind those of keys or values, the same for all samples."""
    of_samples = position.expand(len(states), -1, -1)
    return torch.cat([states, of_samples], dim=1)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as numbers that are added."""
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def free(module: nn.Module) -> None:
    """Let multi-head attention run with any number of heads of any width; nothing is done to other modules.

    Args:
        module: The module.
    """
    if type(module) is _ATTENTION:
        module.__class__ = FreeMultiheadAttention


def _set_class(module: Any, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def sync_attention(module: Any) -> None:
    """Make the size attributes of multi-head attention fit its tensors, and its class the way in which it has to run.

    Args:
        module: The module; its number of heads is right already.
    """
    output, of_values = module.out_proj.weight.shape
    if module.in_proj_weight is None:
        of_keys, module.embed_dim = module.q_proj_weight.shape
        module.kdim = module.k_proj_weight.shape[1]
        module.vdim = module.v_proj_weight.shape[1]
    else:
        of_keys = (module.in_proj_weight.shape[0] - of_values) // 2
        module.embed_dim = module.kdim = module.vdim = module.in_proj_weight.shape[1]
    widths = {of_keys, of_values, module.embed_dim, output, module.num_heads * module.head_dim}
    if type(module) is _ATTENTION and len(widths) > 1:
        _set_class(module, FreeMultiheadAttention)
        module._qkv_same_embed_dim = False  # by which encoder layers know that they cannot run it as one operator
    elif type(module) is FreeMultiheadAttention and len(widths) == 1:
        _set_class(module, _ATTENTION)
        module._qkv_same_embed_dim = module.in_proj_weight is not None


def sync_encoder_layer(layer: Any) -> None:
    """Let an encoder layer know whether it may run as one operator, which it may not without one of its blocks.

    Args:
        layer: A `torch.nn.TransformerEncoderLayer`.
    """
    activation = layer.activation
    fast = 0
    if activation is functional.relu or isinstance(activation, nn.ReLU):
        fast = 1
    elif activation is functional.gelu or isinstance(activation, nn.GELU):
        fast = 2
    is_whole = all(parameter.numel() for parameter in layer.parameters())
    layer.activation_relu_or_gelu = fast if is_whole else 0


def sync_encoder(encoder: Any) -> None:
    """Let an encoder pad nothing away unless all of its layers run as one operator, which alone takes nested tensors.

    Args:
        encoder: A `torch.nn.TransformerEncoder`, whose layers are in step already.
    """
    before = vars(encoder).setdefault(_NESTED_BEFORE, encoder.use_nested_tensor)
    encoder.use_nested_tensor = before and all(map(_runs_as_one, encoder.layers))


def _runs_as_one(layer: Any) -> bool:
    attention = getattr(layer, "self_attn", None)
    if not isinstance(attention, _ATTENTION):
        return False
    has_even_heads = attention.num_heads % 2 == 0
    return bool(attention._qkv_same_embed_dim and has_even_heads and layer.activation_relu_or_gelu)
