"""Tracing changes nothing (invariant 3)."""

import copy
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.planning import measure_latency


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


def test_a_failing_forward_changes_nothing_of_the_model():
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


def test_data_dependent_networks_run_for_real_and_are_as_before():
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


class Collecting(nn.Module):
    """A network whose forward pass changes in place what is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)
        self.metrics = torchmetrics.MetricCollection([torchmetrics.SumMetric(), torchmetrics.MeanMetric()])
        self.rows = torchmetrics.CatMetric()
        self.count = torch.zeros(())
        self.first.also_counts = self.count
        self.inner = {"outputs": [], "sums": [torch.zeros(3)], "recent": deque(maxlen=2)}
        self.shapes: set[tuple[int, ...]] = set()
        self.hidden = hidden = []
        self.first.register_forward_hook(lambda module, inputs, output: hidden.append(output))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.metrics.update(torch.tensor(float(len(x))))
        self.rows.update(torch.ones(2))
        self.count += 1
        assert self.first.also_counts == self.count
        self.inner["outputs"].append(self.first(x))
        self.inner["sums"][0] += 1
        self.inner["recent"].append(x)
        self.inner["new"] = x
        self.shapes.add(tuple(x.shape))
        self.calls += 1
        return self.second(self.hidden.pop().relu())


def _timed(model: nn.Module, inputs: Tensor) -> None:
    measure_latency(model, inputs, runs=2, warm_up=1)


@pytest.mark.parametrize("run", [lp.trace, _timed])
def test_what_a_forward_pass_counts_and_collects_is_as_before(run):
    model = Collecting()
    model(torch.ones(4, 8)), model(torch.ones(5, 8))
    objects = [model.count, model.calls, model.inner, model.inner["sums"][0], model.hidden, model.shapes]
    collected = list(model.inner["outputs"])
    run(model, torch.ones(2, 8))
    now = [model.count, model.calls, model.inner, model.inner["sums"][0], model.hidden, model.shapes]
    assert all(one is other for one, other in zip(objects, now, strict=True))
    assert model.first.also_counts is model.count
    assert {key: float(value) for key, value in model.metrics.compute().items()} == {"SumMetric": 9, "MeanMetric": 4.5}
    assert model.rows.compute().tolist() == [1] * 4
    assert (model.count, model.calls) == (2, 2)
    assert list(model.inner) == ["outputs", "sums", "recent", "new"]
    assert all(one is other for one, other in zip(collected, model.inner["outputs"], strict=True))
    assert model.inner["sums"][0].tolist() == [2, 2, 2]
    assert [len(each) for each in model.inner["recent"]] == [4, 5]
    assert model.inner["recent"].maxlen == 2
    assert model.shapes == {(4, 8), (5, 8)}
    assert model.hidden == []


@pytest.mark.parametrize("run", [lp.trace, _timed])
def test_a_failing_forward_gives_back_what_it_changed_in_place(run):
    model = Collecting()
    model(torch.ones(4, 8))
    with pytest.raises((ValueError, RuntimeError)):
        run(model, torch.ones(2, 7))
    assert float(model.metrics.compute()["SumMetric"]) == 4
    assert model.count == 1
    assert len(model.inner["outputs"]) == 1


def test_the_latency_of_a_model_changes_neither_mode_nor_buffers():
    model = Model().train()
    model.body[1].eval()
    before = copy.deepcopy(_state(model)) | {"identity": [id(p) for p in model.parameters()]}
    _timed(model, torch.zeros(1, 3, 8, 8))
    assert _same(before, _state(model))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("run", [lp.trace, _timed])
def test_scripted_parts_are_as_before(run):
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))), nn.Linear(8, 4))
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    run(model, torch.ones(2, 8))
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert model[0][1].training


def test_nothing_is_compiled_for_the_tracer() -> None:
    compiled = []

    def backend(module: nn.Module, inputs: Any) -> Any:
        compiled.append(module)
        return module.forward

    part = torch.compile(nn.Sequential(nn.Linear(2, 4), nn.ReLU()), backend=backend)
    graph = lp.trace(nn.Sequential(part, nn.Linear(4, 2)), torch.zeros(1, 2))
    assert len(graph.groups) == 1
    assert compiled == []
