"""FLOPs by fvcore: of any call, with nothing changed, and said to be missing or different where they are."""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.plain import made
from lightning_prune.planning.spread import Spread
from lightning_prune.reporting.flops import count_flops, flop_table
from lightning_prune.reporting.history import History
from lightning_prune.reporting.inspect import describe
from lightning_prune.reporting.measurement import Measurement, measure
from lightning_prune.reporting.summary import summarize


@dataclass
class Output:
    logits: Tensor


class Network(nn.Module):
    """Takes and returns more than tensors, draws numbers, counts its runs, and has statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)
        self.runs = 0

    def forward(self, x: Tensor, *, scale: float = 1.0, kind: str = "tuple") -> Any:
        self.runs += 1
        logits = self.last(self.norm(self.first(x))) * scale + torch.rand(2)
        return {"tuple": (logits, 3), "dict": {"logits": logits}, "object": Output(logits), "none": None}[kind]


@pytest.mark.parametrize("kind", ["tuple", "dict", "object"])
def test_calls_of_any_kind_are_counted(kind: str) -> None:
    counted = count_flops(Network(), {"x": torch.zeros(3, 8), "scale": 2.0, "kind": kind})
    # By hand: 3 samples, 8 inputs to 4 channels, 4 to 2; fvcore counts two passes for the statistics of each value.
    assert counted.total == 3 * (8 * 4 + 4 * 2) + 2 * 3 * 4
    assert counted.failure == ""
    assert counted.uncounted["aten::rand"] == 1


def test_nothing_is_changed_and_nothing_is_printed(capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    network = Network()
    network.norm.eval()
    network.first.register_forward_hook(lambda module, args, output: None)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    hooks = [dict(module._forward_hooks) for module in network.modules()]
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("tuple", "none"):  # a count that works and one that fails
            count_flops(network, {"x": torch.zeros(3, 8), "kind": kind})
            flop_table(network, {"x": torch.zeros(3, 8), "kind": kind})
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == [True, True, False, True]
    assert network.runs == 0
    assert [dict(module._forward_hooks) for module in network.modules()] == hooks
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert capsys.readouterr() == ("", "")
    assert caplog.text == ""


def test_what_fvcore_cannot_run_is_counted_by_the_cost_model() -> None:
    inputs = {"x": torch.zeros(3, 8), "kind": "none"}
    counted = count_flops(Network(), inputs)
    assert counted.total is None
    assert "no tensors in what forward returns" in counted.failure
    assert flop_table(Network(), inputs).startswith("fvcore cannot count Network: there are no tensors")
    measured = measure(Network(), inputs, cost_model_flops=144, latency=Spread(1.0, 1.0, 1.0))
    assert measured.flops == 144
    lines = summarize(measured, Measurement(1, 100, 1.0))
    assert lines[-1].startswith("FLOPs before: 144 counted by the cost model, as fvcore cannot: there are no tensors")


def test_the_table_tells_what_is_not_counted() -> None:
    lines = flop_table(Network(), torch.zeros(3, 8)).splitlines()
    assert lines[-1] == "Not counted: aten::add (1), aten::mul (1), aten::rand (1)"


def test_the_table_has_every_layer() -> None:
    network = nn.Sequential(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), nn.Linear(4, 2))
    rows = [line.split("|")[1:] for line in flop_table(network, torch.zeros(1, 8)).splitlines()]
    flops = {name.strip(): number.strip() for name, _, number in (row[:3] for row in rows)}
    assert (flops["0.0"], flops["1"]) == ("32", "8")


def test_a_difference_is_shown_where_a_network_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = lp.trace(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), torch.zeros(1, 8))
    assert describe(graph).splitlines()[1] == "FLOPs: 40 counted by fvcore"
    counted = count_flops(nn.Linear(8, 4), torch.zeros(1, 8))
    monkeypatch.setattr("lightning_prune.reporting.inspect.count_flops", lambda *given: counted)
    assert describe(graph).splitlines()[1] == "FLOPs: 32 counted by fvcore, 40 by the cost model (+8)"


class Steps(nn.Module):
    """A recurrent layer, a convolution with padding by name, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(3, 8), nn.Linear(8, 2)
        self.convolution = nn.Conv1d(8, 8, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        states = self.convolution(self.recurrent(x)[0].transpose(1, 2))
        return self.head(states.transpose(1, 2))


def test_what_fvcore_leaves_out_is_counted_and_told() -> None:
    steps = torch.zeros(5, 4, 3)
    # By hand: 20 steps of all samples; three gates of 8 from 3 inputs and 8 states; a kernel of 3 from 8 to 8; 8 to 2.
    recurrent, convolution, linear = 20 * 3 * 8 * (3 + 8), 20 * 3 * 8 * 8, 20 * 8 * 2
    counted = count_flops(Steps(), steps)
    assert counted.total == recurrent + convolution + linear
    assert counted.left_out == {"convolutions with padding by name": convolution, "recurrent layers": recurrent}
    expected = (
        "9,440 counted, 320 of them by fvcore, which leaves out 3,840 of convolutions with padding by name, "
        "5,280 of recurrent layers"
    )
    assert describe(lp.trace(Steps(), steps)).splitlines()[1] == f"FLOPs: {expected}"
    measured = measure(Steps(), steps, cost_model_flops=9440, latency=Spread(1.0, 1.0, 1.0))
    assert (measured.flops, measured.flops_remark) == (9440, expected)
    assert made(Measurement, measured.to_json()) == measured
    assert f"FLOPs before: {expected}" in summarize(measured, Measurement(1, 100, 1.0))


def test_layers_of_attention_are_counted_though_pytorch_can_run_them_as_one_operator() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    # By hand: 6 tokens, of which queries, keys, values and outputs are made, 8 to 16 to 8, two norms of five passes;
    # two heads of 4 that attend from 6 tokens to 6.
    of_layers, of_attention = 6 * (4 * 8 * 8 + 2 * 8 * 16 + 2 * 5 * 8), 2 * 2 * 6 * 6 * 4
    tokens = torch.zeros(1, 6, 8)
    counted = count_flops(layer, tokens)
    assert (counted.total, counted.left_out) == (of_layers + of_attention, {"attention as one operator": of_attention})
    assert describe(lp.trace(layer, tokens)).splitlines()[1] == (
        f"FLOPs: {of_layers + of_attention:,} counted, {of_layers:,} of them by fvcore, which leaves out "
        f"{of_attention:,} of attention as one operator"
    )
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_kind_of_a_group_is_told() -> None:
    graph = lp.trace(nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 2)), torch.zeros(1, 2))
    graph.groups["0"] = replace(graph.groups["0"], kind="heads")
    assert describe(graph).splitlines()[3].endswith("0, 1 (heads)")


def test_channels_that_are_pruned_several_at_a_time_all_count_where_they_are_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.GroupNorm(2, 32), nn.Conv2d(32, 5, 1))
    graph = lp.trace(model, torch.zeros(1, 3, 4, 4))
    first, _, _, row, *_ = describe(graph).splitlines()
    assert first == "1 group of 32 channels can be pruned"
    assert row.split()[:2] == ["0", "32"]
    assert row.endswith("0, 1, 2 (16 channels at a time)")
    before = measure(model, graph.example_inputs, cost_model_flops=0, latency=Spread(1.0, 1.0, 1.0))
    history = History.begin("model", "callback", {}, graph, before)
    plan = graph.plan({"0": torch.tensor([1])})
    lp.prune(model, plan)
    history.add_prune(graph, plan, step=1, epoch=0, after=before)
    assert (history.groups, history.widths) == ({"0": 32}, {"0": 16})
