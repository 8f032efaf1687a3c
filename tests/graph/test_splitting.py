"""Networks that take channels apart, shuffle them or gate them: prunable where exact, unprunable where not."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine import assert_pruned, difference, random_plan, randomised
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import Unprunable
from lightning_prune.graph.run import Forward
from lightning_prune.planning.reachability import reachable

IMAGE = torch.zeros(2, 3, 8, 8)


class Around(nn.Module):
    """A function of channels between a convolution that makes them and one that reads them."""

    def __init__(self, between, channels: int = 8, read: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 1)
        self.between = between
        self.head = nn.Conv2d(read, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.stem(x)))


def halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return first * torch.sigmoid(second)


def sliced_halves(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return x[:, :half] * torch.sigmoid(x[:, half:])


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def stacked_halves(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).sum(1)


EXACT = {
    "chunk and multiply": (halves, 4, {0: [1, 3, 5, 7]}, [1, 3]),
    "glu": (lambda x: F.glu(x, 1), 4, {0: [1, 3, 5, 7]}, [1, 3]),
    "slices": (sliced_halves, 4, {0: [1, 3, 5, 7]}, [1, 3]),
    "split back together": (
        lambda x: torch.cat(x.split(x.shape[1] // 2, 1)[::-1], 1),
        8,
        {0: [1, 3, 5, 7]},
        [1, 3, 5, 7],
    ),
    "shuffle": (shuffle, 8, {0: [1, 3, 5, 7]}, [2, 3, 6, 7]),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), 8, {0: [1, 3, 5, 7]}, [2, 3, 6, 7]),
    "added halves by view": (stacked_halves, 4, {0: [1, 3, 5, 7]}, [1, 3]),
}


@pytest.mark.parametrize("case", EXACT)
def test_halves_are_pruned_together(case: str):
    between, read, makes, reads = EXACT[case]
    model = randomised(Around(between, 8, read))
    assert lp.trace(model, IMAGE).groups["stem"].size == 4
    assert_pruned(
        model,
        IMAGE,
        {"stem": [1, 3]},
        {"stem.weight": makes, "stem.bias": makes, "head.weight": {1: reads}},
    )


def test_pixel_shuffle_takes_blocks_and_unshuffle_gives_them():
    assert_pruned(
        randomised(Around(nn.PixelShuffle(2), 12, 3)),
        IMAGE,
        {"stem": [0, 2]},
        {
            "stem.weight": {0: [0, 1, 2, 3, 8, 9, 10, 11]},
            "stem.bias": {0: [0, 1, 2, 3, 8, 9, 10, 11]},
            "head.weight": {1: [0, 2]},
        },
    )
    assert_pruned(
        randomised(Around(nn.PixelUnshuffle(2), 3, 12)),
        IMAGE,
        {"stem": [0, 2]},
        {
            "stem.weight": {0: [0, 2]},
            "stem.bias": {0: [0, 2]},
            "head.weight": {1: [0, 1, 2, 3, 8, 9, 10, 11]},
        },
    )


def test_groups_of_group_norm_are_pruned_as_one():
    model = Around(nn.GroupNorm(2, 8))
    graph = lp.trace(model, IMAGE)
    assert graph.groups["stem"].size == 2
    assert graph.groups["stem"].mask_exact
    back = list(range(4, 8))
    assert_pruned(
        randomised(model),
        IMAGE,
        {"stem": [1]},
        {name: {0: back} for name in ("stem.weight", "stem.bias", "between.weight", "between.bias")}
        | {"head.weight": {1: back}},
    )


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (
            lambda x: F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2),
            "is normalised over its channels",
        ),
        (lambda x: x * x.sum(1, keepdim=True), "is summed over its channels"),
        (lambda x: x * x.mean(1, keepdim=True), "takes mean over its channels"),
        (lambda x: x * x.amax(1, keepdim=True), "takes amax over its channels"),
        (lambda x: x * x.max(1, keepdim=True).values, "takes max over its channels"),
        (lambda x: F.normalize(x), "takes linalg_vector_norm over its channels"),
        (lambda x: F.group_norm(x, 1), "is normalised over its channels"),
    ],
)
def test_statistics_over_channels_are_not_mask_exact(between, why: str):
    graph = lp.trace(Around(between), IMAGE)
    assert why in graph.groups["stem"].not_mask_exact


SQUEEZED = {
    "every axis of one": (lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(), 2),
    "the channels, if one": (lambda x: x.mean(3).squeeze(1).mean(-1), 2),
    "pixels": (lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), 1),
    "several of each channel": (lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1).squeeze(), 1),
}


@pytest.mark.parametrize("case", SQUEEZED)
def test_channels_that_a_squeeze_would_drop_do_not_become_a_single_one(case: str):
    between, least = SQUEEZED[case]
    model = Around(between)
    model.head = nn.Linear(32 if case.startswith("several") else 8, 2)
    graph = lp.trace(model, IMAGE)
    assert graph.groups["stem"].least == least
    plan = lp.plan(graph, lp.criteria.magnitude(graph), reachable(graph, "params", round_to=1), "params", round_to=1)
    lp.prune(model, plan)
    assert model.stem.out_channels == least
    assert model(IMAGE).shape == (2, 2)


def over_rows(norm: nn.Module) -> nn.Module:
    """Normalise 8 tokens over their channels."""
    tokens, image = Permuted(0, 2, 1), Permuted(0, 2, 1)
    return nn.Sequential(nn.AdaptiveAvgPool2d((8, 1)), nn.Flatten(2), tokens, norm, image, nn.Unflatten(2, (8, 1)))


class Permuted(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


NORMALISED = {
    "of a weight": (Standardised(8, 8, 1), 2),
    "of each instance": (over_rows(nn.InstanceNorm1d(8)), 2),
    "of groups": (over_rows(nn.GroupNorm(8, 8)), 2),
    "of two tokens each": (over_rows(nn.GroupNorm(4, 8)), 1),
    "of the batch": (over_rows(nn.BatchNorm1d(8, track_running_stats=False)), 1),
}


@pytest.mark.parametrize("case", NORMALISED)
def test_two_channels_are_kept_where_one_would_have_no_variance(case: str):
    between, least = NORMALISED[case]
    model = randomised(Around(between))
    graph = lp.trace(model, IMAGE)
    assert graph.groups["stem"].least == least
    lp.prune(model, graph.plan({"stem": torch.arange(least)}))
    assert bool(model(IMAGE[:1] if case == "of groups" else IMAGE).isfinite().all())


MADE_ANYWHERE = {
    "subtracted": lambda x: x - torch.full((1, 1, 8, 8), 0.5),
    "compared with": lambda x: x.masked_fill(torch.tril(torch.ones(8, 8)) == 0, -1.0).softmax(-1),
    "compared with, in place": lambda x: x.clone().masked_fill_(torch.eye(8, dtype=torch.bool), 0.0),
    "chosen by": lambda x: torch.where(torch.ones(8, 8) > 0, x, 0.0),
}


@pytest.mark.parametrize("case", MADE_ANYWHERE)
def test_a_constant_that_names_no_device_makes_nothing_unprunable(case: str, monkeypatch: pytest.MonkeyPatch):
    real = []
    monkeypatch.setattr(
        Forward, "real", property(lambda self: False, lambda self, value: real.append(value)), raising=False
    )
    assert list(lp.trace(Around(MADE_ANYWHERE[case]), IMAGE).groups) == ["stem"]
    assert not any(real)


def test_a_constant_beside_the_input_makes_nothing_unprunable():
    class Placed(Around):
        def forward(self, x):
            line = torch.linspace(0, 1, x.shape[-1]).expand(x.shape[0], 1, x.shape[-2], -1)
            return super().forward(torch.cat([x[:, :2], line], 1))

    assert list(lp.trace(Placed(torch.relu), IMAGE).groups) == ["stem"]


def hard_coded(x: Tensor) -> Tensor:
    return x.reshape(-1, 8, 8, 8) * 2


def hard_split(x: Tensor) -> Tensor:
    first, second = x.split([4, 4], 1)
    return torch.cat([second, first], 1)


def hard_swap(x: Tensor) -> Tensor:
    """Runs at any width, with the channels in another order below the one it was written for."""
    return torch.cat([x[:, 4:], x[:, :4]], 1) * x


def scaled_by_width(x: Tensor) -> Tensor:
    return x * x.shape[1] ** -0.5


def branching_on_width(x: Tensor) -> Tensor:
    return torch.relu(x) if x.shape[1] > 6 else torch.sigmoid(x)


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Mixed(torch.autograd.Function):
    """Written for mixed precision, which wraps both of its functions."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, gradient):
        return gradient * 2


UNPRUNABLE = {
    "a size in a view": (hard_coded, "relies on the number of its channels"),
    "sizes in a split": (hard_split, "relies on the number of its channels"),
    "sizes in slices that fit any width": (hard_swap, "relies on the number of its channels"),
    "a number from the width": (scaled_by_width, "computes with the number of its channels"),
    "a branch on the width": (branching_on_width, "computes with the number of its channels"),
    "a named number": (lambda x: torch.add(x, x, alpha=x.shape[1]), "computes with the number of its channels"),
    "a constant": (
        lambda x: x / torch.sqrt(torch.tensor(float(x.shape[1]))),
        "computes with the number of its channels",
    ),
    "a constant on a device": (
        lambda x: x * torch.tensor([x.shape[1] ** -0.5], device=x.device),
        "computes with the number of its channels",
    ),
    "a constant like another": (lambda x: x * x.new_tensor(x.shape[1]), "computes with the number of its channels"),
    "a constant of an old kind": (
        lambda x: x * torch.Tensor([x.shape[1] ** -0.5]),
        "computes with the number of its channels",
    ),
    "a constant of an array": (
        lambda x: x * torch.from_numpy(np.array([x.shape[1] ** -0.5], dtype=np.float32)),
        "computes with the number of its channels",
    ),
    "one of several constants": (
        lambda x: x * torch.tensor([1.0, x.shape[1] ** -0.5], device=x.device)[1],
        "computes with the number of its channels",
    ),
    "filled in place": (
        lambda x: x * torch.empty(1, device=x.device).fill_(x.shape[1]),
        "computes with the number of its channels",
    ),
    "ones that are counted": (
        lambda x: x / torch.ones(x.shape[1], device=x.device).sum(),
        "computes with the number of its channels",
    ),
    "ones like others that are counted": (
        lambda x: x / x.new_ones(x.shape).sum(),
        "computes with the number of its channels",
    ),
    "a mean of numbers up to the width": (
        lambda x: x * torch.arange(x.shape[1], device=x.device).float().mean(),
        "computes with the number of its channels",
    ),
    "filled": (
        lambda x: x * torch.full((1,), x.shape[1] ** -0.5, device=x.device),
        "computes with the number of its channels",
    ),
    "filled like another": (
        lambda x: x * torch.full_like(x, x.shape[1]),
        "computes with the number of its channels",
    ),
    "number of the largest channel": (lambda x: x * x.argmax(1, keepdim=True), "takes argmax over its channels"),
    "the number beside the largest": (
        lambda x: x * x.max(1, keepdim=True).indices,
        "has its channels told apart by number",
    ),
    "softmax over channels": (lambda x: x.softmax(1), "runs softmax along its channels"),
    "one channel picked": (lambda x: x * x[:, 0].unsqueeze(1), "has its channels picked by select"),
    "a custom autograd function": (Doubling.apply, "runs the autograd function Doubling"),
    "one for mixed precision": (Mixed.apply, "runs the autograd function Mixed"),
    "an unknown operator": (lambda x: x.cummax(1).values, "runs aten.cummax, which has no rule"),
    "what a mask over channels picks": (lambda x: x * x[x > 0].mean(), "has its channels picked by index"),
    "values in a list": (
        lambda x: x * torch.tensor(x.abs().tolist()).mean(),
        "looks at values, and may do something else for others",
    ),
    "complex numbers": (lambda x: torch.fft.fft2(x).real, "has no rule"),
}


@pytest.mark.parametrize("case", UNPRUNABLE)
def test_unprunable_with_module_and_reason(case: str):
    between, why = UNPRUNABLE[case]
    graph = lp.trace(Around(between), IMAGE)
    assert "stem" not in graph.groups
    assert graph.unprunable["stem"].reason.startswith("Around: ")
    assert why in graph.unprunable["stem"].reason
    if why.endswith("number of its channels"):
        assert "(test_splitting.py:" in graph.unprunable["stem"].reason


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (lambda x, channels: x * channels**-0.5, "computes with the number of its channels"),
        (lambda x, channels: x.sigmoid() if channels > 6 else x, "computes with the number of its channels"),
        (lambda x, channels: x * 0.5, ""),
    ],
)
def test_an_output_of_one_channel_tells_of_the_width(after, why: str):
    class Narrow(Around):
        def forward(self, x):
            x = self.stem(x)
            return after(self.head(x), x.shape[1])

    model = Narrow(None)
    model.head = nn.Conv2d(8, 1, 1)
    graph = lp.trace(model, IMAGE)
    assert why in graph.unprunable["stem"].reason if why else "stem" in graph.groups


class Heads(nn.Module):
    """Splits channels into heads of a number and size that are written down, as attention does."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.inner, self.out, self.up, self.down = (nn.Linear(*s) for s in ((8, 6), (6, 8), (8, 10), (10, 8)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.where == "operator":
            y = y.view(*y.shape[:-1], 2, 3).flatten(-2)
        elif self.where == "code" and y.shape[-1] != 6:
            raise ValueError("six!")
        elif self.where == "given" and x.shape[-1] != 8:
            raise ValueError("eight!")
        return x + self.down(torch.relu(self.up(x + self.out(y))))


@pytest.mark.parametrize(("where", "unprunable"), [("operator", "inner"), ("code", "inner"), ("given", "")])
def test_all_modules_that_fail_are_found_in_few_runs(where: str, unprunable: str, monkeypatch: pytest.MonkeyPatch):
    runs = []
    run = Forward.run
    monkeypatch.setattr(Forward, "run", lambda self, *args: (runs.append(1), run(self, *args))[1])
    model = nn.Sequential(nn.Linear(3, 8), *(Heads(where) for _ in range(12)), nn.Linear(8, 2))
    graph = lp.trace(model, torch.zeros(2, 5, 3))
    assert len(runs) <= 10
    blocks = range(1, 13)
    if unprunable:
        assert {f"{i}.{unprunable}" for i in blocks} | {"13"} == set(graph.unprunable)
        assert all(
            graph.unprunable[f"{i}.{unprunable}"].reason.startswith(f"{i}: relies on the number") for i in blocks
        )
        assert set(graph.groups) == {"0", *(f"{i}.up" for i in blocks)}, "what is innocent is free"
    else:
        stream = {"0", *(f"{i}.{layer}" for i in blocks for layer in ("out", "down"))}
        assert stream | {"13"} == set(graph.unprunable)
        assert graph.unprunable["0"].reason.startswith("1: relies on the number of its channels (test_splitting.py:")


def test_a_hook_of_the_model_itself_that_relies_on_a_width_makes_it_unprunable():
    model = Around(torch.relu)

    def check(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if module.stem.out_channels != 8:
            raise ValueError("eight!")

    model.register_forward_hook(check)
    graph = lp.trace(model, IMAGE)
    assert not graph.groups
    assert graph.unprunable["stem"].reason.startswith("the model: relies on the number of its channels (test_splitting")


class Careful(nn.Module):
    """Does something else for some values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.abs().sum() > 0 else self.other(x)


def test_control_flow_on_values_makes_unprunable_the_module_and_what_it_is_given():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), Careful(), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1))
    graph = lp.trace(model, torch.ones(2, 3, 8, 8))
    assert list(graph.groups) == ["0", "3"]
    assert graph.unprunable["1"].reason == "2: looks at values, and may do something else for others"


class Masked(nn.Module):
    """Looks at a mask that it is given; does without it where it is of no use."""

    def __init__(self, look: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.look, self.stem, self.head = look, nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(x if self.look(mask) else x * mask[..., None])


LOOKS = {
    "a condition": lambda mask: mask.all(),
    "a number": lambda mask: int(mask.sum(1).max()) == mask.shape[1],
    "a list": lambda mask: min(mask.flatten().tolist()) == 1,
    "an array": lambda mask: mask.cpu().numpy().min() == 1,
}


@pytest.mark.parametrize("case", LOOKS)
@pytest.mark.parametrize("of_use", [False, True])
def test_looking_at_values_of_the_inputs_alone_holds_nothing(case: str, of_use: bool):
    model = randomised(Masked(LOOKS[case]).double()).eval()
    mask = torch.ones(2, 5, dtype=torch.float64)
    mask[0, 3:] = 0 if of_use else 1
    inputs = torch.randn(2, 5, 8, dtype=torch.float64), mask
    graph = lp.trace(model, inputs)
    assert graph.groups["stem"].mask_exact
    for given in (inputs, (inputs[0], torch.ones(2, 5, dtype=torch.float64))):
        assert difference(model, graph, random_plan(graph), given) <= 1e-9


class CarefulOfInputs(Careful):
    """Uses another layer for other inputs."""

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        return self.one(x) if given.sum() > 0 else self.other(x)


class Given(nn.Module):
    """Gives its input on, beside what a layer makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.careful, self.head = nn.Conv2d(8, 8, 1), CarefulOfInputs(), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.careful(self.stem(x), x))


def test_a_layer_for_other_values_of_the_inputs_keeps_the_module_whole():
    graph = lp.trace(Given(), torch.ones(2, 8, 8, 8))
    assert not graph.groups
    assert graph.unprunable["stem"].reason == "careful: looks at values, and may do something else for others"


class Picking(nn.Module):
    """Picks rows by their scores, as detectors do; how many there are depends on the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.score, self.head = nn.Linear(8, 6), nn.Linear(6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        rows = torch.where(self.score(x)[:, 0] > 0)[0]
        return self.head(x[rows])


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_are_picked_by_their_values_hold_no_channels(seed: int):
    torch.manual_seed(seed)
    model = randomised(Picking().double()).eval()
    x = torch.randn(7, 8, dtype=torch.float64)
    graph = lp.trace(model, x)
    assert graph.groups["stem"].mask_exact
    assert difference(model, graph, random_plan(graph), x) <= 1e-9


@dataclass
class Output:
    """An output that PyTorch does not look into."""

    features: Tensor
    more: dict


@dataclass(slots=True)
class InSlots:
    """An output that has no dictionary."""

    features: Tensor
    more: dict


class OneSlot:
    """Some of its attributes are in a slot, others in a dictionary, one is not set."""

    __slots__ = "features"


class TwoSlots(OneSlot):
    """An output that inherits a slot."""

    __slots__ = ("__dict__", "missing")

    def __init__(self, features: Tensor, more: dict) -> None:
        self.features, self.more = features, more


@pytest.mark.parametrize("kind", [Output, InSlots, TwoSlots])
def test_tensors_in_any_output_are_unprunable(kind: type):
    class Nested(Around):
        def forward(self, x):
            x = self.stem(x)
            return kind(self.head(x), {"list": [(x, None)]})

    graph = lp.trace(Nested(None), IMAGE)
    assert not graph.groups
    assert graph.unprunable["stem"].reason == "stem: is an output of the network"
    assert "head" in graph.unprunable


def test_nested_inputs():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(3, 6), nn.Linear(2, 6), nn.Linear(6, 2)

        def forward(self, inputs, scale=1.0, *, extra):
            return self.head(self.left(inputs["a"]) + self.right(inputs["b"][0]) * scale + extra)

    inputs = {"inputs": {"a": torch.zeros(2, 3), "b": [torch.zeros(2, 2)]}, "scale": 2.0, "extra": torch.zeros(2, 1)}
    graph = lp.trace(Nested(), inputs)
    assert [part.tensor for part in graph.groups["left"].out_slices] == ["left.weight", "right.weight"]


def test_hidden_width_of_a_transformer_layer():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
    graph = lp.trace(model, torch.zeros(2, 5, 16))
    assert (graph.groups["linear1"].size, graph.groups["linear1"].not_mask_exact) == (32, "")


@pytest.mark.parametrize(
    ("between", "channels", "read"), [(nn.PixelShuffle(2), 24, 6)] + [(case[0], 8, case[1]) for case in EXACT.values()]
)
def test_masked_equals_pruned(between, channels: int, read: int):
    model = randomised(Around(between, channels, read)).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = lp.trace(model, x)
    for _ in range(4):
        plan = random_plan(graph, exact_only=True)
        assert not plan.groups or difference(model, graph, plan, x) <= 1e-9


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("first", [nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(3, 8, 3), nn.Conv2d(3, 8, 3, bias=False)])
def test_spectral_norm_makes_no_channels_of_what_a_layer_consumes(first: nn.Module, norm: Callable, training: bool):
    layers = copy.deepcopy(first), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 2, 1)
    model = nn.Sequential(*(norm(layer) for layer in layers)).train(training)
    graph = lp.trace(model, torch.zeros(2, 3, 8, 8))
    assert [(group.size, group.mask_exact) for group in graph.groups.values()] == [(8, False), (6, False)]
    [(name, unprunable)] = graph.unprunable.items()
    assert (name.partition(".")[0], unprunable.channels) == ("2", 2)
    lp.prune(model, random_plan(graph))
    assert model(torch.zeros(2, 3, 8, 8)).shape[1] == 2


def test_weight_norm_makes_channels_from_two_parameters():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 1)), nn.ReLU(), nn.Conv2d(8, 2, 1)
    ).double()
    graph = lp.trace(model, IMAGE.double())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for _ in range(3):
        assert difference(model.eval(), graph, random_plan(graph), x) <= 1e-9


def test_a_grouped_convolution_of_computed_weight_does_not_touch_others():
    def normed(*sizes: int, groups: int = 1) -> nn.Module:
        return nn.utils.parametrizations.weight_norm(nn.Conv1d(*sizes, groups=groups))

    model = nn.Sequential(normed(3, 8, 1), normed(8, 8, 3, groups=8), normed(8, 16, 1), nn.ReLU(), nn.Conv1d(16, 2, 1))
    graph = lp.trace(randomised(model.double()), torch.zeros(2, 3, 8, dtype=torch.float64))
    assert graph.groups["2.parametrizations.weight"].size == 16
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert difference(model, graph, random_plan(graph, exact_only=True), x) <= 1e-9


def test_refusals():
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet; run the model once on a batch"):
        lp.trace(nn.Sequential(nn.LazyLinear(4)), IMAGE)
    with pytest.raises(ValueError, match=r"The model is spread over cpu, meta; move it to one device"):
        lp.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1, device="meta")), IMAGE)
    with pytest.raises(ValueError, match="The ignore pattern 'layer9' matches no module"):
        lp.trace(nn.Sequential(nn.Conv2d(3, 4, 1)), IMAGE, ignore=["layer9"])
    with pytest.raises(ValueError, match="The model has no module 'network'"):
        lp.trace(nn.Sequential(nn.Conv2d(3, 4, 1)), IMAGE, module="network")


class Pieces(nn.Module):
    """Returns its output piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor):
        yield self.stem(x)


def test_nothing_is_seen_to_make_channels():
    assert lp.trace(nn.ReLU(), IMAGE).unprunable == {}
    graph = lp.trace(Pieces(), IMAGE)
    assert not graph.groups
    assert graph.unprunable["stem"] == Unprunable(
        8, "stem: is used by no operator of the forward pass in evaluation mode"
    )


def test_ignored_modules_are_unprunable_with_the_pattern():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    graph = lp.trace(model, IMAGE, ignore=["0"])
    assert list(graph.groups) == ["1"]
    assert graph.unprunable["0"].reason == "0: is ignored by the pattern '0'"


def test_a_rule_of_ones_own():
    @torch.library.custom_op("lightning_prune_tests::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)
    from lightning_prune.graph import rule
    from lightning_prune.graph.rules import RULES

    model = Around(lambda x: twice(x))
    assert "runs lightning_prune_tests.twice, which has no rule" in lp.trace(model, IMAGE).unprunable["stem"].reason

    @rule("lightning_prune_tests.twice")
    def keep_labels(tracer, call):
        tracer.set_labels(call.output, tracer.all_labels(call.args[0]))

    try:
        assert list(lp.trace(model, IMAGE).groups) == ["stem"]
    finally:
        RULES.pop("lightning_prune_tests.twice")
