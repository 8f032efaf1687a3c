"""Shapes of outputs that are found without PyTorch: each as PyTorch finds it on data, and nothing where it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.graph.shapes import SHAPES

aten = torch.ops.aten


def _rand(*shape: int) -> Tensor:
    return torch.rand(*shape)


IMAGE = _rand(2, 6, 5, 4)
ROWS = _rand(3, 4)
ACTIVATIONS = [aten.relu, aten.silu, aten.gelu, aten.sigmoid, aten.tanh, aten.hardswish, aten.mish, aten.elu]
PLAIN: list[tuple[Any, tuple[Any, ...]]] = [
    *((activation.default, (IMAGE,)) for activation in ACTIVATIONS),
    (aten.convolution.default, (IMAGE, _rand(8, 3, 3, 2), _rand(8), [2, 1], [1], [1], False, [0], 2)),
    (aten.convolution.default, (_rand(2, 3, 9), _rand(4, 3, 3), None, [2], [0], [2], False, [0], 1)),
    (aten.native_layer_norm.default, (ROWS, [4], _rand(4), None, 1e-5)),
    (aten.native_group_norm.default, (IMAGE, _rand(6), _rand(6), 2, 6, 20, 3, 1e-5)),
    (aten.native_group_norm.default, (_rand(2, 4), None, None, 2, 4, 1, 2, 1e-5)),
    (aten.add.Tensor, (IMAGE, _rand(1, 6, 1, 1))),
    (aten.mul.Tensor, (_rand(2, 1, 1, 4), IMAGE)),
    (aten.add.Tensor, (IMAGE, _rand(4))),
    (aten.add.Tensor, (_rand(5, 1), IMAGE)),
    (aten.addmm.default, (_rand(5), ROWS, _rand(4, 5))),
    (aten.addmm.default, (_rand(5), ROWS, _rand(5, 4).t())),
    (aten.mm.default, (ROWS, _rand(4, 5))),
    (aten.mean.dim, (IMAGE, [-1, -2], True)),
    (aten.mean.dim, (IMAGE, [1])),
    (aten.roll.default, (IMAGE, [1, -2], [2, -1])),
    (aten.cat.default, ([IMAGE, _rand(2, 3, 5, 4), _rand(2, 1, 5, 4)], 1)),
    (aten.cat.default, ([ROWS, ROWS], -1)),
    (aten.upsample_nearest2d.default, (IMAGE, [10, 7])),
    (aten.upsample_bilinear2d.default, (IMAGE, [10, 8], False, 2.0, 2.0)),
    (aten.upsample_bilinear2d.default, (IMAGE.to(memory_format=torch.channels_last), [10, 8], False)),
    (aten.upsample_nearest1d.default, (_rand(2, 3, 5), [7])),
    (aten.upsample_trilinear3d.default, (_rand(1, 2, 3, 3, 3), [2, 5, 4], False)),
    (aten.grid_sampler_2d.default, (IMAGE, _rand(2, 3, 7, 2), 0, 0, False)),
    (aten.grid_sampler_3d.default, (_rand(1, 2, 3, 3, 3), _rand(1, 4, 5, 6, 3), 0, 0, False)),
    (aten._softmax.default, (IMAGE, -1, False)),
    (aten._log_softmax.default, (IMAGE, 1, False)),
    (aten._safe_softmax.default, (IMAGE, -1)),
]  # fmt: skip
TO_LEAVE: list[tuple[Any, tuple[Any, ...]]] = [  # refused by PyTorch, or no plain case
    (aten.convolution.default, (IMAGE, _rand(8, 5, 3, 3), None, [1], [0], [1], False, [0], 1)),
    (aten.convolution.default, (IMAGE, _rand(8, 6, 7, 7), None, [1], [0], [1], False, [0], 1)),
    (aten.native_group_norm.default, (IMAGE, None, None, 2, 6, 20, 4, 1e-5)),
    (aten.native_group_norm.default, (IMAGE, _rand(5), None, 2, 6, 20, 3, 1e-5)),
    (aten.addmm.default, (_rand(4), ROWS, _rand(4, 5))),
    (aten.addmm.default, (_rand(5), ROWS, _rand(3, 5))),
    (aten.addmm.default, (_rand(3, 5), ROWS, _rand(4, 5))),
    (aten.mm.default, (ROWS, ROWS)),
    (aten.mm.default, (ROWS, _rand(4, 5).double())),
    (aten.mean.dim, (IMAGE, [1, -3])),
    (aten.mean.dim, (IMAGE, [4])),
    (aten.mean.default, (IMAGE,)),
    (aten.roll.default, (IMAGE, [1])),
    (aten.roll.default, (IMAGE, [1, 1], [0])),
    (aten.cat.default, ([IMAGE, _rand(2, 6, 4, 4)], 1)),
    (aten.cat.default, ([IMAGE, _rand(0)], 1)),
    (aten.cat.default, ([IMAGE, IMAGE.double()], 1)),
    (aten.cat.default, ([IMAGE, IMAGE], 4)),
    (aten.upsample_nearest2d.default, (IMAGE, [10])),
    (aten.upsample_nearest2d.default, (IMAGE, [0, 3])),
    (aten.grid_sampler_2d.default, (IMAGE, _rand(1, 3, 7, 2), 0, 0, False)),
    (aten.grid_sampler_2d.default, (IMAGE, _rand(2, 3, 7, 3), 0, 0, False)),
    (aten._softmax.default, (IMAGE, 4, False)),
    (aten._softmax.default, (IMAGE.mT, 1, False)),
    (aten.roll.default, (IMAGE.mT, [1], [0])),
    (aten.mean.dim, (IMAGE.mT, [1])),
]  # fmt: skip


def _without_data(arguments: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), arguments)


def _shape(operator: Any) -> Any:
    return SHAPES[str(operator.overloadpacket)]


@pytest.mark.parametrize(("operator", "arguments"), PLAIN, ids=lambda value: getattr(value, "__name__", ""))
def test_output_is_as_on_data(operator: Any, arguments: tuple[Any, ...]) -> None:
    expected = tree_leaves(operator(*arguments))[0]
    found = tree_leaves(_shape(operator)(*_without_data(arguments)))[0]
    assert found is not NotImplemented
    assert (found.device.type, found.shape, found.dtype) == ("meta", expected.shape, expected.dtype)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize(("operator", "arguments"), TO_LEAVE, ids=lambda value: getattr(value, "__name__", ""))
def test_leaves_to_pytorch_what_is_not_plain(operator: Any, arguments: tuple[Any, ...]) -> None:
    assert _shape(operator)(*_without_data(arguments)) is NotImplemented


@pytest.mark.parametrize("operator", [aten.relu.default, aten.tanh.default])
def test_keeps_the_layout_of_channels_last(operator: Any) -> None:
    image = IMAGE.to(memory_format=torch.channels_last)
    assert _shape(operator)(_without_data(image)).stride() == operator(image).stride()


def test_leaves_data_alone() -> None:
    for operator, arguments in PLAIN:
        assert _shape(operator)(*arguments) is NotImplemented, operator
