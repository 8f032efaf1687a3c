"""Size attributes: what modules write down of the shapes of their tensors, brought in step with them."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_prune.graph.attention import sync_attention, sync_encoder, sync_encoder_layer

__all__ = ["class_name", "has_registered_sizes", "has_size_attributes", "size_attributes", "sync_attributes"]

Sync = Callable[[Any], None]  # is given a module, whose tensors may have changed shape

_WAS_GROUPED = "_was_grouped"


def _sync_convolution(convolution: Any) -> None:
    outer, inner = convolution.weight.shape[:2]
    if convolution.groups > 1 or _WAS_GROUPED in vars(convolution):
        convolution.groups = _groups_of(convolution, outer)
    if convolution.transposed:
        convolution.in_channels = outer
        convolution.out_channels = inner * convolution.groups
    else:
        convolution.in_channels = inner * convolution.groups
        convolution.out_channels = outer


def _groups_of(convolution: Any, outer: int) -> int:
    """Return how many groups a convolution has now, each of which keeps the size that it had.

    One that keeps a single group would look like an ordinary convolution, and could not grow back; so it is noted.
    """
    vars(convolution)[_WAS_GROUPED] = True
    outer_before = convolution.in_channels if convolution.transposed else convolution.out_channels
    return convolution.groups * outer // outer_before


def _sync_linear(linear: Any) -> None:
    linear.out_features, linear.in_features = linear.weight.shape


def _sync_batch_norm(norm: Any) -> None:
    per_channel = norm.running_mean if norm.weight is None else norm.weight
    if per_channel is not None:
        norm.num_features = per_channel.shape[0]


def _sync_layer_norm(norm: Any) -> None:
    if norm.weight is not None:
        norm.normalized_shape = tuple(norm.weight.shape)


def _sync_group_norm(norm: Any) -> None:
    if norm.weight is not None:
        channels = norm.weight.shape[0]
        if norm.num_groups > 1 or _WAS_GROUPED in vars(norm):
            vars(norm)[_WAS_GROUPED] = True
            norm.num_groups = norm.num_groups * channels // norm.num_channels
        norm.num_channels = channels


def _sync_prelu(prelu: Any) -> None:
    prelu.num_parameters = prelu.weight.shape[0]


def _sync_embedding(embedding: Any) -> None:
    embedding.num_embeddings, embedding.embedding_dim = embedding.weight.shape


def _sync_bilinear(bilinear: Any) -> None:
    bilinear.out_features, bilinear.in1_features, bilinear.in2_features = bilinear.weight.shape


_GATES = {"LSTM": 4, "GRU": 3}


def _sync_recurrent(layers: Any) -> None:
    gates = _GATES.get(layers.mode, 1)
    layers.input_size = layers.weight_ih_l0.shape[1]
    layers.hidden_size = layers.weight_hh_l0.shape[0] // gates
    if layers.proj_size > 0:
        layers.proj_size = layers.weight_hr_l0.shape[0]


def _sync_recurrent_cell(cell: Any) -> None:
    cell.input_size = cell.weight_ih.shape[1]
    cell.hidden_size = cell.weight_hh.shape[1]


_ENCODERS = (nn.TransformerEncoderLayer, nn.TransformerEncoder)

# Subclasses are brought in step as their base class is.
_SYNC_BY_CLASS: dict[type[nn.Module], Sync] = {
    nn.modules.conv._ConvNd: _sync_convolution,
    nn.Linear: _sync_linear,
    nn.modules.batchnorm._NormBase: _sync_batch_norm,
    nn.LayerNorm: _sync_layer_norm,
    nn.RMSNorm: _sync_layer_norm,
    nn.GroupNorm: _sync_group_norm,
    nn.PReLU: _sync_prelu,
    nn.Embedding: _sync_embedding,
    nn.Bilinear: _sync_bilinear,
    nn.RNNBase: _sync_recurrent,
    nn.RNNCellBase: _sync_recurrent_cell,
    nn.MultiheadAttention: sync_attention,
    nn.TransformerEncoderLayer: sync_encoder_layer,
    nn.TransformerEncoder: sync_encoder,
}


def _sync_deformable(convolution: Any) -> None:
    convolution.out_channels = convolution.weight.shape[0]
    convolution.in_channels = convolution.weight.shape[1] * convolution.groups


def _sync_scale(scale: Any) -> None:
    scale.shape = (scale.scale.shape[0], *scale.shape[1:])


def _sync_resampling(layer: Any) -> None:
    for child in layer.children():
        if isinstance(child, nn.modules.conv._ConvNd):
            layer.channels = child.in_channels
            layer.out_channels = child.out_channels


def _sync_mask_generator(generator: Any) -> None:
    generator.input_dim = generator.input_conv.in_channels


def _sync_conv_tasnet(network: Any) -> None:
    network.enc_num_feats = network.encoder.out_channels


def _sync_deep_speech(network: Any) -> None:
    network.n_hidden = network.bi_rnn.hidden_size


def _sync_wave_rnn(network: Any) -> None:
    network.n_rnn = network.rnn1.hidden_size


# By full name: what would take long to import, and users' own.
_SYNC_BY_CLASS_NAME: dict[str, Sync] = {
    "torchvision.ops.deform_conv.DeformConv2d": _sync_deformable,
    "timm.models.metaformer.Scale": _sync_scale,
    "diffusers.models.downsampling.Downsample1D": _sync_resampling,
    "diffusers.models.downsampling.Downsample2D": _sync_resampling,
    "diffusers.models.upsampling.Upsample1D": _sync_resampling,
    "diffusers.models.upsampling.Upsample2D": _sync_resampling,
    "torchaudio.models.conv_tasnet.MaskGenerator": _sync_mask_generator,
    "torchaudio.models.conv_tasnet.ConvTasNet": _sync_conv_tasnet,
    "torchaudio.models.deepspeech.DeepSpeech": _sync_deep_speech,
    "torchaudio.models.wavernn.WaveRNN": _sync_wave_rnn,
}


def size_attributes(*classes: str) -> Callable[[Sync], Sync]:
    """Register a function that brings the size attributes of a module class of your own in step with its tensors.

    The sizes of the modules in it are in step when the function is called: it may go by them, where ``forward`` checks
    ``x.shape[1] == self.channels``.

    Args:
        classes: Full names of module classes, ``"mylib.layers.ChannelScale"``.

    Returns:
        A decorator that registers the function and returns it unchanged.

    Example:
        >>> @size_attributes("mylib.layers.ChannelScale")
        ... def sizes_of_channel_scale(module):
        ...     module.channels = module.weight.shape[0]
    """

    def register(function: Sync) -> Sync:
        for name in classes:
            _SYNC_BY_CLASS_NAME[name] = function
        return function

    return register


def class_name(module: nn.Module) -> str:
    """Return the full name of the class of a module, ``"torch.nn.modules.linear.Linear"``."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def has_registered_sizes(module: nn.Module) -> bool:
    """Tell whether a module may write down sizes of what is in it, as those do that are registered by name."""
    return class_name(module) in _SYNC_BY_CLASS_NAME or isinstance(module, _ENCODERS)


def has_size_attributes(module: nn.Module) -> bool:
    """Tell whether `sync_attributes` knows what a module writes down of the shapes of its tensors."""
    return has_registered_sizes(module) or isinstance(module, tuple(_SYNC_BY_CLASS))


def sync_attributes(module: nn.Module) -> None:
    """Make the size attributes of one module (``out_channels``, ``num_features``, ``groups`` ...) fit its tensors.

    Args:
        module: A module whose tensors may just have changed shape; its children are not touched.

    Example:
        >>> convolution = nn.Conv2d(3, 8, 1)
        >>> convolution.weight.data = convolution.weight.data[:6]
        >>> sync_attributes(convolution)
        >>> convolution
        Conv2d(3, 6, kernel_size=(1, 1), stride=(1, 1))
    """
    if _is_emptied(module):
        return
    registered = _SYNC_BY_CLASS_NAME.get(class_name(module))
    if registered is not None:
        registered(module)
        return
    for module_class, sync in _SYNC_BY_CLASS.items():
        if isinstance(module, module_class):
            sync(module)
            return


def _is_emptied(module: nn.Module) -> bool:
    """Tell whether a module has nothing left, as in a residual block that has been pruned: it keeps its numbers."""
    return any(tensor is not None and 0 in tensor.shape for tensor in module._parameters.values())
