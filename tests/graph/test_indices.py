"""Known channels in, exact positions out: worked out by hand for every tensor of small networks."""

import pytest
import torch
import torch.nn.functional as F
from engine import assert_pruned, difference, random_plan, randomised
from torch import nn

import lightning_prune as lp

IMAGE = torch.zeros(2, 3, 8, 8)


def test_plain_sequence():
    model = randomised(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 1))
    )
    assert_pruned(
        model,
        IMAGE,
        {"0": [1, 3], "3": [0, 4, 5]},
        {
            "0.weight": {0: [1, 3]},
            "0.bias": {0: [1, 3]},
            "1.weight": {0: [1, 3]},
            "1.bias": {0: [1, 3]},
            "1.running_mean": {0: [1, 3]},
            "1.running_var": {0: [1, 3]},
            "3.weight": {0: [0, 4, 5], 1: [1, 3]},
            "3.bias": {0: [0, 4, 5]},
            "4.weight": {1: [0, 4, 5]},
        },
    )


def test_the_output_of_the_network_is_unprunable():
    graph = lp.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)), IMAGE)
    assert list(graph.groups) == ["0"]
    assert graph.unprunable["1"].channels == 6
    assert graph.unprunable["1"].reason == "1: is an output of the network"


class Basic(nn.Module):
    """A residual basic block between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.one = nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.two = nn.Conv2d(5, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.two(torch.relu(self.one(x)))))


def test_residual_basic_block():
    assert_pruned(
        randomised(Basic()),
        IMAGE,
        {"stem": [0, 3], "one": [2]},
        {
            "stem.weight": {0: [0, 3]},
            "stem.bias": {0: [0, 3]},
            "one.weight": {0: [2], 1: [0, 3]},
            "two.weight": {0: [0, 3], 1: [2]},
            "two.bias": {0: [0, 3]},
            "head.weight": {1: [0, 3]},
        },
    )


class Bottleneck(nn.Module):
    """A bottleneck with a projection on its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1, bias=False)
        self.reduce = nn.Conv2d(4, 3, 1, bias=False)
        self.middle = nn.Conv2d(3, 3, 3, stride=2, padding=1, bias=False)
        self.expand = nn.Conv2d(3, 6, 1, bias=False)
        self.shortcut = nn.Conv2d(4, 6, 1, stride=2, bias=False)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        x = self.shortcut(x) + self.expand(self.middle(self.reduce(x)))
        return self.head(x.mean((2, 3)))


def test_bottleneck_block():
    assert_pruned(
        randomised(Bottleneck()),
        IMAGE,
        {"stem": [1, 2, 3], "reduce": [0, 2], "middle": [1], "expand": [0, 1, 5]},
        {
            "stem.weight": {0: [1, 2, 3]},
            "reduce.weight": {0: [0, 2], 1: [1, 2, 3]},
            "middle.weight": {0: [1], 1: [0, 2]},
            "expand.weight": {0: [0, 1, 5], 1: [1]},
            "shortcut.weight": {0: [0, 1, 5], 1: [1, 2, 3]},
            "head.weight": {1: [0, 1, 5]},
        },
    )


class OptionA(nn.Module):
    """The shortcut of CIFAR ResNets: every other pixel, and zeros beside the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        x = self.down(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head(x.mean((2, 3)))


def test_option_a_shortcut_ties_stages_and_makes_unprunable_what_meets_the_padding():
    model = randomised(OptionA())
    assert_pruned(
        model,
        IMAGE,
        {"stem": [0, 2, 3]},
        {
            "stem.weight": {0: [0, 2, 3]},
            "down.weight": {0: [0, 1, 2, 4, 5, 6, 7], 1: [0, 2, 3]},
            "head.weight": {1: [0, 1, 2, 4, 5, 6, 7]},
        },
    )
    graph = lp.trace(model, IMAGE)
    assert graph.unprunable["down"].channels == 4


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolution(multiplier: int):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4 * multiplier, 3, groups=4), nn.Conv2d(4 * multiplier, 2, 1, bias=False)
    )
    behind = [channel * multiplier + i for channel in (0, 3) for i in range(multiplier)]
    assert_pruned(
        randomised(model),
        IMAGE,
        {"0": [0, 3]},
        {
            "0.weight": {0: [0, 3]},
            "0.bias": {0: [0, 3]},
            "1.weight": {0: behind},
            "1.bias": {0: behind},
            "2.weight": {1: behind},
        },
    )


def test_grouped_convolution_loses_whole_groups():
    model = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(6, 9, 3, groups=3, bias=False), nn.Conv2d(9, 2, 1))
    graph = lp.trace(model, IMAGE)
    assert graph.groups["0"].size == 3
    assert graph.groups["0"].width == 2
    assert_pruned(
        randomised(model),
        IMAGE,
        {"0": [0, 2]},
        {
            "0.weight": {0: [0, 1, 4, 5]},
            "1.weight": {0: [0, 1, 2, 6, 7, 8]},
            "2.weight": {1: [0, 1, 2, 6, 7, 8]},
        },
    )


def test_transposed_and_grouped_transposed_convolution():
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2, bias=False),
        nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False),
        nn.ConvTranspose2d(6, 2, 1),
    )
    assert_pruned(
        randomised(model),
        IMAGE,
        {"0": [1]},
        {"0.weight": {1: [2, 3]}, "1.weight": {0: [2, 3]}, "2.weight": {0: [3, 4, 5]}},
    )


def test_flatten_gives_the_linear_layer_blocks_of_columns():
    model = nn.Sequential(nn.Conv2d(3, 3, 7, bias=False), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
    assert_pruned(
        randomised(model),
        IMAGE,
        {"0": [0, 2], "2": [1, 4]},
        {
            "0.weight": {0: [0, 2]},
            "2.weight": {0: [1, 4], 1: [0, 1, 2, 3, 8, 9, 10, 11]},
            "2.bias": {0: [1, 4]},
            "4.weight": {1: [1, 4]},
        },
    )


class Concat(nn.Module):
    """Two branches side by side, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 2, 1, bias=False)
        self.right = nn.Conv2d(3, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(7)
        self.head = nn.Conv2d(7, 2, 1)

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        return self.head(self.norm(torch.cat([left, right, left], dim=1)))


def test_concatenation():
    per_channel = {0: [0, 3, 4, 5]}
    assert_pruned(
        randomised(Concat()),
        IMAGE,
        {"left": [0], "right": [1, 2]},
        {
            "left.weight": {0: [0]},
            "right.weight": {0: [1, 2]},
            "norm.weight": per_channel,
            "norm.bias": per_channel,
            "norm.running_mean": per_channel,
            "norm.running_var": per_channel,
            "head.weight": {1: [0, 3, 4, 5]},
        },
    )


class Excitation(nn.Module):
    """Squeeze and excitation: channels times a number that is computed from them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1, bias=False)
        self.squeeze = nn.Conv2d(4, 3, 1)
        self.excite = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x * torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))))


def test_squeeze_and_excitation():
    assert_pruned(
        randomised(Excitation()),
        IMAGE,
        {"stem": [1, 2], "squeeze": [2]},
        {
            "stem.weight": {0: [1, 2]},
            "squeeze.weight": {0: [2], 1: [1, 2]},
            "squeeze.bias": {0: [2]},
            "excite.weight": {0: [1, 2], 1: [2]},
            "excite.bias": {0: [1, 2]},
            "head.weight": {1: [1, 2]},
        },
    )


def test_a_module_called_twice_ties_what_it_reads_to_what_it_makes():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.ReLU(), shared, nn.Conv2d(4, 2, 1))
    graph = lp.trace(model, IMAGE)
    assert list(graph.groups) == ["0"]
    assert_pruned(
        randomised(model),
        IMAGE,
        {"0": [0, 1]},
        {
            "0.weight": {0: [0, 1]},
            "0.bias": {0: [0, 1]},
            "1.weight": {0: [0, 1], 1: [0, 1]},
            "3.weight": {0: [0, 1], 1: [0, 1]},
            "1.bias": {0: [0, 1]},
            "3.bias": {0: [0, 1]},
            "4.weight": {1: [0, 1]},
        },
    )


def test_prelu_with_a_weight_per_channel():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Conv2d(4, 2, 1))
    assert_pruned(
        randomised(model),
        IMAGE,
        {"0": [3]},
        {"0.weight": {0: [3]}, "0.bias": {0: [3]}, "1.weight": {0: [3]}, "2.weight": {1: [3]}},
    )


def test_linear_on_the_last_of_several_axes():
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))
    assert_pruned(
        randomised(model),
        torch.zeros(2, 7, 4, 3),
        {"0": [0, 2]},
        {"0.weight": {0: [0, 2]}, "0.bias": {0: [0, 2]}, "2.weight": {1: [0, 2]}},
    )


def test_sizes_written_into_the_code_are_unprunable_with_the_module_and_the_line():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(-1, 4, 64).mean(2)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Fixed(), nn.Linear(4, 2))
    graph = lp.trace(model, IMAGE)
    assert not graph.groups
    assert graph.unprunable["0"].reason.startswith("1: relies on the number of its channels (test_indices.py:")


def test_unknown_operators_are_unprunable_with_the_module_and_the_operator():
    class Sorted(nn.Module):
        def forward(self, x):
            return x.cummax(1).values

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Sorted(), nn.Conv2d(4, 2, 1))
    graph = lp.trace(model, IMAGE)
    assert not graph.groups
    assert graph.unprunable["0"].reason == "1: runs aten.cummax, which has no rule"


@pytest.mark.parametrize("model", [Basic(), Bottleneck(), OptionA(), Concat(), Excitation()])
def test_masked_equals_pruned(model: nn.Module):
    model = randomised(model).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = lp.trace(model, x)
    for _ in range(5):
        assert difference(model, graph, random_plan(graph), x) <= 1e-9
