"""Joint training and pruning: the penalty against the explicit loss, what comes into force, and resuming."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import battery
import jsonargparse
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from shortened import ordinary
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

import lightning_prune as lp
from lightning_prune.callbacks import RLJointPruneCallback, refusals
from lightning_prune.callbacks.alignment import Alignment, Pull
from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan, plan_in_force

LITTLE: dict[str, Any] = {"agent_updates": 3, "environment_updates": 2, "environment_size": 4}
KEPT = {"stem": [0, 1, 2, 5, 7, 11], "first": list(range(3, 20))}
STRENGTH = 0.3
SHORT: dict[str, Any] = {
    "keep": 0.5, "start_epoch": 3, "warmup_epochs": 1, "round_to": 2, "episodes": 4, "strength": 1e-2,
    "search_settings": LITTLE,
}  # fmt: skip


def make_callback(**changes: Any) -> RLJointPruneCallback:
    return RLJointPruneCallback(**{**SHORT, **changes})


class InForce(RLJointPruneCallback):
    """Draws the weights towards a given choice."""

    def prepare(self, trainer: L.Trainer, graph: ChannelGraph) -> None:
        super().prepare(trainer, graph)
        self.state.in_force = KEPT


class Stochastic(battery.ResidualClassifier):
    """Plain gradient descent, so that weights show gradients as they are."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


class Explicit(Stochastic):
    """Adds the penalty to the loss by hand."""

    power = 1

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        stem = [channel for channel in range(12) if channel not in KEPT["stem"]]
        first = [channel for channel in range(24) if channel not in KEPT["first"]]
        leaving = [
            self.stem.weight[stem], self.second.weight[stem], self.first.weight[:, stem],
            self.head.weight.view(4, 12, 4)[:, stem], self.first.weight[first], self.second.weight[:, first],
        ]  # fmt: skip
        penalty = sum(weights.norm() ** self.power for weights in leaving)
        return F.cross_entropy(self(batch[0]), batch[1]) + STRENGTH * penalty


class Manual(Stochastic):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class Scaled(MixedPrecision):
    """Scales losses as mixed precision does, and computes in full precision, to be compared."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def forward_context(self) -> AbstractContextManager[None]:
        return nullcontext()


def one_epoch(root: Path, module: L.LightningModule, *callbacks: L.Callback, **trainer: Any) -> L.LightningModule:
    return battery.train(root, *callbacks, module=module, max_epochs=1, **trainer)[0]


@pytest.mark.filterwarnings("ignore:Training has ended with")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 4},  # of 6 batches: the last window is not full
        {"gradient_clip_val": 0.5},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "plugins": "scaled"},
        {"squared": True},
        {"manual": True},
    ],
    ids=["plain", "accumulation", "clipping", "scaler", "squared", "manual"],
)
def test_the_gradient_is_that_of_the_explicit_loss(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    squared, manual = settings.get("squared", False), settings.get("manual", False)
    trainer = {key: value for key, value in settings.items() if key not in ("squared", "manual")}
    double = {} if "plugins" in trainer else {"precision": "64-true"}

    def plugins() -> dict[str, Any]:
        return {"plugins": [Scaled()]} if "plugins" in trainer else {}

    L.seed_everything(0, verbose=False)
    modules = [(Manual if manual else Stochastic)(), Explicit(), Stochastic()]
    modules[1].power = 2 if squared else 1
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    callback = InForce(
        **{**SHORT, "start_epoch": 1, "warmup_epochs": 0, "search_epochs": 0, "strength": STRENGTH},
        squared=squared, compensate_candidates="none",
    )  # fmt: skip
    monkeypatch.setattr(refusals, "refuse_short_run", lambda *_: None)  # the run is to end before the prune
    aligned = one_epoch(tmp_path / "0", modules[0], callback, **{**trainer, **plugins(), **double})
    explicit = one_epoch(tmp_path / "1", modules[1], **{**trainer, **plugins(), **double})
    without = one_epoch(tmp_path / "2", modules[2], **{**trainer, **plugins(), **double})
    tolerance = 1e-5 if "plugins" in trainer else 1e-12
    for name, value in aligned.state_dict().items():
        torch.testing.assert_close(value, explicit.state_dict()[name], rtol=tolerance, atol=tolerance)
    assert not torch.allclose(aligned.stem.weight, without.stem.weight, rtol=1e-2)


class Shared(L.LightningDataModule):
    """Lets two ranks share the 16 images that one process takes in a step; Lightning's own sampler would shuffle."""

    def train_dataloader(self) -> DataLoader:
        images = battery.images(16 * battery.BATCHES)
        return DataLoader(images, 8, sampler=DistributedSampler(images, 2, self.trainer.global_rank, shuffle=False))

    def val_dataloader(self) -> DataLoader:
        return battery.loaders()[1]


@pytest.mark.filterwarnings("ignore:Training has ended with")
def test_the_gradient_on_two_ranks_is_that_of_the_explicit_loss_on_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    callback = InForce(**{**SHORT, "start_epoch": 1, "warmup_epochs": 0, "search_epochs": 0, "strength": STRENGTH})
    monkeypatch.setattr(refusals, "refuse_short_run", lambda *_: None)
    L.seed_everything(0, verbose=False)
    aligned, explicit = Stochastic(norm=False), Explicit(norm=False)
    explicit.load_state_dict(aligned.state_dict())
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp_fork", precision="64-true", callbacks=[callback],
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.5, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(aligned, datamodule=Shared())
    one_epoch(tmp_path, explicit, precision="64-true", accumulate_grad_batches=2, gradient_clip_val=0.5)
    for name, value in aligned.state_dict().items():  # which came back from the ranks in single precision
        torch.testing.assert_close(value, explicit.state_dict()[name].float(), rtol=1e-6, atol=1e-8)


def test_weights_that_would_leave_shrink(tmp_path: Path) -> None:
    norms = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch < 4:
                removed = [channel for channel in range(24) if channel not in callback.state.in_force.get("first", [])]
                norms.append(float(pl_module.first.weight[removed].detach().norm()))

    callback = make_callback(strength=0.1, warmup_epochs=1, search_epochs=1, start_epoch=4)
    battery.train(tmp_path, callback, Watch())
    assert norms[3] < norms[2] < 0.8 * norms[1]


class Still(battery.ResidualClassifier):
    """Learns nothing: only the penalty moves its weights."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return 0.0 * super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.2, momentum=0.5)
        warm_up_and_fall = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.2, total_steps=7 * battery.BATCHES, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up_and_fall, "interval": "step"}}


@pytest.mark.filterwarnings("ignore:Training has ended with")
@pytest.mark.parametrize(("squared", "accumulate"), [(False, 1), (False, 3), (True, 1)])
def test_what_leaves_is_gone_by_the_prune_whatever_the_schedule(
    squared: bool, accumulate: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Within seven epochs, of which the prune would follow; the learning rate rises and falls fiftyfold meanwhile."""
    norms: list[list[float]] = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            norms.append([float(norm) for norm in torch._foreach_norm(callback.run.alignment._masked_weights())])

        on_train_epoch_end = on_train_epoch_start

    monkeypatch.setattr(refusals, "refuse_short_run", lambda *_: None)
    callback = InForce(
        **{**SHORT, "start_epoch": 7, "warmup_epochs": 0, "search_epochs": 0, "strength": None}, squared=squared
    )
    trainer = {"max_epochs": 7, "accumulate_grad_batches": accumulate, "precision": "64-true"}
    battery.train(tmp_path, callback, Watch(), module=Still(), **trainer)
    greatest = [max(each) / max(norms[0]) for each in [norms[0], *norms[1::2]]]  # at first, and after each epoch
    assert greatest[-1] < (0.25 if squared else 0.1)
    assert greatest == sorted(greatest, reverse=True)
    if not squared:  # falls at least along a line; weights of two groups are drawn by both
        assert all(norm <= 1.1 - epoch / 7 for epoch, norm in enumerate(greatest))
        assert greatest[3] > 0.2


def test_adam_moves_weights_as_fast_as_the_strength_is_meant_to() -> None:
    """Gradients of a loss, here noise, decide on how much of the penalty a step of Adam is."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 4, bias=False)).double()
    graph = lp.trace(model, torch.zeros(1, 64, dtype=torch.float64))
    alignment = Alignment(graph, graph.plan({"0": torch.arange(32)}))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step(strength: float) -> None:
        for parameter in model.parameters():
            parameter.grad = 0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        alignment.add_gradient(strength)
        optimizer.step()

    for _ in range(20):
        step(0.0)
    pull = Pull([optimizer], alignment.parameters())
    assert pull.scale() == pytest.approx(0.3, rel=0.05)
    before, steps = alignment.to_vanish(), 400
    for _ in range(steps):
        step(before * pull.scale() / steps / pull.learning_rate())
    assert alignment.to_vanish() < 0.15 * before


class Recorded(RLJointPruneCallback):
    """Notes what is measured."""

    def measure(self, plans: list[PruningPlan], limit: int | None = None) -> Tensor:
        rewards = super().measure(plans, limit)
        if limit is None:
            self.__dict__.setdefault("measured", []).append((plans, rewards))
        return rewards


def test_what_is_in_force_is_the_best_on_the_weights_as_they_are(tmp_path: Path) -> None:
    callback = Recorded(keep=0.5, start_epoch=4, round_to=2, episodes=4, finalists=3, search_settings=LITTLE)
    seen = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if callback.state.in_force:
                seen[trainer.current_epoch] = dict(callback.state.in_force)

    module, _ = battery.train(tmp_path, callback, Watch())
    *rounds, (last, rewards) = callback.measured
    assert sorted(seen) == [1, 2, 3]
    for epoch, (plans, earned) in zip(seen, rounds, strict=True):
        best = plans[int(earned.argmax())]
        assert seen[epoch] == {name: list(group.kept) for name, group in best.groups.items()}
        assert all(plan.budget["achieved"] <= 0.5 for plan in plans)
        assert len(plans) == 4 + 1 + (0 if epoch == 1 else 3)  # episodes, the policy itself, finalists
    for (before, earned), (after, _) in zip(rounds, [*rounds[1:], (last, rewards)], strict=True):
        assert before[int(earned.argmax())].widths in [plan.widths for plan in after]
    assert plan_in_force(module) == last[int(rewards.argmax())]


def test_several_rounds_in_an_epoch_build_on_each_other(tmp_path: Path) -> None:
    """Without training in between, the best of all episodes is what stays."""
    callback = Recorded(
        keep=0.5, start_epoch=2, round_to=2, episodes=4, rounds=3, finalists=1, strength=0.0, agent="ppo-cim",
        search_settings=LITTLE,
    )  # fmt: skip
    battery.train(tmp_path, callback, max_epochs=3)
    *rounds, _ = callback.measured
    assert [len(plans) for plans, _ in rounds] == [5, 6, 6]  # episodes, the policy itself, the best so far
    best = [float(earned.max()) for _, earned in rounds]
    assert best == sorted(best)
    assert [plan.widths for plan in rounds[0][0][:4]] != [plan.widths for plan in rounds[1][0][:4]]


def test_a_control_takes_the_place_of_an_agent_and_what_is_in_force_is_within_the_budget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Greedy search begins with the whole network, which earns more than any plan within the budget."""
    kept: list[float] = []

    class Noted(RLJointPruneCallback):
        def _align(self) -> None:
            super()._align()
            if self.state.in_force and self.steps_done == 0:
                tensors = {name: torch.tensor(channels) for name, channels in self.state.in_force.items()}
                cost = self._problem().cost
                kept.append(cost(self.run.graph.plan(tensors).widths) / cost.original)

    callback = Noted(**{**SHORT, "agent": "greedy", "search_settings": {}, "compensate_candidates": "fold"})
    module, _ = battery.train(tmp_path, callback)
    assert len(kept) == 2
    assert max(kept) <= 0.5
    assert plan_in_force(module).budget["achieved"] <= 0.5
    assert "greedy: 3 plans tried" in caplog.text  # the whole network, and each of two groups narrower


@pytest.mark.parametrize("agent", ordinary(["sac", "ppo-cim", "random", "greedy"], "ppo-cim"))
def test_stopped_equals_unbroken(agent: str, tmp_path: Path) -> None:
    def callback() -> RLJointPruneCallback:
        changes = {"agent_settings": {"learning_starts": 8}} if agent == "sac" else {}
        settings = {} if agent == "greedy" else {**LITTLE, **changes}
        return make_callback(
            agent=agent, start_epoch=4, search_epochs=2, rounds=2, search_settings=settings,
            compensate_candidates="fold", strength=None,
        )  # fmt: skip

    saver = ModelCheckpoint(tmp_path / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=4)
    unbroken, _ = battery.train(tmp_path, callback(), saver)
    for step in (8, 16, 20):
        path = tmp_path / "checkpoints" / f"step={step}.ckpt"
        assert torch.load(path, weights_only=True)["callbacks"]
        resumed, _ = battery.train(tmp_path / str(step), callback(), ckpt_path=path)
        assert battery.differences(unbroken, resumed) == [], step


def test_looking_on_changes_nothing_in_training(tmp_path: Path) -> None:
    found: list[dict[str, Tensor]] = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 2:
                found.append({name: value.clone() for name, value in pl_module.state_dict().items()})
                found.append({"random": torch.get_rng_state()})

    battery.train(tmp_path / "with", make_callback(strength=0.0), Watch())
    battery.train(tmp_path / "without", Watch())
    assert all(torch.equal(found[0][name], value) for name, value in found[2].items())
    assert torch.equal(found[1]["random"], found[3]["random"])


def test_logs(tmp_path: Path) -> None:
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    callback = make_callback(search_settings={**LITTLE, "agent_settings": {"learning_starts": 8}})
    battery.train(tmp_path, callback, logger=logger, log_every_n_steps=1)
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"agent/reward", "agent/actor_loss", "agent/critic_loss", "agent/alignment"} <= set(header)


class Dense(battery.ResidualClassifier):
    """A part that is joined to what it was made of, and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__(width=8)
        self.second = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.head = nn.Linear(24 * 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        x = torch.cat([x, F.relu(self.norm(self.first(x)))], 1)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.second(x)), 2).flatten(1))


@pytest.mark.parametrize("agent", ["ppo-clip", "ppo-kl", "reinforce", "lightning_prune.search.RandomSearch"])
def test_any_groups_in_a_development_run(agent: str, tmp_path: Path) -> None:
    callback = Recorded(**{**SHORT, "agent": agent, "start_epoch": 2, "rounds": 9})
    module, _ = battery.train(tmp_path, callback, module=Dense(), fast_dev_run=1)
    assert len(callback.measured) == 2  # one round, and the choice
    assert plan_in_force(module).budget["achieved"] <= 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2}, "all channels at once"),
        ({"metric": "latency"}, "can be counted"),
        ({"warmup_epochs": 3}, "below start_epoch=3"),
        ({"strength": -1.0}, "at least 0"),
        ({"limit_batches": 0}, "limit_batches"),
        ({"episodes": 1}, "at least 2"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1; got 0"),
        ({"agent": "dqn"}, "no agent 'dqn'"),
        ({"search_settings": {"agent_settings": {"wings": 2}}}, "no setting 'wings'"),
        ({"search_settings": {"rewarded": "never"}}, "every_step, last_step"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_callback(**changes)


def test_refuses_before_training_what_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"between .* can be kept"):
        battery.train(tmp_path, make_callback(keep=0.01))
    with pytest.raises(ValueError, match="has none"):
        battery.train(tmp_path, make_callback(), limit_val_batches=0)


def test_settings_are_plain_values() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(RLJointPruneCallback, "callback")
    given = {"agent": "ppo-kl", "episodes": 8, "search_settings": {"agent_settings": {"n_epochs": 4}}}
    callback = parser.instantiate_classes(parser.parse_object({"callback": given})).callback
    assert (callback.agent, callback.episodes) == ("ppo-kl", 8)


def test_batches_of_the_training_split_are_taken_without_touching_its_loader(tmp_path: Path) -> None:
    """The data modules of this package read whole batches at a time."""
    pytest.importorskip("sklearn")
    from lightning_prune.datamodules import DigitsDataModule

    found = []

    class Watch(RLJointPruneCallback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            before = trainer.train_dataloader.state_dict()
            super().on_train_start(trainer, pl_module)
            assert trainer.train_dataloader.state_dict() == before
            found.extend(self.run.training)

    data = DigitsDataModule(batch_size=64)
    module = battery.ResidualClassifier()
    module.head, module.example_input_array = nn.Linear(48, 10), torch.zeros(1, 1, 8, 8)
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[Watch(start_epoch=1, warmup_epochs=0, candidate_batches=3)],
        logger=False, enable_progress_bar=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert [images.shape for images, _ in found] == [(128, 1, 8, 8)] * 3
    assert plan_in_force(module).budget["achieved"] <= 0.5


def test_a_run_from_another_ones_checkpoint_needs_episodes_to_choose_from(tmp_path: Path) -> None:
    battery.train(tmp_path / "plain", max_epochs=4)
    path = next((tmp_path / "plain" / "checkpoints").glob("epoch=3*"))
    with pytest.raises(ValueError, match=r"nothing to choose from: the run goes on at epoch 4, .* Raise start_epoch"):
        battery.train(tmp_path, make_callback(start_epoch=3), ckpt_path=path, max_epochs=6)
