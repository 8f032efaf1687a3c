"""Distillation as a setting of the callbacks: the network before the first prune teaches what is left of it."""

import copy
import pickle
from collections import namedtuple
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback
from lightning_prune.callbacks.distilling import Listener, distill_settings, logits_of
from lightning_prune.pruning_plan import plan_in_force

pytestmark = pytest.mark.filterwarnings("ignore:Prune . of .")  # prunes nothing, in steps of two channels
PLAINLY: dict[str, Any] = {"criterion": "l1", "compensate": "none"}
ONE_PRUNE: dict[str, Any] = {"keep": 0.5, "start_epoch": 1, "round_to": 2, "distill": True, **PLAINLY}
THREE_PRUNES = {**ONE_PRUNE, "steps": 3, "distill": {"temperature": 2.0, "share": 0.7}}


class Plain(battery.ResidualClassifier):
    """Learns by an optimizer that has a step of one line."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def soft_loss(said: Tensor, expected: Tensor, temperature: float) -> Tensor:
    """The divergence of the paper, class by class."""
    p, q = (expected / temperature).softmax(1), (said / temperature).softmax(1)
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


class Plans(L.Callback):
    """Notes what is pruned before each epoch."""

    def __init__(self) -> None:
        self.at: dict[int, Any] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        plan = plan_in_force(pl_module)
        if plan is not None:
            self.at.setdefault(trainer.current_epoch, plan)


def naive(
    plans: dict[int, Any], epochs: int, temperature: float, share: float, accumulate: int = 1, views: int = 1
) -> nn.Module:
    """Train, prune and distill in a plain loop, in float64."""
    L.seed_everything(0, verbose=False)
    model, teacher = Plain().double().train(), None
    for epoch in range(epochs):
        if epoch in plans:
            if teacher is None:
                teacher = copy.deepcopy(model).eval()
            lp.prune(model, plans[epoch])
        rate = 0.05
        for number, (images, labels) in enumerate(battery.loaders()[0]):
            images = images.double()
            seen = [images * (view + 1) + (views > 1) for view in range(views)]
            if views > 1:
                with torch.no_grad():
                    model(torch.ones_like(images))
            said = [model(one) for one in seen]
            loss = torch.stack([F.cross_entropy(one, labels) for one in said]).mean()
            if teacher is not None:
                with torch.no_grad():
                    expected = [teacher(one) for one in seen]
                soft = [soft_loss(*pair, temperature) for pair in zip(said, expected, strict=True)]
                loss = (1 - share) * loss + share * sum(soft) / views
            (loss / accumulate).backward()
            if (number + 1) % accumulate == 0:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= rate * parameter.grad
                        parameter.grad = None
    return model


def apart(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((left.double() - right.double()).abs().max()) for left, right in pairs)


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_one_step_is_that_worked_out_by_hand() -> None:
    """Two classes, T = 2: teacher (0, 2 ln 3) says 1/4 and 3/4; student (0, 0) says 1/2 each."""
    said = torch.tensor([[0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    expected = torch.tensor([[0.0, 2 * torch.log(torch.tensor(3.0, dtype=torch.float64))]], dtype=torch.float64)
    callback = PruningCallback(distill={"temperature": 2, "share": 0.5})
    loss = callback.distillation_loss(said, expected)
    log = torch.log(torch.tensor([0.5, 1.5], dtype=torch.float64))
    by_hand = 4 * (0.25 * log[0] + 0.75 * log[1])
    torch.testing.assert_close(loss, by_hand, rtol=1e-12, atol=0)
    loss.backward()
    torch.testing.assert_close(said.grad, torch.tensor([[0.5, -0.5]], dtype=torch.float64))  # T (q - p)


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}], ids=["each batch", "accumulated"])
def test_training_is_that_of_a_plain_loop(settings: dict[str, Any], tmp_path: Path) -> None:
    callback, plans = PruningCallback(**THREE_PRUNES), Plans()
    module, _ = battery.train(
        tmp_path, callback, plans, module=seeded(Plain).double(), precision="64-true", max_epochs=4, **settings
    )
    assert len({plan.digest for plan in plans.at.values()}) >= 2
    expected = naive(plans.at, 4, 2.0, 0.7, accumulate=settings.get("accumulate_grad_batches", 1))
    assert apart(module, expected) <= 1e-9
    assert apart(module, naive(plans.at, 4, 2.0, 0.6, accumulate=settings.get("accumulate_grad_batches", 1))) > 1e-6


def seeded(kind: Any) -> L.LightningModule:
    L.seed_everything(0, verbose=False)
    return kind()


# -- what a training step does -----------------------------------------------------------------------------------------


class Views(Plain):
    """Runs two forward passes a step, after one that is for nothing; each changes what it is given in place."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.add_(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self(torch.zeros_like(batch[0]))
        losses = [F.cross_entropy(self(batch[0] * view), batch[1]) for view in (1, 2)]
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return {"loss": loss}


class Within(L.LightningModule):
    """Calls the network in it, and says another thing than that in ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images).log_softmax(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.inner(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def test_the_loss_is_the_mean_over_forward_passes_on_the_inputs_as_they_were(tmp_path: Path) -> None:
    callback, plans = PruningCallback(**{**THREE_PRUNES, "steps": 1}), Plans()
    module, _ = battery.train(
        tmp_path, callback, plans, module=seeded(Views).double(), precision="64-true", max_epochs=2
    )
    expected = naive(plans.at, 2, 2.0, 0.7, views=2)
    assert apart(module, expected) <= 1e-9


@pytest.mark.parametrize(
    "settings",
    [{}, {"module": "inner", "example_inputs": [1, 1, 8, 8]}],
    ids=["all is pruned", "the network is pruned"],
)
def test_the_network_may_be_called_directly(settings: dict[str, Any], tmp_path: Path) -> None:
    callback = PruningCallback(**{**THREE_PRUNES, "steps": 1}, **settings)
    module, _ = battery.train(tmp_path, callback, module=seeded(Within).double(), precision="64-true", max_epochs=2)
    reference, _ = battery.train(
        tmp_path / "reference", PruningCallback(**{**THREE_PRUNES, "steps": 1}), module=seeded(Plain).double(),
        precision="64-true", max_epochs=2,
    )  # fmt: skip
    assert apart(module.inner, reference) <= 1e-12


class Outer(nn.Module):
    """Has all that it is made of in one part, which fails for negative numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        if bool((x < 0).any()):
            raise ArithmeticError
        return factor * self.inner(x)


def test_calls_are_noted_once_from_outside_and_only_while_they_matter() -> None:
    model, x = Outer(), torch.ones(1, 2)
    listener = Listener({"": model, "inner": model.inner}, model)
    model(x)
    listener.listen()
    first = model(x, factor=2.0)
    with torch.no_grad():
        model(x)
    with pytest.raises(ArithmeticError):
        model(-x)
    second = model.inner(x)
    forward = model.forward

    def redirected(given: Tensor) -> Tensor:  # as distributed training does, with a step for a forward pass
        model.forward = forward
        return model(given).sum()

    model.forward = redirected
    model(x)
    names = [(call.module, call.kwargs) for call in listener.calls]
    assert names == [("", {"factor": 2.0}), ("inner", {}), ("", {})]
    assert [call.output is one for call, one in zip(listener.calls, (first, second), strict=False)] == [True, True]
    assert listener.calls[2].output.shape == (1, 2)
    listener.pause()
    model(x)
    assert listener.calls == []
    assert hooks_of(model) == []


def test_what_the_module_logs_is_its_own_and_the_teacher_is_told(tmp_path: Path) -> None:
    logged: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: object) -> None:
            if trainer.current_epoch == 1:
                logged.append(float(outputs["loss"]))

    class Told(Views):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            result = super().training_step(batch, batch_idx)
            if self.current_epoch == 1:
                self.own.append(float(result["loss"].detach()))
            return result

    module = seeded(Told)
    module.own = []
    logger = CSVLogger(tmp_path, version=0)
    callback = PruningCallback(**{**THREE_PRUNES, "steps": 1})
    _, trainer = battery.train(tmp_path, callback, Watch(), module=module, max_epochs=2, logger=logger)
    assert logged == pytest.approx(module.own)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(sum(module.own) / len(module.own))
    assert float(trainer.callback_metrics["prune/distillation"]) > 0
    text = Path(logger.log_dir, "metrics.csv").read_text()
    assert "prune/distillation" in text.splitlines()[0]


class Watching(L.Callback):
    """Looks at module, trainer and callback while the teacher teaches."""

    def __init__(self, callback: PruningCallback) -> None:
        self.callback = callback
        self.seen = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        assert hooks_of(pl_module) == []
        if self.callback.state.teacher:
            plain = dict(battery.ResidualClassifier().state_dict())
            assert pl_module.state_dict().keys() == plain.keys()
            own = {id(parameter) for parameter in pl_module.parameters()}
            assert {id(one) for group in trainer.optimizers[0].param_groups for one in group["params"]} == own
            teacher = self.callback.run.distiller._teacher
            assert not any(module.training for module in teacher.modules())
            assert not any(parameter.requires_grad for parameter in teacher.parameters())
            assert {name: tensor.shape for name, tensor in self.callback.state.teacher.items()} == {
                name: tensor.shape for name, tensor in plain.items()
            }
            pickle.dumps(pl_module)
            self.seen += 1


def hooks_of(model: nn.Module) -> list[str]:
    return [name for module in model.modules() for name, value in vars(module).items() if "hook" in name and value]


def test_the_teacher_is_no_part_of_what_is_trained_and_ends_with_the_fit(tmp_path: Path) -> None:
    callback = PruningCallback(**ONE_PRUNE)
    watching = Watching(callback)
    module, _ = battery.train(tmp_path, callback, watching, EMAWeightAveraging(decay=0.9), max_epochs=3)
    assert watching.seen == 2 * battery.BATCHES
    assert callback.state.teacher == {}
    assert hooks_of(module) == []
    (last,) = (tmp_path / "checkpoints").glob("epoch=2*.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["state_dict"].keys() == battery.ResidualClassifier().state_dict().keys()
    teacher = checkpoint["callbacks"][callback.state_key]["teacher"]
    (before,) = (tmp_path / "checkpoints").glob("epoch=0*.ckpt")
    weights = torch.load(before, weights_only=True)
    assert weights["callbacks"][callback.state_key]["teacher"] == {}
    current = weights["current_model_state"] if "current_model_state" in weights else weights["state_dict"]
    assert teacher.keys() == current.keys()
    assert all(torch.equal(teacher[name], current[name]) for name in teacher)


def test_a_second_fit_has_no_teacher_and_says_so(tmp_path: Path) -> None:
    callback = PruningCallback(**ONE_PRUNE)
    module, trainer = battery.train(tmp_path, callback, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    with pytest.warns(UserWarning, match="goes on without distill: the network before the first prune"):
        battery.train(tmp_path / "again", callback, module=module, max_epochs=2)
    with pytest.warns(UserWarning, match="goes on without distill"):
        battery.train(tmp_path / "late", PruningCallback(**ONE_PRUNE), ckpt_path=tmp_path / "late.ckpt", max_epochs=3)


def test_the_setting_of_a_resumed_run_holds(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    battery.train(tmp_path, PruningCallback(**ONE_PRUNE), saver, max_epochs=2)
    path = tmp_path / "epoch=1.ckpt"
    other = PruningCallback(**{**ONE_PRUNE, "distill": {"share": 0.2}})
    with pytest.warns(UserWarning, match=r"goes on with distill=\{'share': 0.2\}, after True in"):
        _, trainer = battery.train(tmp_path / "other", other, ckpt_path=path, max_epochs=3)
    assert "prune/distillation" in trainer.callback_metrics
    assert other.history.settings["distill"] == {"share": 0.2}
    without = PruningCallback(**{**ONE_PRUNE, "distill": False})
    with pytest.warns(UserWarning, match="goes on with distill=False, after True in"):
        _, trainer = battery.train(tmp_path / "without", without, ckpt_path=path, max_epochs=3)
    assert "prune/distillation" not in trainer.callback_metrics


@pytest.mark.parametrize(
    "settings",
    [{"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"fast_dev_run": 2}, {"gradient_clip_val": 0.1}],
    ids=str,
)
def test_works_with_other_settings_of_the_trainer(settings: dict[str, Any], tmp_path: Path) -> None:
    callback = PruningCallback(**ONE_PRUNE)
    module, trainer = battery.train(tmp_path, callback, max_epochs=2, **settings)
    assert float(trainer.callback_metrics["prune/distillation"]) >= 0
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


@pytest.mark.parametrize(
    "how",
    [
        "network.compile()",
        pytest.param("torch.compile(module)", marks=pytest.mark.long),
        pytest.param("torch.compile(network)", marks=pytest.mark.long),
    ],
)
def test_compiled_networks(how: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    reference, _ = battery.train(
        tmp_path / "reference", PruningCallback(**ONE_PRUNE), module=seeded(Within), max_epochs=2
    )
    module = seeded(Within)
    if how == "network.compile()":
        module.inner.compile(backend="eager")
    if how == "torch.compile(network)":
        module.inner = torch.compile(module.inner, backend="eager")
    fitted = torch.compile(module, backend="eager") if how == "torch.compile(module)" else module
    battery.train(tmp_path, PruningCallback(**ONE_PRUNE), module=fitted, max_epochs=2)
    assert apart(module, reference) <= 1e-5
    assert hooks_of(module) == []
    torch.compiler.reset()


class Gathering(Plain):
    """Has an attribute that changes with the epochs, and gathers what passes through it until the end of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0
        self.gathered: list[Tensor] = []
        self.stem.register_forward_hook(lambda *passed: self.gathered.append(passed[-1]))

    def on_train_epoch_start(self) -> None:
        self.factor = 1.0 + self.current_epoch

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * super().forward(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.gathered.clear()
        return loss


def test_the_teacher_follows_attributes_and_gathers_no_more_than_an_epoch(tmp_path: Path) -> None:
    lengths: list[tuple[int, float, float]] = []

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            teacher = callback.run.distiller._teacher
            if teacher is not None:
                lengths.append((len(teacher.gathered), teacher.factor, pl_module.factor))

    callback = PruningCallback(**ONE_PRUNE)
    battery.train(tmp_path, callback, Look(), module=Gathering(), max_epochs=4)
    of_validation = 2  # batches, whose outputs the module had gathered before the epoch
    assert [length for length, _, _ in lengths] == [battery.BATCHES + of_validation] * 3
    assert [(factor, own) for _, factor, own in lengths] == [(2.0, 2.0), (3.0, 3.0), (4.0, 4.0)]


# -- what a network says -----------------------------------------------------------------------------------------------

Outputs = namedtuple("Outputs", ["logits", "aux_logits"])


@pytest.mark.parametrize(
    ("output", "axis", "expected"),
    [
        (torch.arange(6.0).view(2, 3), None, torch.arange(6.0).view(2, 3)),
        (torch.arange(12.0).view(1, 3, 2, 2), None, torch.arange(12.0).view(3, 4).t()),
        (torch.arange(12.0).view(2, 2, 3), 2, torch.arange(12.0).view(4, 3)),
        (torch.arange(12.0).view(2, 2, 3), -1, torch.arange(12.0).view(4, 3)),
        (torch.arange(6.0).view(1, 2, 3), 1, torch.arange(6.0).view(2, 3).t()),
        ({"out": torch.ones(2, 3), "aux": torch.zeros(2, 3)}, None, torch.ones(2, 3)),
        (Outputs(torch.ones(2, 3), torch.zeros(2, 3)), None, torch.ones(2, 3)),
        ((torch.ones(2, 3),), None, torch.ones(2, 3)),
        (torch.ones(2, 3, dtype=torch.bfloat16), None, torch.ones(2, 3)),
        (torch.ones(2, 3, dtype=torch.float64), None, torch.ones(2, 3, dtype=torch.float64)),
    ],
    ids=str,
)
def test_logits_are_found(output: Any, axis: int | None, expected: Tensor) -> None:
    torch.testing.assert_close(logits_of(output, axis), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("output", "axis", "message"),
    [
        (torch.ones(8), None, r"a tensor of shape \(8,\), without two classes or more on axis 1; override distill"),
        (torch.ones(8, 1), None, "without two classes or more"),
        (torch.ones(8, 1, 4, 4), None, "without two classes or more"),
        (torch.ones(8, 4), 2, "without two classes or more on axis 2"),
        (torch.ones(8, 4), -2, "without two classes or more on axis -2"),
        (torch.ones(8, 4, 5), None, r"say which axis holds the classes, as in distill=\{'axis': 1\}"),
        ((torch.ones(2, 3), torch.ones(2, 7)), None, "a tuple, of which it cannot be told what the logits are"),
        ({"boxes": 1, "scores": 2}, None, "a dict of boxes, scores, of which"),
        (torch.ones(2, 3, dtype=torch.int64), None, "cannot be told"),
    ],
    ids=str,
)
def test_other_outputs_are_refused(output: Any, axis: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logits_of(output, axis)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("yes", "distill must be true, false or a mapping of temperature, share, axis; got 'yes'"),
        (1, "distill must be true, false or a mapping"),
        ({"T": 4}, "a mapping of temperature, share, axis; got {'T': 4}"),
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"temperature": float("inf")}, "temperature=inf must be above 0"),
        ({"share": 1.5}, r"share=1.5 is outside \(0, 1\]"),
        ({"share": "most"}, "is no setting"),
        ({"axis": 1.5}, "axis must be a whole number other than 0, where samples lie; got 1.5"),
        ({"axis": 0}, "axis must be a whole number other than 0"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningCallback(distill=given)
    assert distill_settings(False) is None


class Manual(battery.ResidualClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Pair(battery.ResidualClassifier):
    def forward(self, images: Tensor) -> Any:
        found = super().forward(images)
        return found, found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[0], batch[1])

    validation_step = None


class Values(Pair):
    def forward(self, images: Tensor) -> Any:
        return battery.ResidualClassifier.forward(self, images)[:, 0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1].float())


class Aside(battery.ResidualClassifier):
    """Trains what is in it without running ``forward``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(battery.ResidualClassifier.forward(self, batch[0]), batch[1])


class Auxiliary(battery.ResidualClassifier):
    """Returns another thing in training."""

    def forward(self, images: Tensor) -> Any:
        found = super().forward(images)
        return (found, found) if self.training else found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[0], batch[1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Manual, "Manual optimizes manually, with any number of them; set distill=False"),
        (Pair, "returns a tuple, of which it cannot be told"),
        (Values, r"returns a tensor of shape \(1,\), without two classes or more"),
        (Auxiliary, "returns a tuple, of which it cannot be told"),
        (Aside, "what Aside returns .* training_step ran no forward pass .* let training_step call self"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_the_first_step_ends(kind: Any, message: str, tmp_path: Path) -> None:
    steps: list[int] = []

    class Count(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            steps.append(1)

    with pytest.raises(ValueError, match=message):
        battery.train(tmp_path, PruningCallback(**ONE_PRUNE), Count(), module=kind(), max_epochs=2)
    assert steps == []


def test_other_outputs_are_compared_by_a_method(tmp_path: Path) -> None:
    class Regression(PruningCallback):
        def distillation_loss(self, output: Any, expected: Any) -> Tensor:
            return F.mse_loss(output, expected)

    _, trainer = battery.train(tmp_path, Regression(**ONE_PRUNE), module=Values(), max_epochs=2)
    assert float(trainer.callback_metrics["prune/distillation"]) > 0


def test_one_callback_of_a_run_has_a_teacher(tmp_path: Path) -> None:
    settings = {**ONE_PRUNE, "example_inputs": [1, 1, 8, 8]}
    both = PruningCallback(**settings, module="stem"), PruningCallback(**settings, module="first")
    with pytest.raises(ValueError, match="both have distill; set it for one of them"):
        battery.train(tmp_path, *both, max_epochs=2)
