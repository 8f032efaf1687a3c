"""Average filter information entropy: by loops, by hand, and inside the bounds that the shapes alone set."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.criteria.filter_entropy import spectrum_entropy
from lightning_prune.planning.by_layer import plan_by_layer

# The most that the entropy of values in [0, 1], put through a softmax, can be below that of equal ones: with a share f
# of them at 1 and the rest at 0 it is f e / (1 - f + f e) - ln(1 - f + f e), at its largest near f = 0.339.
DEFICIT = max(f * math.e / (1 - f + f * math.e) - math.log(1 - f + f * math.e) for f in np.linspace(0, 1, 10_001))
VGG16 = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]


def by_loops(weight: Tensor, flatten: bool = False) -> float:
    """The entropy of one layer's weights, divided by the number of filters."""
    rows = [
        [float(number) for number in row.flatten()] if flatten else [float(kernel.mean()) for kernel in row]
        for row in weight.detach().double()
    ]
    values = np.sqrt(np.clip(np.linalg.eigvalsh(np.array(rows).T @ np.array(rows)), 0, None))[::-1]
    values = values[: min(len(rows), len(rows[0]))]
    scaled = [(value - min(values)) / (max(values) - min(values)) for value in values]
    total = sum(math.exp(value) for value in scaled)
    return -sum(math.exp(value) / total * math.log(math.exp(value) / total) for value in scaled) / len(rows)


class Network(nn.Module):
    """A shortcut, a depthwise convolution, a layer with one input and a linear layer."""

    def __init__(self, inputs: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(inputs, 8, 3, padding=1)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.hidden = nn.Linear(12, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.block(torch.relu(x)))
        return self.head(torch.relu(self.hidden(self.depthwise(self.wide(x)).mean((2, 3)))))


@pytest.mark.parametrize("flatten", [False, True])
def test_against_loops(flatten: bool) -> None:
    model = Network()
    found = lp.criteria.afie(lp.trace(model, torch.zeros(1, 3, 8, 8)), flatten)
    wide = by_loops(model.wide.weight)
    if flatten:  # nine numbers of each filter of the depthwise convolution
        wide = (wide + by_loops(model.depthwise.weight, flatten)) / 2
    assert found == pytest.approx(
        {
            "stem": (by_loops(model.stem.weight, flatten) + by_loops(model.block.weight, flatten)) / 2,
            "wide": wide,
            "hidden": by_loops(model.hidden.weight),
        },
        rel=1e-6,
    )


def test_by_hand() -> None:
    """Singular values 3, 2, 1 become 1, 1/2, 0; kernels whose numbers cancel have none."""
    matrix = torch.zeros(4, 3)
    matrix[:3] = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    weights = torch.tensor([math.exp(1), math.exp(0.5), 1.0]) / (math.exp(1) + math.exp(0.5) + 1)
    entropy = -float((weights * weights.log()).sum())
    assert spectrum_entropy(matrix) == pytest.approx(entropy, rel=1e-6)
    model = nn.Sequential(nn.Conv2d(3, 4, (1, 2), bias=False), nn.ReLU(), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.stack([2 * matrix, torch.zeros(4, 3)], dim=2).unsqueeze(2))
    graph = lp.trace(model, torch.zeros(1, 3, 4, 4))
    assert lp.criteria.afie(graph) == pytest.approx({"0": entropy / 4}, rel=1e-6)
    assert lp.criteria.afie_of_shapes(graph) == pytest.approx({"0": math.log(3) / 4})


@settings(max_examples=200, deadline=None)
@given(
    filters=st.integers(2, 40),
    inputs=st.integers(2, 40),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["normal", "uniform", "heavy", "rank one", "orthogonal", "constant", "zero", "tiny"]),
)
def test_inside_the_bound_of_the_shape(filters: int, inputs: int, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(filters, inputs, generator=generator)
    matrix = {
        "normal": normal,
        "uniform": torch.rand(filters, inputs, generator=generator),
        "heavy": normal**9,
        "rank one": normal[:, :1] * normal[:1],
        "orthogonal": torch.linalg.qr(normal if filters >= inputs else normal.T).Q,
        "constant": torch.ones(filters, inputs),
        "zero": torch.zeros(filters, inputs),
        "tiny": normal * 1e-30,
    }[kind]
    p, entropy = min(matrix.shape), spectrum_entropy(matrix)
    assert math.log(p) - DEFICIT - 1e-9 <= entropy <= math.log(p) + 1e-9
    if kind in ("orthogonal", "zero"):
        assert entropy == pytest.approx(math.log(p), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tells_nearly_the_same(dtype: torch.dtype) -> None:
    for shape in ((64, 576), (512, 512), (16, 27)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found, expected = spectrum_entropy(matrix.to(dtype)), spectrum_entropy(matrix)
        assert abs(found - expected) < 0.01 * (math.log(min(shape)) - expected)


def test_the_bound_is_that_of_the_derivation() -> None:
    assert pytest.approx(0.1233, abs=1e-4) == DEFICIT


def test_layers_with_one_input_count_as_the_others_do() -> None:
    graph = lp.trace(Network(inputs=1), torch.zeros(1, 1, 8, 8))
    assert lp.criteria.afie(graph)["stem"] == pytest.approx(by_loops(graph.model.block.weight), rel=1e-6)
    plain = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = lp.trace(plain, torch.zeros(1, 1))
    found = lp.criteria.afie(graph)
    assert found["0"] == found["2"] == pytest.approx(by_loops(plain[2].weight), rel=1e-6)
    graph = lp.trace(nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 1))
    assert lp.criteria.afie(graph) == lp.criteria.afie_of_shapes(graph) == {"0": 1.0}


def test_vgg16_at_half_of_its_filters() -> None:
    """What the upper ends of the bounds give each convolution, with a budget that counts filters."""
    layers: list[nn.Module] = []
    for inputs, filters in zip([3, *VGG16], VGG16, strict=False):
        layers += [nn.Conv2d(inputs, filters, 3, padding=1), nn.ReLU()]
    with torch.device("meta"):
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 * 4, 10))
    model = model.to_empty(device="cpu")
    graph = lp.trace(model, torch.zeros(1, 3, 2, 2))
    control = lp.criteria.afie_of_shapes(graph)
    upper = [0.01717, 0.06498, 0.03249, 0.03791, 0.01895, 0.02166, 0.02166, 0.01083, *[0.01218] * 5]
    assert list(control.values()) == pytest.approx(upper, abs=1e-5)
    plan = plan_by_layer(graph, control, lp.criteria.random(graph), 0.5, "channels", round_to=1)
    pruned = [1 - width / size for width, size in zip(plan.widths.values(), VGG16, strict=True)]
    assert pruned == pytest.approx([0.40, 0.11, 0.21, 0.18, 0.36, 0.32, 0.32, 0.64, *[0.57] * 5], abs=0.01)
    assert plan.budget["achieved"] == 0.5
