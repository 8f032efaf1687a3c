"""Tracing leaves nothing behind (invariant 3)."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp


class Model(nn.Module):
    """A network that notes things on itself while it runs, as careless networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 3))
        self.register_buffer("calls", torch.zeros(()))
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.body(x)
        random.random()
        torch.rand(3)
        np.random.rand()
        return self.last


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identity": [id(p) for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "global hooks": [
            len(getattr(nn.modules.module, name))
            for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
        ],
        "last": model.last,
    }


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return torch.equal(before, after)
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(_same(before[key], after[key]) for key in before)
    return before == after


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_the_model_is_as_before(training: bool, grad: bool):
    model = Model().train(training)
    model.body[1].eval()  # a module may be in another mode than its parent
    model.body[0].weight.requires_grad_(False)
    before = copy.deepcopy(_state(model)) | {"identity": [id(p) for p in model.parameters()]}
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    with torch.set_grad_enabled(grad):
        graph = lp.trace(model, torch.zeros(1, 3, 8, 8))
        assert torch.is_grad_enabled() == grad
    drawn = torch.rand(2), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    assert torch.equal(drawn[0], torch.rand(2))
    assert drawn[1:] == (random.random(), np.random.rand())
    assert _same(before, _state(model))
    assert list(graph.groups) == ["body.0"]


def test_a_failing_forward_leaves_the_model_as_before():
    model = Model()
    before = copy.deepcopy(_state(model)) | {"identity": [id(p) for p in model.parameters()]}
    with pytest.raises(ValueError, match=r"The example inputs \[\(1, 5, 8, 8\)\] do not fit the forward pass of Model"):
        lp.trace(model, torch.zeros(1, 5, 8, 8))
    assert _same(before, _state(model))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_parameters_and_gradient_mode_make_no_difference(frozen: bool, grad: bool):
    model = Model().requires_grad_(not frozen)
    expected = lp.trace(Model(), torch.zeros(1, 3, 8, 8))
    with torch.set_grad_enabled(grad):
        assert lp.trace(model, torch.zeros(1, 3, 8, 8)).groups == expected.groups


def test_inference_mode():
    model = Model()
    expected = lp.trace(model, torch.zeros(1, 3, 8, 8)).groups
    with torch.inference_mode():
        assert lp.trace(model, torch.zeros(1, 3, 8, 8)).groups == expected


def test_data_dependent_networks_run_for_real_and_still_leave_nothing_behind():
    class Dependent(Model):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                x = x + 1
            return super().forward(x)

    model = Dependent()
    before = copy.deepcopy(_state(model)) | {"identity": [id(p) for p in model.parameters()]}
    x = torch.ones(1, 3, 8, 8)
    lp.trace(model, x)
    assert _same(before, _state(model))
    assert torch.equal(x, torch.ones(1, 3, 8, 8))
