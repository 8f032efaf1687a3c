"""The Taylor criterion, collected in training steps, against a slow computation of its own and the pure function."""

import copy
import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from shortened import ordinary
from taylor_reference import reference
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_prune as lp
from lightning_prune.callbacks import TaylorRankCallback
from lightning_prune.criteria.first_order_sums import Totals, make_collector
from lightning_prune.pruning_plan import plan_in_force

READERS = {"stem": ("first", "head"), "first": ("second",)}
VARIANTS = ["a", "b", "c", "gate", "sum_then_square", "square_then_sum"]


class Keep(TaylorRankCallback):
    """Remember the scores of every prune."""

    def scores(self, trainer: L.Trainer, graph: Any) -> dict[str, Tensor]:
        self.ranked = super().scores(trainer, graph)
        self.all_ranked = [*getattr(self, "all_ranked", []), self.ranked]
        return self.ranked


class Frozen(battery.ResidualClassifier):
    """Without normalisation the network is the same function in every step; a rate of zero keeps it so."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(norm=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def doubled(batch_size: int = 16) -> list[list[Tensor]]:
    return [[images.double(), labels] for images, labels in battery.loaders(batch_size)[0]]


@pytest.mark.parametrize("variant", ["a", "b", "c", "gate"])
def test_scores_are_those_of_the_definition(variant: str, tmp_path: Path) -> None:
    callback, module = Keep(keep=0.5, round_to=1, variant=variant, normalize=False), Frozen()
    twin = copy.deepcopy(module).double()
    battery.train(tmp_path, callback, module=module, max_epochs=2, precision="64-true")
    expected = reference(
        twin,
        doubled(),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="sum"),
        READERS,
        variant,
    )
    for name, values in callback.ranked.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("normalize", ordinary([None, False, True], None))
@pytest.mark.parametrize("variant", VARIANTS)
def test_callback_and_function_agree(variant: str, normalize: bool | None, tmp_path: Path) -> None:
    settings = {"variant": variant, "normalize": normalize, "flops_penalty": 0.01}
    callback, module = Keep(keep=0.5, round_to=1, **settings), Frozen()
    twin = copy.deepcopy(module).double()
    battery.train(tmp_path, callback, module=module, max_epochs=2, precision="64-true")
    graph = lp.trace(twin, torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    expected = lp.criteria.taylor(graph, doubled(), mean_loss, **settings)
    for name, values in callback.ranked.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulation_makes_no_difference(variant: str, tmp_path: Path) -> None:
    """Six batches of 16 in steps of three, against two batches of 48."""
    ranked = []
    for batch_size, accumulate in ((16, 3), (48, 1)):
        callback = Keep(keep=0.5, round_to=1, variant=variant, normalize=False)
        runner = L.Trainer(
            max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, precision="64-true",
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path, callbacks=[callback],
            num_sanity_val_steps=0, accumulate_grad_batches=accumulate,
        )  # fmt: skip
        L.seed_everything(0, verbose=False)
        runner.fit(Frozen(), *battery.loaders(batch_size))
        ranked.append(callback.ranked)
    for name, values in ranked[0].items():
        torch.testing.assert_close(values, ranked[1][name], rtol=1e-9, atol=1e-15)


class Scaled(L.pytorch.plugins.MixedPrecision):
    """Mixed precision on the CPU with a loss scale, as 16-mixed has on a GPU; one step overflows."""

    def __init__(self) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
        super().__init__("16-mixed", "cpu", scaler)

    def forward_context(self) -> Any:
        return torch.autocast("cpu", enabled=False)


class Overflowing(Frozen):
    """The gradients of every third batch are not finite."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if batch_idx % 3 == 2 else loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_scales_and_overflows_make_no_difference(variant: str, tmp_path: Path) -> None:
    callback, module = Keep(keep=0.5, round_to=1, variant=variant, normalize=False), Overflowing()
    twin = copy.deepcopy(module).double()
    battery.train(tmp_path, callback, module=module, max_epochs=2, plugins=[Scaled()])
    graph = lp.trace(twin, torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    batches = [batch for number, batch in enumerate(doubled()) if number % 3 != 2]
    expected = lp.criteria.taylor(graph, batches, mean_loss, variant, normalize=False)
    for name, values in callback.ranked.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-3, atol=1e-9)


def test_momentum_mixes_the_scores_of_two_prunes(tmp_path: Path) -> None:
    settings = {"keep": 0.4, "round_to": 1, "steps": 2}
    with_momentum, without = Keep(momentum=0.25, **settings), Keep(**settings)
    for callback in (with_momentum, without):
        battery.train(tmp_path, callback, module=Frozen(), max_epochs=3, precision="64-true")
    for name, last in without.all_ranked[0].items():
        new, mixed = without.all_ranked[1][name], with_momentum.all_ranked[1][name]
        torch.testing.assert_close(mixed, torch.where(new.isinf(), new, 0.25 * last + 0.75 * new))
    assert any(bool(new.isinf().any()) for new in without.all_ranked[1].values())


def test_frozen_layers_are_ranked_all_the_same(tmp_path: Path) -> None:
    """Gradients are computed where layers read, also when nothing before them is trained."""
    ranked = []
    for frozen in (False, True):
        callback, module = Keep(keep=0.5, round_to=1), Frozen()
        for layer in (module.stem, module.first, module.second):
            layer.requires_grad_(not frozen)
        battery.train(tmp_path, callback, module=module, max_epochs=2)
        ranked.append(callback.ranked)
        assert all(parameter.requires_grad != frozen for parameter in module.first.parameters())
    for name, values in ranked[0].items():
        torch.testing.assert_close(values, ranked[1][name])


def test_ranks_the_channel_that_nothing_depends_on_last(tmp_path: Path) -> None:
    module = Frozen()
    with torch.no_grad():
        module.second.weight[:, 5] = 0.0
    callback = Keep(keep=0.9, round_to=1)
    battery.train(tmp_path, callback, module=module, max_epochs=2)
    assert int(callback.ranked["first"].argmin()) == 5
    assert float(callback.ranked["first"][5]) == 0.0


def test_a_part_that_training_does_not_run_is_reported(tmp_path: Path) -> None:
    class Unused(battery.ResidualClassifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return sum(p.sum() for p in self.parameters()) * 0.0

    with pytest.raises(ValueError, match="has seen no gradients of 'stem', 'first' in a training step that was tried"):
        battery.train(tmp_path, TaylorRankCallback(), module=Unused())


def test_the_gate_needs_the_weights_that_read(tmp_path: Path) -> None:
    module = Frozen()
    module.second.requires_grad_(False)
    with pytest.raises(ValueError, match="has seen no gradients of 'first' in a training step that was tried out"):
        battery.train(tmp_path, TaylorRankCallback(variant="gate"), module=module)


class OtherGradients(Frozen):
    """Differentiates more than its loss; what it has found may count in it, as a penalty."""

    def __init__(self, weight: float | None, shared: bool = False) -> None:
        super().__init__()
        self.weight, self.shared = weight, shared

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images = batch[0].clone().requires_grad_()
        outputs = self(images)
        loss = F.cross_entropy(outputs if self.shared else self(images), batch[1])
        return loss + self.penalty(outputs, images)

    def penalty(self, outputs: Tensor, images: Tensor) -> Tensor | float:
        if self.weight is None:
            torch.autograd.grad(outputs.logsumexp(1).sum(), images, retain_graph=self.shared)
            return 0.0
        (gradient,) = torch.autograd.grad(outputs.logsumexp(1).sum(), images, create_graph=True)
        return self.weight * gradient.square().sum() / len(images)


@pytest.mark.parametrize("shared", ordinary([False, True], True))
@pytest.mark.parametrize("weight", [None, 0.0])
@pytest.mark.parametrize("variant", ordinary(["a", "b", "c"], "a", "c"))
def test_gradients_of_something_else_do_not_count(
    variant: str, weight: float | None, shared: bool, tmp_path: Path
) -> None:
    ranked = []
    for module in (Frozen(), OtherGradients(weight, shared)):
        callback = Keep(keep=0.5, round_to=1, variant=variant, normalize=False)
        battery.train(tmp_path, callback, module=module, max_epochs=2)
        ranked.append(callback.ranked)
    for name, values in ranked[0].items():
        assert torch.equal(values, ranked[1][name])


@pytest.mark.parametrize("shared", ordinary([False, True], True))
@pytest.mark.parametrize("variant", ordinary(["a", "c", "gate"], "a", "gate"))
def test_a_gradient_penalty_counts_as_part_of_the_loss(variant: str, shared: bool, tmp_path: Path) -> None:
    callback = Keep(keep=0.5, round_to=1, variant=variant, normalize=False)
    module = OtherGradients(0.5, shared)
    twin = copy.deepcopy(module).double()
    battery.train(tmp_path, callback, module=module, max_epochs=2, precision="64-true")
    expected = reference(
        twin, doubled(), lambda model, batch: model.training_step(batch, 0) * len(batch[1]), READERS, variant
    )
    for name, values in callback.ranked.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-9, atol=1e-15)


class OneForEachLayer(Frozen):
    """Every layer has an optimizer of its own; all step with the gradients of one backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(mean_loss(self, batch))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(layer.parameters(), 0.0) for layer in (self.stem, self.first, self.second, self.head)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_optimizers_make_no_difference(variant: str, tmp_path: Path) -> None:
    callback, module = Keep(keep=0.5, round_to=1, variant=variant), OneForEachLayer()
    twin = copy.deepcopy(module).double()
    battery.train(tmp_path, callback, module=module, max_epochs=2, precision="64-true")
    graph = lp.trace(twin, torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    expected = lp.criteria.taylor(graph, doubled(), mean_loss, variant)
    for name, values in callback.ranked.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "d"}, "variant must be one of a, b, c, gate, sum_then_square, square_then_sum; got 'd'"),
        ({"flops_penalty": -1.0}, "flops_penalty must be a number of at least 0; got -1.0"),
        ({"momentum": 1.0}, r"momentum must be the fraction of the last scores that is kept, in \[0, 1\); got 1.0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaylorRankCallback(**settings)


class Halves(L.LightningModule):
    """The images of the first of two ranks differ from those of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 3)
        self.example_input_array = torch.zeros(1, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(F.relu(self.first(inputs)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return mean_loss(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        inputs[::2, :4] = inputs[1::2, 4:] = 0.0
        data = TensorDataset(inputs, torch.arange(64) % 3)
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        return battery.ResumableLoader(data, 16 // ranks, sampler=DistributedSampler(data, ranks, rank, shuffle=False))


def test_a_run_on_two_ranks_that_is_resumed_keeps_what_each_has_seen(tmp_path: Path) -> None:
    def fit(name: str, devices: int = 2, path: Path | None = None) -> nn.Module:
        L.seed_everything(0, verbose=False)
        module = Halves()
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto",
            logger=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            callbacks=[
                TaylorRankCallback(metric="channels", round_to=1),
                ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=2, save_top_k=-1),
            ],
        )  # fmt: skip
        trainer.fit(module, ckpt_path=path)
        return module

    unbroken = fit("unbroken")
    within_the_epoch, before_the_prune = (tmp_path / "unbroken" / f"step={step}.ckpt" for step in (2, 4))
    assert battery.differences(unbroken, fit("within", path=within_the_epoch)) == []
    assert battery.differences(unbroken, fit("before", path=before_the_prune)) == []
    alone = fit("alone", devices=1, path=before_the_prune)
    assert plan_in_force(alone) == plan_in_force(unbroken)


def test_totals_of_earlier_versions_are_read() -> None:
    totals = {"sums": {"a": torch.ones(2)}, "counts": {"a": torch.tensor(3.0)}}
    callback = TaylorRankCallback()
    callback.load_state_dict({"steps_done": 0, "batch_like": None, "listened": True, "last_scores": {}, **totals})
    assert (callback.state.totals.sums, callback.state.totals.counts) == (totals["sums"], totals["counts"])


def test_what_has_been_compiled_before_is_watched_and_left_alone_again() -> None:
    images, _ = battery.images(4).tensors
    compiled: list[int] = []  # sizes of what has been compiled

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    found = []
    for compile_it in (lambda network: network, partial(torch.compile, backend=backend)):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
        graph = lp.trace(network, images)
        run = compile_it(network)
        run(images).square().sum().backward()  # compiled without anyone who watches
        totals = Totals()
        collector = make_collector(graph, "a", totals)
        collector.listen()
        loss = run(images).square().sum()
        collector.before_backward()
        loss.backward()
        collector.after_backward(1.0)
        collector.stop()
        run(images).square().sum().backward()
        collector.after_backward(1.0)
        found.append((totals.counts["1"], totals.sums["1"]))
    assert int(found[0][0]) == 4
    torch.testing.assert_close(found[1], found[0])
    assert compiled[-1] == compiled[0]  # in one piece again


def test_copies_and_pickles_made_while_the_model_is_watched_are_on_their_own() -> None:
    images, _ = battery.images(4).tensors
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    optim.SGD(network.parameters())  # which loads the compiler, as every training does
    totals = Totals()
    collector = make_collector(lp.trace(network, images), "a", totals)
    collector.listen()
    for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        collector.before_backward()
        again(images).sum().backward()
        collector.after_backward(1.0)
        assert totals.sums == {}
