"""Removing channels: optimizers, gradients, identity, refusals (invariants 2, 4 and 5)."""

import copy
import pickle

import pytest
import torch
from engine import randomised
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_prune as lp
from lightning_prune import surgery
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.surgery import reshape, slicing
from lightning_prune.surgery.masks import mask

KEPT = {"0": torch.tensor([0, 3, 4]), "3": torch.tensor([1, 2])}
X = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

OPTIMIZERS = {
    "sgd": lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, **o),
    "nesterov": lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, **o),
    "adam": lambda p, **o: torch.optim.Adam(p, lr=0.01, amsgrad=True, **o),
    "adamw": lambda p, **o: torch.optim.AdamW(p, lr=0.01, **o),
    "rmsprop": lambda p, **o: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True, **o),
    "adagrad": lambda p, **o: torch.optim.Adagrad(p, lr=0.05, **o),
}


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 2)
    )
    return randomised(model).double()


def plan_for(model: nn.Module):
    return lp.trace(model, X).plan(KEPT)


def loss_of(model: nn.Module) -> Tensor:
    # Normalisation in evaluation mode, so that the masked and the pruned network see the same numbers.
    return model.eval()(X).square().sum() * 1e-2


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def sliced(tensor: Tensor, axes: dict[int, Tensor]) -> Tensor:
    for axis, index in axes.items():
        tensor = tensor.index_select(axis, index)
    return tensor


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_after_a_prune_is_the_sliced_step_of_the_masked_twin(name: str, foreach: bool):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters(), foreach=foreach)
    train(model, optimizer, 3)
    graph = lp.trace(model, X)
    plan = graph.plan(KEPT)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    mask(lp.trace(twin, X), plan)
    lp.prune(model, plan, [optimizer])
    train(model, optimizer, 1)
    train(twin, twin_optimizer, 1)
    index = plan.index()
    for (key, after), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        axes = index.get(key, {})
        torch.testing.assert_close(after, sliced(expected, axes), rtol=1e-9, atol=1e-12)
        state, twin_state = optimizer.state[after], twin_optimizer.state[expected]
        assert state.keys() == twin_state.keys()
        for what, value in state.items():
            wanted = twin_state[what]
            if isinstance(wanted, Tensor) and wanted.dim() > 0:
                wanted = sliced(wanted, axes)
                assert value.shape == after.shape
            torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)
    train(model, optimizer, 2)


def test_param_groups_keep_identity_order_and_settings():
    model = network()
    optimizer = torch.optim.SGD(
        [{"params": list(model[3:].parameters()), "lr": 0.1}, {"params": list(model[:3].parameters())}], lr=0.01
    )
    before = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    names = [id(p) for p in model.parameters()]
    model[0].weight.requires_grad_(False)
    lp.prune(model, plan_for(model), [optimizer])
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == before
    assert [id(p) for p in model.parameters()] == names
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 7
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_gradients_and_counters():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 3)
    plan = plan_for(model)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    lp.prune(model, plan, [optimizer])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, sliced(gradients[name], plan.index().get(name, {})))
        assert optimizer.state[parameter]["step"] == 3


@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.float16])
def test_a_live_gradient_accumulator_does_not_remember_the_old_shape(precision: torch.dtype):
    model = network().to(precision)
    accumulators = [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]
    hooked = []
    accumulators[0].register_hook(lambda *_: hooked.append(True))
    x = X.to(precision)
    model.eval()(x).sum().backward()
    lp.prune(model, lp.trace(model, x).plan(KEPT))
    model.zero_grad()
    model(x).sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_hooks_on_parameters_are_kept():
    model = network()
    seen = []
    model[0].weight.register_hook(lambda gradient: seen.append(gradient.shape))
    lp.prune(model, plan_for(model))
    loss_of(model).backward()
    assert seen == [(3, 3, 3, 3)]


def test_size_attributes_follow():
    model = network()
    report = lp.prune(model, plan_for(model))
    assert (model[0].out_channels, model[1].num_features, model[3].in_channels, model[3].out_channels) == (3, 3, 3, 2)
    assert model[5].in_features == 8
    assert report.widths == {"0": (6, 3), "3": (4, 2)}
    assert report.params == (sum(p.numel() for p in network().parameters()), sum(p.numel() for p in model.parameters()))
    assert "0: 6 -> 3 channels" in str(report)


def test_tied_parameters_are_sliced_once_and_stay_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.head(self.first(x) * self.second(x))

    model = randomised(Tied())
    graph = lp.trace(model, torch.zeros(2, 3))
    assert list(graph.groups) == ["first"]
    weight = model.first.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lp.prune(model, graph.plan({"first": torch.tensor([1, 5])}), [optimizer])
    assert model.first.weight is model.second.weight
    assert torch.equal(model.first.weight, weight[[1, 5]])
    assert model.first.out_features == model.second.out_features == 2
    model(torch.zeros(2, 3))


def test_copies_and_pickles_of_a_pruned_model_work_and_know_their_plan():
    model = network()
    plan = plan_for(model)
    lp.prune(model, plan)
    expected = model.eval()(X)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(X), expected)
        assert plan_in_force(again) == plan


def test_a_pruned_model_is_traced_in_its_original_shape():
    model = network()
    graph = lp.trace(model, X)
    lp.prune(model, graph.plan(KEPT))
    again = lp.trace(model, X)
    assert again.groups == graph.groups
    assert again.terms == graph.terms
    assert again.kept("0").tolist() == [0, 3, 4]
    lp.prune(model, again.plan({"0": torch.tensor([3])}))
    assert model[0].out_channels == 1
    model(X)


def test_a_graph_stays_valid_after_a_prune():
    model = network()
    graph = lp.trace(model, X)
    weight = model[3].weight.detach().clone()
    lp.prune(model, graph.plan(KEPT))
    in_slice = graph.groups["0"].in_slices[0]
    rows = graph.rows("0", in_slice)
    assert torch.equal(rows, weight[[1, 2]][:, [0, 3, 4]].movedim(1, 0).reshape(3, -1))


def test_rows_of_flattened_channels():
    model = network()
    graph = lp.trace(model, X)
    weight = model[5].weight.detach().clone()
    expected = torch.stack([weight[:, 4 * channel : 4 * channel + 4] for channel in (1, 2)])
    lp.prune(model, graph.plan(KEPT))
    rows = graph.rows("3", graph.groups["3"].in_slices[0])
    assert torch.equal(rows.sort(dim=1).values, expected.reshape(2, -1).sort(dim=1).values)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 3)), "the model has no tensor"),
        (lambda: nn.Sequential(*network()[:5], nn.Linear(25, 2)), r"'5.weight' has shape \(2, 25\) where the plan"),
    ],
)
def test_a_plan_about_another_architecture_does_not_touch_the_model(wrong, message: str):
    plan, model = plan_for(network()), wrong()
    before = _state(model)
    with pytest.raises(ValueError, match=f"The plan is about another architecture: {message}"):
        lp.prune(model, plan)
    assert _unchanged(model, before)
    assert plan_in_force(model) is None


class _Wrapper(nn.parallel.DistributedDataParallel):
    """One that needs no ranks."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def test_wrappers_and_foreign_optimizers_are_refused():
    model = network()
    plan, before = plan_for(model), _state(model)
    refused = [
        (nn.DataParallel(model), [], r"The model is wrapped in DataParallel; prune `model.module`"),
        (
            nn.Sequential(_Wrapper(model)),
            [],
            "'0' of Sequential is a DistributedDataParallel, which knows only ",
        ),
        (model, [torch.optim.LBFGS(model.parameters())], "LBFGS keeps its history"),
        (model, ["adam"], "str is no torch optimizer"),
    ]
    for wrapped, optimizers, why in refused:
        with pytest.raises(TypeError, match=why):
            lp.prune(wrapped, plan, optimizers)
        with pytest.raises(TypeError, match=why):
            surgery.check(wrapped, optimizers)
    assert _unchanged(model, before)


def test_check_takes_off_the_wrappers_of_lightning():
    model = network()
    optimizer = torch.optim.SGD(model.parameters())
    assert surgery.check(model, [LightningOptimizer(optimizer)]) == [optimizer]


class _Around(torch.optim.Optimizer):
    """Steps with another optimizer, and keeps other state besides, as sharpness-aware minimisation does."""

    def __init__(self, parameters, name: str, listed: bool) -> None:
        super().__init__(parameters, {})
        inner = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.step_inside = inner.step
        setattr(self, name, [inner] if listed else inner)

    def step(self, closure=None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["before"] = parameter.detach().clone()
        self.step_inside()


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("name", ["base_optimizer", "optimizer", "_inner"])
def test_an_optimizer_inside_another_loses_the_same_channels(name: str, listed: bool):
    model = network()
    twin = copy.deepcopy(model)
    around = _Around(model.parameters(), name, listed)
    for trained, optimizer in ((model, around), (twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9))):
        train(trained, optimizer, 2)
        lp.prune(trained, plan_for(trained), [optimizer])
        train(trained, optimizer, 2)
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, expected)
        assert around.state[parameter]["before"].shape == parameter.shape


def test_an_optimizer_inside_another_is_refused_like_any_other():
    model = network()
    around = _Around(model.parameters(), "base_optimizer", False)
    around.base_optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(TypeError, match="LBFGS keeps its history"):
        surgery.check(model, [around])


def test_reshape_both_ways():
    model = network()
    plan = plan_for(model)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    pruned = copy.deepcopy(model)
    lp.prune(pruned, plan)
    identities = [id(p) for p in model.parameters()]
    reshape(model, plan)
    model.load_state_dict(pruned.state_dict())
    assert torch.equal(model.eval()(X), pruned.eval()(X))
    assert plan_in_force(model) == plan
    reshape(model, None)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert plan_in_force(model) is None
    assert (model[0].out_channels, model[5].in_features) == (6, 16)
    assert [id(p) for p in model.parameters()] == identities
    reshape(model, None)  # nothing to do


@pytest.mark.parametrize("kept", [[0, 3, 4], [2, 3, 4, 5], [0, 1], [5]])
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_a_large_tensor_is_copied_in_chunks(monkeypatch, kept: list[int], axes: tuple[int, ...]):
    tensor = torch.randn(6, 6, 2)
    index = {axis: torch.tensor(kept) for axis in axes}
    monkeypatch.setattr(slicing, "_CHUNK", 30)  # numbers: two rows and a half
    assert torch.equal(slicing.take(tensor, index), sliced(tensor, index))


@pytest.mark.parametrize(
    ("kept", "size", "length"),
    [([0, 1, 4, 5], 8, 2), ([0, 1, 2, 3], 8, 4), ([0, 2, 4], 6, 1), ([4, 5, 6, 7], 12, 4), ([0, 1, 3, 4, 5], 6, 1)],
)
def test_runs_are_as_long_as_they_can_be(kept: list[int], size: int, length: int):
    assert slicing.run_length(torch.tensor(kept), size) == length


def test_channels_last_is_kept():
    model = network().to(memory_format=torch.channels_last)
    lp.prune(model, plan_for(model))
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_factored_state_is_sliced_along_the_axes_it_has():
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4)).double()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    x = torch.randn(5, 3, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[model[1].weight].items()}
    lp.prune(model, lp.trace(model, x).plan({"0": torch.tensor([1, 2, 5])}), [optimizer])
    after = optimizer.state[model[1].weight]
    assert torch.equal(after["row_var"], before["row_var"])
    assert torch.equal(after["col_var"], before["col_var"][:, [1, 2, 5]])
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()


def test_state_in_a_shape_of_its_own_is_refused_before_anything_is_touched():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight]["preconditioner"] = torch.eye(7)
    before = _state(model)
    with pytest.raises(TypeError, match=r"SGD keeps 'preconditioner' of '0.weight' in shape \(7, 7\)"):
        lp.prune(model, plan_for(model), [optimizer])
    assert _unchanged(model, before)


@pytest.mark.parametrize("layout", ["list", "dict"])
def test_state_in_a_collection_is_refused_before_anything_is_touched(layout: str):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    factors = [torch.eye(6), torch.tensor(1.0), torch.eye(3)]
    optimizer.state[model[0].weight]["factors"] = factors if layout == "list" else dict(enumerate(factors))
    before = _state(model)
    with pytest.raises(TypeError, match=r"SGD keeps 'factors' of '0.weight' in shape \(6, 6\) and \(3, 3\), where"):
        lp.prune(model, plan_for(model), [optimizer])
    assert _unchanged(model, before)


def test_collections_of_single_numbers_are_kept():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counts = [3, None, torch.tensor(2.0)]
    optimizer.state[model[0].weight]["counts"] = counts
    lp.prune(model, plan_for(model), [optimizer])
    assert optimizer.state[model[0].weight]["counts"] is counts


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.table(words).mean(1))


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize(
    "kind", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.SparseAdam(p, lr=0.1)]
)
def test_sparse_gradients_and_state_lose_the_same_channels(kind, coalesced: bool):
    words = torch.tensor([[1, 5, 5], [7, 1, 19]])
    model = randomised(_Words())
    optimizer = kind(list(model.table.parameters()))
    model(words).square().sum().backward()
    optimizer.step()
    weight = model.table.weight
    if coalesced:
        weight.grad = weight.grad.coalesce()
    gradient = weight.grad.to_dense()
    state = {key: value.to_dense() for key, value in optimizer.state[weight].items() if isinstance(value, Tensor)}
    kept = torch.tensor([0, 3, 6])
    lp.prune(model, lp.trace(model, words).plan({"table": kept}), [optimizer])
    assert weight.grad.is_sparse
    assert torch.equal(weight.grad.to_dense(), gradient[:, kept])
    for key, value in state.items():
        assert torch.equal(optimizer.state[weight][key].to_dense(), value[:, kept])
    model(words).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model(words).square().sum().backward()
    optimizer.step()


class _SinglePrecision(TorchDispatchMode):
    """A device without float64, as those of Apple are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype is torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it")
        return result


@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_pruning_makes_no_float64_of_a_model_in_another_precision(precision: torch.dtype):
    model = network().to(precision)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model.eval()(X.to(precision)).sum().backward()
    optimizer.step()
    plan = lp.trace(model, X.to(precision)).plan(KEPT)
    with _SinglePrecision():
        lp.prune(model, plan, [optimizer])
        reshape(model, None)
    assert all(p.dtype is precision for p in model.parameters())


class Caching(nn.Module):
    """Keeps what it makes of its weights, in evaluation mode, until it trains again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)
        self.gain = nn.Parameter(torch.rand(6))
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.second(self.first(x) * self.gain.exp())
        if "gain" not in self.kept:
            self.kept["gain"] = self.gain.exp()
        return self.second(self.first(x) * self.kept["gain"])

    def train(self, mode: bool = True) -> "Caching":
        if mode:
            self.kept = {}
        return super().train(mode)


@torch.no_grad()
def test_what_a_module_keeps_of_its_weights_in_evaluation_mode_is_emptied():
    model, x = nn.Sequential(Caching(), nn.Dropout()).double().eval(), torch.randn(2, 3, dtype=torch.float64)
    model(x)
    graph = lp.trace(model, x)
    assert list(graph.groups) == ["0.first"]
    model(x)
    plan = graph.plan({"0.first": torch.tensor([0, 2, 5])})
    twin = copy.deepcopy(model)
    mask(lp.trace(twin, x), plan)
    lp.prune(model, plan)
    assert [module.training for module in model.modules()] == [False] * 5
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-12)
