"""Prune in the middle of training under every optimizer of torch and of pytorch_optimizer, and judge the next step.

Each optimizer trains a small convolutional network, with square and other weights, in float64 for some steps; then half
of its channels are pruned. Either that is refused, and network and optimizer are as they were, to the bit, and go on;
or the next step is right. It is judged in two ways, by the largest difference of weights and statistics:

- by the masked twin: a network that has trained the same steps, whose channels are masked in place of pruned, and whose
  step is then sliced. Steps that look at whole tensors or at all of them (norms, orthogonal steps) are others there.
- by the small twin: the pruned weights and the optimizer's ``state_dict`` in a network that was built small, under an
  optimizer that has never seen anything else. What is stale in the optimizer that went on would make a difference.

    python benchmarks/optimizers.py [--results benchmarks/results/optimizers.json] [optimizers ...]

The table of all records is written beside the file. Needs ``pip install pytorch_optimizer``.
"""

import argparse
import contextlib
import copy
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import stored
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.surgery import check, mask

RESULTS = Path(__file__).parent / "results" / "optimizers.json"
STEPS = 12
LIMIT = 1e-6  # of a step, relative to the largest step
WIDTHS = (12, 12, 10, 10)
KEPT = {"0": [0, 2, 5, 7, 11], "3": [1, 2, 6, 8, 9, 10], "8": [0, 3, 4, 9], "10": [1, 2, 3, 7, 8]}
IMAGES = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.randint(4, (16,), generator=torch.Generator().manual_seed(2))
HEAD = "| optimizer | outcome | against the masked twin | against the small twin |\n|---|---|---|---|"

Groups = Callable[[nn.Module], Any]


def network(widths: Iterable[int] = WIDTHS, flat: bool = False) -> nn.Sequential:
    """Return the network; a flat one has matrices alone, for optimizers that take nothing else."""
    torch.manual_seed(0)
    a, b, c, d = widths
    if flat:
        sizes = [(3, a), (a, b), (b, c), (c, d), (d, 4)]
        linear = [nn.Linear(*size, bias=False) for size in sizes]
        layers = dict(zip(["0", "3", "8", "10", "12"], linear, strict=True))
        model = nn.Sequential()
        for name, layer in layers.items():
            model.add_module(name, layer)
            model.add_module(f"{name}_", nn.Tanh())
        return model.double()
    return nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1, bias=False),  # whose gradient would be nothing but rounding
        nn.BatchNorm2d(a),
        nn.ReLU(),
        nn.Conv2d(a, b, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Identity(),
        nn.Linear(b, c),
        nn.Tanh(),
        nn.Linear(c, d),
        nn.Tanh(),
        nn.Linear(d, 4),
    ).double()


# -- how optimizers are made -------------------------------------------------------------------------------------------


def parameters(model: nn.Module) -> Any:
    return list(model.parameters())


def matrices_apart(model: nn.Module, name: str, value: Any) -> Any:
    """Return one group of the parameters with more than one axis, which have a setting of their own, and the rest."""
    inside = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": inside, name: value}, {"params": rest, **({name: False} if value is True else {})}]


def linear_apart(model: nn.Module) -> Any:
    """Return a group of matrices, which are projected to rank 4, and the rest."""
    project = {"rank": 4, "update_proj_gap": 5, "scale": 1.0, "projection_type": "std"}
    flat = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return [{"params": flat, **project}, {"params": rest}]


MATRICES = partial(matrices_apart, name="use_muon", value=True)
GROUPS: dict[str, Groups] = {
    **dict.fromkeys(("muon", "adamuon", "normuon", "adago", "muonclip", "distributedmuon"), MATRICES),
    **dict.fromkeys(("galore", "apollo", "fira"), linear_apart),
    "adammini": lambda model: model,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "bsam": {"num_data": 16},
    "ranger21": {"num_iterations": 100},
    "alice": {"rank": 4, "leading_basis": 2},
    "conda": {"update_proj_gap": 5},
    "torch SGD": {"momentum": 0.9, "weight_decay": 0.01},
    "torch RMSprop": {"momentum": 0.5, "centered": True},
    "torch Adam": {"amsgrad": True},
}
FLAT = {"torch Muon", "spectralsphere"}
# These step within the backward pass, or need ranks, or packages of others.
LEFT_OUT = {"lomo", "adalomo", "demo"}


def collection() -> dict[str, type]:
    import pytorch_optimizer

    names = sorted(pytorch_optimizer.get_supported_optimizers())
    return {name: pytorch_optimizer.load_optimizer(name) for name in names if name not in LEFT_OUT}


def wrappers() -> dict[str, Callable[[Any], Any]]:
    """Return optimizers that step with others."""
    import pytorch_optimizer as collected

    adam = torch.optim.AdamW
    return {
        "lookahead (AdamW)": lambda groups: collected.Lookahead(adam(groups, 1e-2)),
        "schedule-free wrapper (AdamW)": lambda groups: collected.ScheduleFreeWrapper(adam(groups, 1e-2)),
        "trac (AdamW)": lambda groups: collected.TRAC(adam(groups, 1e-2)),
        "orthograd (AdamW)": lambda groups: collected.OrthoGrad(adam(groups, 1e-2)),
        "sam (AdamW)": lambda groups: collected.SAM(groups, base_optimizer=adam, rho=0.05, lr=1e-2),
        "looksam (AdamW)": lambda groups: collected.LookSAM(groups, base_optimizer=adam, rho=0.05, lr=1e-2),
        "friendlysam (AdamW)": lambda groups: collected.FriendlySAM(groups, base_optimizer=adam, rho=0.05, lr=1e-2),
    }


def torch_optimizers() -> dict[str, type]:
    names = [name for name in vars(torch.optim) if not name.startswith("_") and name not in ("Optimizer", "SparseAdam")]
    kinds = {name: getattr(torch.optim, name) for name in sorted(names)}
    return {f"torch {name}": kind for name, kind in kinds.items() if isinstance(kind, type)}


def makers() -> dict[str, Callable[[Any], Any]]:
    """Return what makes each optimizer from the parameters of a network, by name."""
    found: dict[str, Callable[[Any], Any]] = {}
    for name, kind in {**torch_optimizers(), **collection()}.items():
        found[name] = partial(made, kind, SETTINGS.get(name, {}))
    return {**found, **wrappers()}


def made(kind: type, settings: dict[str, Any], groups: Any) -> Any:
    with contextlib.suppress(TypeError):
        return kind(groups, lr=1e-2, **settings)
    return kind(groups, **settings)


# -- one optimizer -----------------------------------------------------------------------------------------------------


class Training:
    """A network under an optimizer."""

    def __init__(self, name: str, widths: Iterable[int] = WIDTHS) -> None:
        self.model = network(widths, name in FLAT)
        self.images = IMAGES.mean((2, 3)) if name in FLAT else IMAGES
        self.second_order = name in ("adahessian", "sophiah")
        self.optimizer = makers()[name](GROUPS.get(name, parameters)(self.model))
        if hasattr(self.optimizer, "train"):  # one that evaluates other weights than those it trains
            self.optimizer.train()

    def step(self, seed: int) -> None:
        """Step once, with a seed for what is drawn at random."""
        torch.manual_seed(seed)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(self.images), LABELS)
            loss.backward(create_graph=self.second_order)
            return loss

        self.optimizer.step(closure)

    def train(self) -> "Training":
        """Take the steps before the prune."""
        for seed in range(STEPS):
            self.step(seed)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of the weights and statistics."""
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def plan(self) -> Any:
        """Return the plan that halves the network."""
        return lp.trace(self.model, self.images).plan({name: torch.tensor(kept) for name, kept in KEPT.items()})


def record(name: str) -> dict[str, Any]:
    """Prune under one optimizer, and judge what comes after."""
    try:
        training, twin = Training(name).train(), Training(name).train()
    except Exception as error:  # whatever it is, it is not about pruning
        return {"outcome": "not usable alone", "sentence": f"{type(error).__name__}: {error}"}
    plan = training.plan()
    before, state = training.tensors(), copy.deepcopy(training.optimizer.state_dict())
    try:
        lp.prune(training.model, plan, [training.optimizer])
    except TypeError as error:
        unchanged = same(training.tensors(), before) and same(training.optimizer.state_dict(), state)
        training.step(STEPS)
        twin.step(STEPS)
        goes_on = same(training.tensors(), twin.tensors())
        return {"outcome": "refused" if unchanged and goes_on else "WRONG", "sentence": str(error)}
    mask(lp.trace(twin.model, twin.images), plan)
    small = small_twin(name, training)
    start = training.tensors()
    for one in filter(None, (training, twin, small)):
        one.step(STEPS)
    of_mask = difference(start, training.tensors(), sliced(twin.tensors(), plan))
    of_small = None if small is None else difference(start, training.tensors(), small.tensors())
    for seed in range(STEPS + 1, STEPS + 4):
        training.step(seed)
    return {"outcome": outcome(of_mask, of_small), "masked twin": of_mask, "small twin": of_small}


def outcome(of_mask: float, of_small: float | None) -> str:
    if of_mask <= LIMIT:
        return "sliced, steps as the masked twin"
    if of_small is not None and of_small <= LIMIT:
        return "sliced, steps as the small twin"
    return "WRONG"


def small_twin(name: str, training: Training) -> Training | None:
    """Return a network that was built small, with the weights of a pruned one and the state of its optimizer."""
    small = Training(name, [len(kept) for kept in KEPT.values()])
    small.model.load_state_dict(training.model.state_dict())
    with contextlib.suppress(Exception):  # some optimizers cannot load what they have saved
        small.step(0)  # some make their state when they first step
        small.model.load_state_dict(training.model.state_dict())
        families = [[one.optimizer, *check(one.model, [one.optimizer])] for one in (small, training)]
        for fresh, other in zip(*families, strict=True):
            fresh.load_state_dict(copy.deepcopy(other.state_dict()))
        for parameter, other in zip(small.model.parameters(), training.model.parameters(), strict=True):
            parameter.grad = None if other.grad is None else other.grad.clone()  # some look at that of the last step
        return small
    return None


def sliced(tensors: dict[str, Tensor], plan: Any) -> dict[str, Tensor]:
    for name, axes in plan.index().items():
        for axis, kept in axes.items():
            tensors[name] = tensors[name].index_select(axis, kept)
    return tensors


def difference(start: dict[str, Tensor], found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest difference of two steps, as a fraction of the largest step of that tensor."""
    largest = 0.0
    for name, tensor in found.items():
        apart = (tensor - wanted[name]).double().abs().max()
        step = (tensor - start[name]).double().abs().max()
        if apart > 0:
            largest = max(largest, (apart / step).item())
    return largest


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return not isinstance(one, int | float | str) or one == other or one != one


# -- the table ---------------------------------------------------------------------------------------------------------


def table(records: dict[str, dict[str, Any]]) -> str:
    """Return the page that is made from the records."""
    outcomes = [each["outcome"] for each in records.values()]
    masked, small, refused, unusable = (
        sum(each.startswith(kind) for each in outcomes)
        for kind in ("sliced, steps as the masked", "sliced, steps as the small", "refused", "not usable")
    )
    counts = (
        f"{len(outcomes)} optimizers: {masked} step as the masked twin, {small} look at more than single elements and "
        f"step as the small twin, {refused} are refused before anything changes, {unusable} could not be used alone, "
        f"{outcomes.count('WRONG')} wrong."
    )
    return "\n".join(["# Optimizers", "", counts, "", HEAD, *(row(*item) for item in records.items()), ""])


def row(name: str, found: dict[str, Any]) -> str:
    sentence = " ".join(found.get("sentence", "").split()).replace("|", "/")
    told = f"{found['outcome']}: {sentence}" if sentence else found["outcome"]
    figures = [found.get(key) for key in ("masked twin", "small twin")]
    cells = [name, told, *("-" if figure is None else f"{figure:.0e}" for figure in figures)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizers", nargs="*")
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    version = metadata.version("pytorch_optimizer")
    content = stored.load(settings.results)
    content["made"] = {"hardware": stored.hardware(), "torch": torch.__version__, "pytorch_optimizer": version}
    records = content.setdefault("optimizers", {})
    for name in settings.optimizers or makers():
        try:
            records[name] = record(name)
        except Exception as error:
            records[name] = {"outcome": "BROKEN", "sentence": f"{type(error).__name__}: {error}"}
        print(row(name, records[name]), flush=True)
    stored.save(settings.results, content)
    settings.results.with_suffix(".md").write_text(table(records))
    sys.exit(any(each["outcome"] in ("WRONG", "BROKEN") for each in records.values()))


if __name__ == "__main__":
    main()
