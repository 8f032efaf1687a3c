"""Every parameter of more than one dimension is in a group or among what is unprunable, for a reason that is true."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine import named_nowhere, torchvision_model
from torch import Tensor, nn

import lightning_prune as lp

ROWS = torch.zeros(5, 8)
IMAGE = torch.zeros(2, 3, 8, 8)
TOKENS = torch.zeros(2, 6, 8)


class Net(nn.Module):
    """Named layers and parameters, and a function of them and the input."""

    def __init__(self, run: Callable[..., Tensor], **named: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, one in named.items():
            setattr(self, name, one)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class FakeQuantised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = torch.fake_quantize_per_tensor_affine(self.weight, 0.05, 0, -128, 127)
        return self._conv_forward(x, weight, self.bias)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def by(change: Callable[[Tensor], Tensor]) -> Net:
    """Let a weight be changed before it is used between two layers."""

    def run(net: Net, x: Tensor) -> Tensor:
        return net.head(F.linear(net.stem(x), change(net.weight)).relu())

    return Net(run, stem=nn.Linear(8, 16), weight=weight(12, 16), head=nn.Linear(12, 3))


def trained_with(net: Net, x: Tensor) -> Tensor:
    return net.head(x) + (net.helper(x) if net.training else 0)


def no_rule(operator: str) -> str:
    return f"runs aten.{operator}, which has no rule"


UNUSED = "is used by no operator of the forward pass in evaluation mode"
# By case: the network, what it takes, and of the modules in question how many channels cannot be pruned and why.
CASES: dict[str, tuple[nn.Module, Any, dict[str, tuple[int, str]]]] = {
    "fake quantised": (
        nn.Sequential(FakeQuantised(3, 12, 3), nn.ReLU(), FakeQuantised(12, 6, 1), nn.Conv2d(6, 4, 1)),
        IMAGE,
        {
            name: (n, f"{name}: {no_rule('fake_quantize_per_tensor_affine_cachemask')}")
            for name, n in (("0", 12), ("2", 6))
        },
    ),
    "transformed": (
        by(lambda w: torch.fft.irfft(torch.fft.rfft(w), n=16)),
        ROWS,
        {
            "weight": (12, f"Net: {no_rule('_fft_r2c')}"),
            "stem": (16, "Net: multiplies a matrix of fixed size"),
            "head": (3, "head: is an output of the network"),
        },
    ),
    "orthogonal": (by(lambda w: torch.linalg.qr(w)[1]), ROWS, {"weight": (12, f"Net: {no_rule('linalg_qr')}")}),
    "bilinear, of an input": (
        Net(
            lambda net, x: net.head(net.both(net.one(x), x)),
            one=nn.Linear(8, 5),
            both=nn.Bilinear(5, 8, 7),
            head=nn.Linear(7, 3),
        ),
        ROWS,
        {},
    ),
    "never used": (
        Net(lambda net, x: net.head(x), head=nn.Linear(8, 3), spare=nn.Conv2d(3, 5, 3), own=weight(4, 4)),
        ROWS,
        {"spare": (5, f"spare: {UNUSED}"), "own": (4, f"own: {UNUSED}")},
    ),
    "used in training": (
        Net(trained_with, head=nn.Linear(8, 3), helper=nn.Linear(8, 3)),
        ROWS,
        {"helper": (3, f"helper: {UNUSED}")},
    ),
    "a single channel": (
        Net(lambda net, x: net.head(net.one(x)), one=nn.Linear(8, 1), head=nn.Linear(1, 3)),
        ROWS,
        {"one": (1, "one: has a single channel")},
    ),
    "without channels": (
        Net(lambda net, x: F.linear(x, net.empty), empty=weight(0, 8)),
        ROWS,
        {"empty": (0, "empty: has no channels")},
    ),
    "an input's mask": (
        Net(lambda net, x: net.head(x * net.mask), mask=weight(6, 8), head=nn.Linear(8, 3)),
        TOKENS,
        {"mask": (6, "Net: is combined with a tensor of fixed size")},
    ),
    "positions of unprunable channels": (
        Net(lambda net, x: (net.stem(x) + net.places).softmax(-1), stem=nn.Linear(8, 16), places=weight(1, 1, 16)),
        TOKENS,
        dict.fromkeys(("stem", "places"), (16, "Net: runs softmax along its channels")),
    ),
    "every layer of a stream": (
        Net(lambda net, x: net.one(x) + net.other(x), one=nn.Linear(8, 4), other=nn.Linear(8, 4)),
        ROWS,
        {"one": (4, "one: is an output of the network"), "other": (4, "one: is an output of the network")},
    ),
    "several reasons": (
        Net(
            lambda net, x: torch.cat([net.all(x)[:, :4].softmax(-1), net.head(net.all(x)[:, 4:].cumsum(1))], 1),
            all=nn.Linear(8, 11),
            head=nn.Linear(7, 3),
        ),
        ROWS,
        {"all": (4, "Net: runs softmax along its channels"), "all#1": (7, "Net: runs cumsum along its channels")},
    ),
    "complex": (
        nn.Sequential(nn.Linear(8, 6, dtype=torch.complex64), nn.Linear(6, 3, dtype=torch.complex64)),
        ROWS.to(torch.complex64),
        {"0": (6, "0: has complex numbers, which no criterion scores")},
    ),
    "normalised by neighbours": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.LocalResponseNorm(3), nn.Conv2d(8, 2, 1)),
        IMAGE,
        {"0": (8, "1: is normalised by its neighbouring channels")},
    ),
    "pruned as a whole alone": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.GLU(1), nn.Conv2d(4, 2, 1)),
        IMAGE,
        {"0": (8, "0: all its channels can only be pruned together")},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_named_with_the_true_reason(case: str):
    model, inputs, expected = CASES[case]
    graph = lp.trace(model, inputs)
    assert named_nowhere(model, graph) == []
    told = {name: (one.channels, one.reason) for name, one in graph.unprunable.items()}
    assert {name: told.get(name) for name in expected} == expected


def test_explain_tells_every_reason_of_a_module():
    model, inputs, _ = CASES["several reasons"]
    assert lp.trace(model, inputs).explain("all").splitlines() == [
        "all: 4 channels cannot be pruned, because Net: runs softmax along its channels",
        "all: 7 channels cannot be pruned, because Net: runs cumsum along its channels",
    ]


def test_a_module_that_trains_with_fake_quantisation_is_named():
    from torch.ao import quantization

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this part of torch will move
        quantization.prepare_qat(model, inplace=True)
    graph = lp.trace(model, IMAGE)
    assert named_nowhere(model, graph) == []
    assert graph.unprunable["0"].channels == 8
    assert "which has no rule" in graph.unprunable["0"].reason


# -- the zoo -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_every_matrix_of_the_whole_zoo_is_named():
    import torchvision

    models = torchvision.models
    for name in models.list_models(module=models) + models.list_models(module=models.segmentation):
        size = 224 if name.startswith(("vit", "swin", "maxvit")) else 299 if name == "inception_v3" else 96
        model = torchvision_model(name, torch.float32)
        graph = lp.trace(model, torch.zeros(2, 3, size, size))
        assert named_nowhere(model, graph) == [], name
