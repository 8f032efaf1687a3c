"""What trains is what is traced: projects whose networks are given other things, or run in other ways, than forward."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_prune.callbacks import PruningCallback
from lightning_prune.pruning_plan import plan_in_force


class Made(Dataset[Any]):
    """Samples that a function makes of their number."""

    def __init__(self, make: Any, count: int = 12) -> None:
        self.make = make
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        return self.make(index, generator)


def sample(index: int, generator: torch.Generator) -> tuple[Tensor, int]:
    return torch.randn(8, generator=generator), index % 4


def perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Trained(L.LightningModule):
    """A network of three layers, and whatever trains it in a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron(8, 16, 24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.01)


BY_WEIGHTS: dict[str, Any] = {"criterion": "l1", "compensate": "none"}


class GoesOn(PruningCallback):
    """Has looked at a batch in a run before, as far as it knows."""

    def __init__(self, before: PruningCallback) -> None:
        super().__init__(keep=0.5, round_to=1, **BY_WEIGHTS)
        self.before = before.state

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.state.batch_like = self.before.batch_like
        self.state.training_batch_like = self.before.training_batch_like
        super().on_train_start(trainer, pl_module)


def fit(
    module: L.LightningModule, *, data: Any = sample, callback: PruningCallback | None = None, **loading: Any
) -> PruningCallback:
    """Try out a project for three batches, with a prune before the last one."""
    callback = callback or PruningCallback(keep=0.5, round_to=1, **BY_WEIGHTS)
    trainer = L.Trainer(
        fast_dev_run=3, accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False,
        enable_model_summary=False, barebones=False,
    )  # fmt: skip
    loader = data if isinstance(data, DataLoader) else DataLoader(Made(data), **{"batch_size": 4, **loading})
    trainer.fit(module, loader, loader)
    assert plan_in_force(module) is not None
    return callback


def widths(module: nn.Module) -> list[tuple[int, int]]:
    """Return the inputs and outputs of all linear layers."""
    return [tuple(layer.weight.shape)[::-1] for layer in module.modules() if isinstance(layer, nn.Linear)]


# -- what the network is given -----------------------------------------------------------------------------------------


class OfDictionaries(Trained):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert isinstance(batch["path"], list)
        return F.cross_entropy(self(batch["image"].flatten(1)), batch["label"])


class TwoInputs(Trained):
    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.net(x) * scale[:, None]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0], scale=batch[1].float()), batch[1])


@dataclass
class Batch:
    images: list[Tensor]
    labels: Tensor


class OfDataclasses(Trained):
    def forward(self, batch: Batch) -> Tensor:
        return self.net(torch.stack(batch.images))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch), batch.labels)


class Inner(Trained):
    """Its forward takes what is inside the batch, and training calls what forward calls."""

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows.double().float())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rows, labels = batch["inner"]["pair"]
        return F.cross_entropy(self.net(rows), labels)


def images_of(samples: list[Any]) -> Batch:
    rows, labels = zip(*samples, strict=True)
    return Batch(list(rows), torch.tensor(labels))


class Located(Tensor):
    """A tensor of a library of its own, that its operators return too, and that knows where each row comes from."""

    def __getitem__(self, index: Any) -> Tensor:
        raise ValueError("rows of several places")


PROJECTS = {
    "subclasses": (Trained, lambda i, g: (torch.randn(8, generator=g).as_subclass(Located), i % 4), {}),
    "dictionaries": (
        OfDictionaries,
        lambda i, g: {"image": torch.randn(2, 4, generator=g), "label": i % 4, "path": "a.png"},
        {},
    ),
    "several": (TwoInputs, sample, {}),
    "dataclass": (OfDataclasses, sample, {"collate_fn": images_of}),
    "nested": (Inner, lambda i, g: {"inner": {"pair": sample(i, g)}, "name": "x"}, {}),
}


@pytest.mark.parametrize("name", PROJECTS)
def test_inputs_are_what_the_network_is_given(name: str) -> None:
    kind, data, loading = PROJECTS[name]
    module = kind()
    callback = fit(module, data=data, **loading)
    plain = Trained()
    fit(plain)
    assert widths(module) == widths(plain) != widths(Trained())
    assert callback.history.before.cost_model_flops == 8 * 16 + 16 * 24 + 24 * 4  # of one sample


@pytest.mark.parametrize("name", PROJECTS)
def test_scores_and_compensation_run_the_network_as_training_does(name: str, recwarn: pytest.WarningsRecorder) -> None:
    kind, data, loading = PROJECTS[name]
    callback = fit(kind(), data=data, callback=PruningCallback(keep=0.5, round_to=1), **loading)
    assert not [one for one in recwarn if "without batches" in str(one.message)]
    (prune,) = callback.history.prunes
    assert prune.compensation.method == "refit"


class Boxes(L.LightningModule):
    """A detector: lists of images and of boxes, losses in training and boxes otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU())
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        found = self.head(self.body(torch.stack(images))).mean((2, 3))
        if not self.training:
            return [{"boxes": boxes} for boxes in found]
        return {"loss": F.l1_loss(found, torch.stack([target["boxes"][0] for target in targets]))}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, targets = batch
        return sum(self(images, targets).values())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert len(self(batch[0])) == len(batch[1])

    configure_optimizers = Trained.configure_optimizers


def test_a_detector_is_given_lists() -> None:
    def make(index: int, generator: torch.Generator) -> Any:
        return torch.randn(3, 8, 8, generator=generator), {"boxes": torch.zeros(1, 4)}

    module = Boxes()
    fit(module, data=make, collate_fn=lambda samples: tuple(map(list, zip(*samples, strict=True))))
    assert module.body[0].out_channels < 8
    assert module.head.out_channels == 4


class BoxesByName(Boxes):
    """A detector whose batches are dictionaries, and that refuses boxes without an inside, as torchvision's do."""

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Any:
        for target in targets or []:
            assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all(), "boxes have an inside"
        return super().forward(list(images), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        targets = [{"boxes": boxes} for boxes in batch["bbox"]]
        return sum(self(batch["image"], targets).values())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch["image"])


def with_a_box(index: int, generator: torch.Generator) -> Any:
    return {"image": torch.randn(3, 8, 8, generator=generator), "bbox": torch.tensor([[1.0, 1.0, 4.0, 5.0]])}


def test_a_detector_is_run_on_what_training_hands_to_it_and_resumes(recwarn: pytest.WarningsRecorder) -> None:
    first = fit(BoxesByName(), data=with_a_box, callback=PruningCallback(keep=0.5, round_to=1))
    assert not [one for one in recwarn if "without batches" in str(one.message)]
    assert first.history.prunes[0].compensation.method == "refit"
    again = GoesOn(first)
    fit(BoxesByName(), data=with_a_box, callback=again)
    assert again.state.batch_like == first.state.batch_like


class NoForward(Trained):
    forward = L.LightningModule.forward

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


def test_a_module_without_forward_is_entered_by_the_step_that_measures_it() -> None:
    module = NoForward()
    callback = fit(module)
    assert callback.history.before.latency_ms > 0
    assert callback.history.after.cost_model_flops <= 0.5 * callback.history.before.cost_model_flops
    assert module.net[0].out_features < 16
    assert module.net[4].out_features == 4


class Backbone(Trained):
    """A part that is pruned alone, and is given what another part makes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 6)
        self.net = perceptron(6, 16, 24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.stem(x))


def test_a_part_is_given_what_the_others_make() -> None:
    module = Backbone()
    callback = fit(module, callback=PruningCallback(keep=0.5, round_to=1, module="net"))
    assert callback.history.before.cost_model_flops == 6 * 16 + 16 * 24 + 24 * 4
    assert module.net[0].out_features < 16


def test_a_part_that_no_step_calls_needs_inputs() -> None:
    module = Trained()
    module.spare = perceptron(3, 4, 5)
    with pytest.raises(ValueError, match="No example input of 'spare' is to be had, as neither"):
        fit(module, callback=PruningCallback(module="spare"))


class Stream(IterableDataset[Any]):
    """Samples that each are served once."""

    def __init__(self) -> None:
        self.served = 0

    def __iter__(self) -> Iterator[Any]:
        for index in range(40):
            self.served += 1
            yield sample(index, torch.Generator().manual_seed(index))


def test_a_resumed_run_looks_at_no_batch_of_a_stream() -> None:
    first = fit(Trained(), data=DataLoader(Stream(), 4))
    again, stream = GoesOn(first), Stream()
    loader = DataLoader(stream, 4)
    seen = []
    module = Trained()

    class After(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(stream.served)

    trainer = L.Trainer(
        fast_dev_run=3, accelerator="cpu", logger=False, callbacks=[again, After()], enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    assert seen == [0]
    assert plan_in_force(module).widths == {name: len(g.kept) for name, g in plan_in_force(module).groups.items()}


# -- what trains it besides --------------------------------------------------------------------------------------------


class Projector(Trained):
    """Inner features go to layers that forward does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = perceptron(24, 12, 5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features = self.net[:4](batch[0])
        return F.cross_entropy(self.net[4](features), batch[1]) + self.projector(features).pow(2).mean()


class ToBuffer(Trained):
    """Inner features are drawn to a buffer, as to centres or prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.randn(24))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features = self.net[:4](batch[0])
        return F.mse_loss(features, self.centre.expand_as(features)) + super().training_step(batch, batch_idx)


class Distilled(Trained):
    """Inner features follow those of a frozen teacher that is as wide, and of one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = perceptron(8, 20, 24, 4).requires_grad_(False)
        self.regressor = nn.Linear(16, 20)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first = self.net[:2](batch[0])
        with torch.no_grad():
            followed = self.teacher[:2](batch[0])
            inner = self.teacher[2:4](followed)
        loss = F.mse_loss(self.regressor(first), followed) + F.mse_loss(self.net[2:4](first), inner)
        return loss + super().training_step(batch, batch_idx)


class Momentum(Trained):
    """A network that follows another one in the training step."""

    def __init__(self) -> None:
        super().__init__()
        self.follower = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for p, q in zip(self.net.parameters(), self.follower.parameters(), strict=True):
            q.data = q.data * 0.9 + p.data * 0.1
        return F.mse_loss(self(batch[0]), self.follower(batch[0])) + super().training_step(batch, batch_idx)


class ByHand(Projector):
    """The same, optimized by hand, with a penalty on gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        x = batch[0].requires_grad_()
        loss = super().training_step((x, batch[1]), batch_idx)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        optimizer.zero_grad()
        self.manual_backward(loss + gradient.pow(2).sum())
        optimizer.step()


class OnValidation(Trained):
    """A probe that only validation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Linear(16, 3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/probe", self.probe(self.net[:2](batch[0])).mean())


class Kept(Trained):
    """Inner features are kept by a hook, for a head that forward does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []
        self.net[3].register_forward_hook(lambda module, args, output: self.features.append(output))
        self.aux = nn.Linear(24, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.features.clear()
        loss = super().training_step(batch, batch_idx)
        return loss + self.aux(self.features[0]).mean()


BESIDE = {
    Projector: ("projector.0", 24, "projector.2", 12),
    ToBuffer: None,
    Distilled: ("regressor", 16, "teacher.2", 20),
    Momentum: None,
    ByHand: ("projector.0", 24, "projector.2", 12),
    OnValidation: ("probe", 16, None, 0),
    Kept: ("aux", 24, None, 0),
}


@pytest.mark.parametrize("kind", BESIDE, ids=lambda kind: kind.__name__)
def test_what_trains_beside_forward_is_pruned_along(kind: type[Trained]) -> None:
    module = kind()
    callback = fit(module)
    assert callback.history.before.cost_model_flops == 8 * 16 + 16 * 24 + 24 * 4  # nothing that inference does not run
    inner = module.net[0].out_features, module.net[2].out_features
    assert inner[0] < 16 or inner[1] < 24
    if kind is ToBuffer:
        assert len(module.centre) == inner[1]
    if kind is Momentum:
        assert widths(module.follower) == widths(module.net)
    if BESIDE[kind] is not None:
        consuming, before, other, kept = BESIDE[kind]
        layer = {16: inner[0], 24: inner[1]}
        assert module.get_submodule(consuming).in_features == layer[before]
        assert other is None or module.get_submodule(other).in_features == kept  # what forward does not run is kept


class Relies(Trained):
    """A loss that is written for a number of channels."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        pairs = self.net[:4](batch[0]).view(-1, 2, 12)
        return super().training_step(batch, batch_idx) + (pairs * torch.ones(12)).mean()


def test_channels_that_a_step_relies_on_are_kept_and_it_says_so() -> None:
    module = Relies()
    callback = fit(module)
    assert module.net[2].out_features == 24
    assert module.net[0].out_features < 16
    assert callback.history is not None


class Teacher(Trained):
    """A frozen network within forward, wider than the one that learns from it."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = perceptron(8, 32, 32, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) - self.teacher(x)


def test_a_frozen_part_is_kept_unless_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    module, asked = Teacher(), Teacher()
    callback = fit(module)
    assert widths(module.teacher) == widths(Teacher().teacher)
    assert sum(a * b for a, b in widths(module.net)) <= (8 * 16 + 16 * 24 + 24 * 4) / 2
    assert callback.history.before.cost_model_flops == 8 * 16 + 16 * 24 + 24 * 4
    assert "'teacher' is frozen and keeps its channels; its 1,408 FLOPs are not part" in caplog.text
    fit(asked, callback=PruningCallback(keep=0.5, round_to=1, module="teacher"))
    assert asked.teacher[0].out_features < 32
    assert widths(asked.net) == widths(Trained().net)


def test_what_a_module_trains_later_on_is_pruned() -> None:
    module = Teacher()
    module.unfreezes = True
    callback = fit(module, callback=PruningCallback(keep=0.3, round_to=1, **BY_WEIGHTS))
    assert callback.history.before.cost_model_flops == 8 * 16 + 16 * 24 + 24 * 4 + 1408
    assert widths(module.teacher) != widths(Teacher().teacher)


class InHook(Momentum):
    """The same, after the step."""

    training_step = Trained.training_step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert batch[0].ndim == 2
        torch._foreach_lerp_(list(self.follower.parameters()), list(self.net.parameters()), 0.1)


def test_a_network_that_follows_in_a_hook_is_pruned_along() -> None:
    module = InHook()
    fit(module)
    assert widths(module.follower) == widths(module.net) != widths(Trained().net)
