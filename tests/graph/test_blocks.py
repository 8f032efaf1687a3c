"""Residual blocks: which are found, and that a network without one is the one with zeros in its last layer."""

import copy
import io
import json
import pickle
from collections.abc import Callable

import masked_twin
import pytest
import torch
from attention_forms import Form
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.criteria import CRITERIA, score
from lightning_prune.criteria.channel_scores import with_blocks
from lightning_prune.criteria.registry import scores_blocks
from lightning_prune.graph import ChannelGraph
from lightning_prune.models import SmallImageViT
from lightning_prune.planning import CostModel, isomorphic_groups, narrow_groups
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.surgery import reshape

NONE = torch.arange(0)


class Residual(nn.Module):
    """Adds three layers with normalisation to what comes in, and shares its activation with what comes after."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 2 * width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(width, width, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def convolutions() -> tuple[nn.Module, Tensor]:
    blocks = [Residual(6), Residual(6, stride=2), Residual(6)]
    return nn.Sequential(nn.Conv2d(3, 6, 3), *blocks, nn.Flatten(), nn.LazyLinear(4)), torch.randn(2, 3, 10, 10)


def vision() -> tuple[nn.Module, Tensor]:
    return SmallImageViT(4, 1, 8, 12, depth=2, num_heads=2, hidden=20), torch.randn(2, 1, 8, 8)


class Parallel(nn.Module):
    """Adds attention and an MLP at once, in a scale that is a parameter, behind one normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(20)
        self.attention = Form()
        self.mlp = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 20))
        self.gamma = nn.Parameter(torch.rand(20))
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.head(x + self.gamma * self.attention(y) + self.mlp(y))


def parallel() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(5, 20), Parallel()), torch.randn(2, 4, 5)


def encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, norm_first=True)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(5, 12), layers, nn.Linear(12, 3)), torch.randn(2, 4, 5)


NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], list[str]]] = {
    "convolutions": (convolutions, ["1.bn2#block", "3.bn2#block"]),  # a shortcut with weights is no block's
    "vision": (
        vision,
        ["blocks.0.attention#block", "blocks.0.linear2#block", "blocks.1.attention#block", "blocks.1.linear2#block"],
    ),
    "parallel": (parallel, ["1.attention#block", "1.mlp#block"]),
    "encoder": (
        encoder,
        [f"1.layers.{layer}.{last}#block" for layer in range(2) for last in ("self_attn", "linear2")],
    ),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    network, inputs = NETWORKS[name][0]()
    network.eval()(inputs)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return network.double(), inputs.double()


def without(graph: ChannelGraph, blocks: list[str], share: float = 1.0) -> PruningPlan:
    """Plan to prune some blocks, and to keep a share of all other channels that can be masked."""
    kept = dict.fromkeys(blocks, NONE)
    for name, group in graph.groups.items():
        if name not in graph.blocks and group.mask_exact and share < 1:
            kept[name] = torch.arange(group.size)[-max(group.least, int(share * group.size)) :]
    return graph.plan(kept)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_without_blocks_is_the_one_with_zeros_in_their_last_layers(name: str) -> None:
    network, inputs = made(name)
    graph = lp.trace(network, inputs, blocks=True)
    assert list(graph.blocks) == NETWORKS[name][1]
    first, *others = graph.blocks
    for blocks, share in (([first], 1.0), (others, 1.0), ([first], 0.5), (others[:1], 0.5)):
        plan = without(graph, blocks, share)
        pruned = {group: planned.pruned.tolist() for group, planned in plan.groups.items() if len(planned.pruned)}
        with masked_twin.zeros_in_weights(network, masked_twin.consumed(graph, pruned)), torch.no_grad():
            expected = network(inputs)
        smaller = copy.deepcopy(network)
        lp.prune(smaller, plan)
        with torch.no_grad():  # the encoder runs as one operator then
            error = (smaller(inputs) - expected).abs().max() / expected.abs().max()
        assert error < 1e-9
        assert len(smaller(torch.cat([inputs, inputs]))) == 2 * len(inputs)  # of another number of samples


@pytest.mark.parametrize("name", NETWORKS)
def test_cost_is_that_of_the_network_that_is_left(name: str) -> None:
    network, inputs = made(name)
    graph = lp.trace(network, inputs, blocks=True)
    plan = without(graph, list(graph.blocks)[1:], 0.5)
    lp.prune(network, plan)
    cost = CostModel(graph, "params")
    assert cost(plan.widths) == sum(parameter.numel() for parameter in network.parameters())
    left = sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear))
    assert left < cost.original
    flops = CostModel(graph, "flops")
    alone = flops(dict.fromkeys(graph.blocks, 0))
    assert 0 < alone < flops.original


def test_blocks_are_no_groups_unless_they_are_asked_for() -> None:
    network, inputs = made("vision")
    plain = lp.trace(network, inputs)
    with_them = lp.trace(network, inputs, blocks=True)
    assert not plain.blocks
    assert with_them.channels().groups == plain.groups
    assert {group.kind for group in with_them.groups.values()} == {"blocks", *(g.kind for g in plain.groups.values())}
    widths = dict.fromkeys(plain.groups, 3)
    for metric in plain.terms:
        assert CostModel(plain, metric)(widths) == CostModel(with_them, metric)(widths)


def test_plan_with_blocks_is_written_read_joined_and_gone_back_from() -> None:
    network, inputs = made("vision")
    original = copy.deepcopy(network)
    graph = lp.trace(network, inputs, blocks=True)
    first, second, *_ = graph.blocks
    plan = without(graph, [first], 0.5)
    assert PruningPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    lp.prune(network, plan)
    again = lp.trace(network, inputs, blocks=True)
    assert again.groups == graph.groups
    lp.prune(network, without(again, [first, second], 0.5))
    at_once = copy.deepcopy(original)
    lp.prune(at_once, without(graph, [first, second], 0.5))
    assert torch.equal(network(inputs), at_once(inputs))
    assert plan_in_force(network) == plan_in_force(at_once)

    later = lp.trace(network, inputs)  # which knows nothing of blocks
    quarter = {name: torch.arange(group.size)[-1:] for name, group in later.groups.items() if group.kind == "channels"}
    lp.prune(network, later.plan({name: kept for name, kept in quarter.items() if len(later.kept(name))}))
    network(inputs)
    assert type(network.blocks[0].attention).forward is not type(network.blocks[1].attention).forward

    with pytest.raises(ValueError, match="what is pruned cannot come back"):
        lp.prune(network, graph.plan({first: torch.tensor([0])}))
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(inputs), network(inputs))
    fresh = copy.deepcopy(original)
    reshape(fresh, plan_in_force(network))
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(inputs), network(inputs))
    reshape(fresh, None)
    fresh.load_state_dict(original.state_dict())
    assert torch.equal(fresh(inputs), original(inputs))
    assert [type(module) for module in fresh.modules()] == [type(module) for module in original.modules()]


@pytest.mark.parametrize("name", NETWORKS)
def test_training_goes_on_and_every_parameter_gets_a_gradient(name: str) -> None:
    network, inputs = made(name)
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        network(inputs).square().mean().backward()
        optimizer.step()

    step()
    graph = lp.trace(network, inputs, blocks=True)
    lp.prune(network, without(graph, list(graph.blocks)[::2], 0.5), optimizer)
    step()  # distributed training waits for gradients of all parameters
    assert all(parameter.grad is not None for parameter in network.parameters())
    for parameter in network.parameters():
        states = [value for value in optimizer.state[parameter].values() if value.dim()]
        assert all(value.shape == parameter.shape for value in states)


@pytest.mark.long
def test_exported_program_has_nothing_of_a_block() -> None:
    network, inputs = made("convolutions")
    graph = lp.trace(network, inputs, blocks=True)
    lp.prune(network, without(graph, list(graph.blocks)))
    program = torch.export.export(network, (inputs,))
    assert torch.equal(program.module()(inputs), network(inputs))
    convolutions = [node for node in program.graph.nodes if "conv2d" in str(node.target)]
    assert len(convolutions) == 4  # the stem, and the block that stays
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    assert file.tell() > 0


class Padded(nn.Module):
    """Gives an encoder whose layers PyTorch runs as one operator, on nested tensors, sequences of unequal length."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.make, self.encoder, self.head = nn.Linear(5, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        encoded = self.encoder(self.make(x), src_key_padding_mask=padding)
        return self.head(encoded.masked_fill(padding[..., None], 0.0))


def test_encoder_without_a_block_or_a_head_runs_on_padded_sequences() -> None:
    torch.manual_seed(0)
    network, x = Padded().eval(), torch.randn(3, 6, 5)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = True
    graph = lp.trace(network, (x, padding), blocks=True)
    heads = [name for name, group in graph.groups.items() if group.kind == "heads"]
    original = copy.deepcopy(network)
    for kept in ({"encoder.layers.1.self_attn#block": NONE}, {heads[1]: torch.arange(3)}):
        smaller = copy.deepcopy(network)
        lp.prune(smaller, graph.plan(kept))
        with torch.no_grad():
            found = smaller(x, padding)
        torch.testing.assert_close(found, smaller(x, padding))  # gradients keep PyTorch from the one operator
        reshape(smaller, None)
        smaller.load_state_dict(original.state_dict())
        assert smaller.encoder.use_nested_tensor
        with torch.no_grad():
            torch.testing.assert_close(smaller(x, padding), original(x, padding))


class TwiceUsed(nn.Module):
    """What the branch makes is returned beside the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        inside = self.branch(x)
        return self.head(x + inside), inside


class ReadTwice(TwiceUsed):
    """The weight of the branch is read elsewhere too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        return self.head(x + self.branch(x)), x @ self.branch.weight


class AddsOne(TwiceUsed):
    """The branch adds something although its last layer is zero; so does what is left without it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        return self.head(x + (self.branch(x) + 1)), x


class OneMore(nn.Linear):
    """A layer whose output is not zero although its weights are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class NeverZero(TwiceUsed):
    def __init__(self) -> None:
        super().__init__()
        self.branch = OneMore(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(x + self.branch(x))


@pytest.mark.parametrize(
    ("kind", "reason"), [(TwiceUsed, ""), (ReadTwice, "used outside"), (NeverZero, "adds something although")]
)
def test_what_is_no_block_stays(kind: type[nn.Module], reason: str) -> None:
    graph = lp.trace(kind(), torch.randn(2, 4), blocks=True)
    assert not graph.blocks
    if reason:
        assert reason in graph.unprunable["branch#block"].reason


def test_branch_with_a_constant_beside_it_is_exact() -> None:
    network, inputs = AddsOne(), torch.randn(2, 4)
    graph = lp.trace(network, inputs, blocks=True)
    masked = copy.deepcopy(network)
    nn.init.zeros_(masked.branch.weight)
    nn.init.zeros_(masked.branch.bias)
    lp.prune(network, graph.plan({"branch#block": NONE}))
    assert torch.equal(network(inputs)[0], masked(inputs)[0])


def test_ignored_blocks_stay() -> None:
    network, inputs = made("vision")
    graph = lp.trace(network, inputs, blocks=True, ignore=["blocks.0.*"])
    assert list(graph.blocks) == ["blocks.1.attention#block", "blocks.1.linear2#block"]


def test_block_scores_as_its_channels_do_on_average() -> None:
    network, inputs = made("convolutions")
    graph = lp.trace(network, inputs, blocks=True)
    scores = {name: torch.full((group.size,), 1.0) for name, group in graph.channels().groups.items()}
    scores["1.conv1"] = torch.arange(12.0)
    found = with_blocks(graph, scores)
    assert found["1.bn2#block"].tolist() == [5.5]  # the mean of 0 to 11
    assert found["3.bn2#block"].tolist() == [1.0]
    plan = lp.plan(graph, found, keep=0.5, round_to=1)
    assert plan.budget is not None
    assert plan.budget["achieved"] <= 0.5
    lp.prune(network, without(graph, ["1.bn2#block"]))
    again = with_blocks(graph, {name: scores[name] for name in graph.channels().groups})
    assert again["1.bn2#block"].tolist() == [-torch.inf]
    assert "1.conv1" not in again


def test_what_is_pruned_with_a_block_is_not_called_narrow() -> None:
    graph = lp.trace(nn.Sequential(nn.Linear(3, 40), Plus(), nn.Linear(40, 2)), torch.randn(2, 3), blocks=True)
    narrow = {"1.branch.0": torch.arange(1)}
    assert list(narrow_groups(graph, graph.plan(narrow))) == ["1.branch.0"]
    assert narrow_groups(graph, graph.plan({**narrow, "1.branch#block": NONE})) == {}


class Plus(nn.Module):
    """Adds two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_isomorphic_ranking_compares_blocks_with_blocks() -> None:
    network, inputs = made("vision")
    graph = lp.trace(network, inputs, blocks=True)
    classes = [names for names in isomorphic_groups(graph) if graph.groups[names[0]].kind == "blocks"]
    assert [len(names) for names in classes] == [2, 2]  # attention, and the linear layers


def loss_of(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


@pytest.mark.parametrize("criterion", [*CRITERIA, "gate"])
def test_every_criterion_scores_blocks_or_says_that_it_cannot_and_goes_on_without_them(criterion: str) -> None:
    network, inputs = made("convolutions")
    batches = [(inputs, torch.tensor([0, 3]))]
    setting = {"name": "taylor", "variant": "gate"} if criterion == "gate" else criterion
    graph = lp.trace(network, inputs, blocks=True)
    if criterion == "batch_norm_scale":
        graph = lp.trace(network, inputs, blocks=True, ignore=["0", "2.*"])
    if scores_blocks(setting):
        scores = score(graph, setting, batches, loss_of)
        assert all(scores[block].isfinite().all() for block in graph.blocks)
    else:
        with pytest.raises(ValueError, match="tells nothing of blocks"):
            score(graph, setting, batches, loss_of)
    pruned = ["1.bn2#block"]
    lp.prune(network, without(graph, pruned))
    left = lp.trace(network, inputs, ignore=["0", "2.*"] if criterion == "batch_norm_scale" else [])
    scores = score(left, setting, batches, loss_of)  # of what is still there
    plan = lp.plan(left, scores, keep=0.3, round_to=1)
    lp.prune(network, plan)
    assert network(inputs).isfinite().all()


@pytest.mark.parametrize("method", ["statistics", "fold", "refit"])
def test_compensation_makes_up_for_a_block(method: str) -> None:
    network, inputs = made("convolutions")
    inputs = torch.randn(40, *inputs.shape[1:], dtype=torch.float64)
    graph = lp.trace(network, inputs, blocks=True)
    expected = network(inputs)
    plan = without(graph, ["1.bn2#block"])
    plain, compensated = copy.deepcopy(network), copy.deepcopy(network)
    lp.prune(plain, plan)
    report = lp.prune(compensated, plan, compensate=method, batches=[inputs])
    assert "1.bn2#block: pruned" in str(report)
    before = (plain(inputs) - expected).square().mean()
    after = (compensated(inputs) - expected).square().mean()
    assert after < before or method != "refit"  # the others look at what each layer is given
