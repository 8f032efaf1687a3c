"""What people do wrong, and the sentence each of them gets; more are in the tables next to what they are about.

Settings out of range, schedules and batches: `test_schedule_and_messages.py`; checkpoints: `test_checkpoint.py`.
"""

import copy
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    XLAStrategy,
)
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.utils.data import DataLoader, IterableDataset

import lightning_prune as lp
from lightning_prune.callbacks import AFIEEarlyPruneCallback, LearnToPruneCallback, PruningCallback, TaylorRankCallback
from lightning_prune.checkpoint import save_plan

EXAMPLE = torch.zeros(1, 1, 8, 8)


class Parts(battery.ResidualClassifier):
    """Named parts for `module` to point at."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.stacks = nn.ModuleList([self.body])


class WithLBFGS(battery.ResidualClassifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), max_iter=1)


class Shards(torch.optim.SGD):
    """Keeps its state as `ZeroRedundancyOptimizer` does, which takes several ranks."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, 0.01)
        self.optim = torch.optim.AdamW(self.param_groups[0]["params"])


class WithShards(battery.ResidualClassifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Shards(self.parameters())


class WithOddState(battery.ResidualClassifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), 0.01)  # stands for one that keeps factors of matrices
        for parameter in self.parameters():
            optimizer.state[parameter]["history"] = torch.zeros(3, parameter.numel())
        return optimizer


class Quantized(battery.ResidualClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.ao.nn.quantized.dynamic.Linear(4, 4)


class WithLock(battery.ResidualClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.matrix


class Mixing(battery.ResidualClassifier):
    """The channels of its first layer are read by a layer of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.mix, self.top = nn.Linear(64, 16), Mix(), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.top(self.mix(self.lift(images.flatten(1))))


class Nothing(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


class Words(IterableDataset):
    def __iter__(self) -> Any:
        return iter(["one", "two"])


@dataclass
class Fit:
    """A run that is refused, once a folder is known to write to."""

    callbacks: tuple[L.Callback, ...]
    module: Any

    def __call__(self, root: Path, **trainer: Any) -> Any:
        return battery.train(root, *copy.deepcopy(self.callbacks), module=self.module, **trainer)


def fit(*callbacks: L.Callback, module: Any = battery.ResidualClassifier) -> Fit:
    return Fit(callbacks, module)


def fit_on(data: IterableDataset) -> Callable[[Path], Any]:
    def run(root: Path) -> None:
        trainer = L.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            callbacks=[PruningCallback()], default_root_dir=root,
        )  # fmt: skip
        trainer.fit(battery.ResidualClassifier(), DataLoader(data, batch_size=None))

    return run


def under(strategy: type, **attributes: Any) -> Callable[[Path], Any]:
    """Set up under a strategy that this machine need not be able to run."""

    def run(root: Path) -> None:
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=5)
        trainer._accelerator_connector.strategy = made = strategy.__new__(strategy)
        vars(made).update(attributes)
        PruningCallback().setup(trainer, battery.ResidualClassifier(), "fit")

    return run


def pruned(keep: float = 0.5) -> nn.Module:
    model = battery.ResidualClassifier()
    graph = lp.trace(model, EXAMPLE)
    lp.prune(model, lp.plan(graph, lp.criteria.magnitude(graph), keep=keep, round_to=2))
    return model


def without_blocks() -> nn.Module:
    model = battery.DeepClassifier()
    graph = lp.trace(model, EXAMPLE, blocks=True)
    lp.prune(model, graph.plan({next(iter(graph.blocks)): torch.arange(0)}))
    return model


def saved(path: Path, change: Callable[[dict[str, Any]], Any] = lambda checkpoint: None) -> Path:
    model = pruned()
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict(), "hyper_parameters": {"width": 12, "norm": True}}
    save_plan(model, checkpoint)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


def load(write: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def run(root: Path) -> None:
        write(root / "a.ckpt")
        lp.load_pruned(battery.ResidualClassifier, root / "a.ckpt")

    return run


def load_changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return load(lambda path: saved(path, change))


def resume(change: Callable[[dict[str, Any]], Any], module: Callable[[], Any] = battery.ResidualClassifier) -> Any:
    def run(root: Path) -> None:
        _, trainer = battery.train(root, battery.make_callback("magnitude"))
        path = Path(trainer.checkpoint_callback.best_model_path)
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)
        battery.train(root / "b", battery.make_callback("magnitude"), module=module(), ckpt_path=path, max_epochs=9)

    return run


def set_kept(kept: list[int]) -> Callable[[dict[str, Any]], Any]:
    return lambda checkpoint: checkpoint["lightning_prune"]["plan"]["groups"]["stem"].__setitem__("kept", kept)


def set_plan(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda checkpoint: checkpoint["lightning_prune"]["plan"].__setitem__(key, value)


def body(kind: type[PruningCallback] = PruningCallback, module: str = "body", **settings: Any) -> PruningCallback:
    return kind(module=module, example_inputs=[1, 1, 8, 8], **settings)


Row = tuple[Callable[[Path], Any], type[Exception], str]
KEEP = "keep must be the fraction that is kept, above 0 and at most 1; got"
METRIC = "metric must be one of flops, params, channels, latency; got"
OTHER = "keeps a copy or a mask of the weights in the shapes they have now, which does not follow when"
INPUTS = "do not fit the forward pass of"
OTHER_TRAINER = type(
    "Trainer", (), {"__module__": "pytorch_lightning.trainer.trainer"}
)  # as `pytorch-lightning` has it

SETTINGS: dict[str, Row] = {
    "keep=True": (lambda _: PruningCallback(keep=True), ValueError, f"{KEEP} True."),
    "keep=-0.5": (lambda _: PruningCallback(keep=-0.5), ValueError, f"{KEEP} -0.5."),
    "keep in percent": (lambda _: PruningCallback(keep=50), ValueError, f"{KEEP} 50."),
    "keep of Taylor": (lambda _: TaylorRankCallback(keep=0.0), ValueError, f"{KEEP} 0.0."),
    "metric in capitals": (lambda _: PruningCallback(metric="FLOPs"), ValueError, f"{METRIC} 'FLOPs'."),
    "metric=None": (lambda _: PruningCallback(metric=None), ValueError, f"{METRIC} None."),
    "start_epoch=0.5": (
        lambda _: PruningCallback(start_epoch=0.5), ValueError,
        "start_epoch must be a whole number of at least 0; got 0.5.",
    ),
    "start_epoch as text": (
        lambda _: PruningCallback(start_epoch="1"), ValueError,
        "start_epoch must be a whole number of at least 0; got '1'.",
    ),
    "every_n_epochs=-1": (
        lambda _: PruningCallback(every_n_epochs=-1), ValueError,
        "every_n_epochs must be a whole number of at least 1; got -1.",
    ),
    "round_to=8.0": (
        lambda _: PruningCallback(round_to=8.0), ValueError, "round_to must be a whole number of at least 1; got 8.0.",
    ),
    "min_channels as a fraction": (
        lambda _: PruningCallback(min_channels=0.1), ValueError,
        "min_channels must be a whole number of at least 1; got 0.1.",
    ),
    "steps=None": (
        lambda _: TaylorRankCallback(steps=None), ValueError, "steps must be a whole number of at least 1; got None.",
    ),
    "a setting that is not there": (
        lambda _: PruningCallback(sparsity=0.5), TypeError,
        "PruningCallback.__init__() got an unexpected keyword argument 'sparsity'",
    ),
    "starts after the end": (
        fit(PruningCallback(start_epoch=5)), ValueError,
        "PruningCallback prunes before epochs 5 to 5 (counted from 0), but the run ends after 5 epochs; raise "
        "max_epochs to at least 6, or lower start_epoch, steps or every_n_epochs.",
    ),
    "gaps too wide": (
        fit(TaylorRankCallback(steps=3, every_n_epochs=4)), ValueError,
        "TaylorRankCallback prunes before epochs 1 to 9 (counted from 0), but the run ends after 5 epochs;",
    ),
    "min_channels above all widths": (
        fit(PruningCallback(min_channels=100)), ValueError,
        "min_channels=100 is above every width, of which the greatest is 24, so that nothing can be pruned",
    ),
    "round_to above all widths": (
        fit(PruningCallback(keep=0.1, metric="params", round_to=64)), ValueError,
        "keep=0.1 of the params cannot be reached: between 1.000 and 1 can be kept with round_to=64 and min_channels=1",
    ),
    "pattern with a name from elsewhere": (
        fit(PruningCallback(ignore="model.stem")), ValueError,
        "The ignore pattern 'model.stem' matches no module of the model; its modules",
    ),
    "metric of a plan": (
        lambda _: lp.plan(lp.trace(battery.ResidualClassifier(), EXAMPLE), {}, metric="macs"), ValueError,
        f"{METRIC} 'macs'.",
    ),
    "order of a norm": (
        lambda _: lp.criteria.magnitude(lp.trace(battery.ResidualClassifier(), EXAMPLE), p=0), ValueError,
        "p must be the order of a norm, above 0; got 0.",
    ),
}  # fmt: skip
COMPANY: dict[str, Row] = {
    "the other package with the same classes": (
        lambda _: PruningCallback().setup(OTHER_TRAINER(), battery.ResidualClassifier(), "fit"), ValueError,
        "The Trainer is that of 'pytorch_lightning', whose classes are other ones than those of lightning; write "
        "`import lightning.pytorch as pl`, and Trainer, modules and callbacks from there.",
    ),
    "FSDP": (under(FSDPStrategy), ValueError, "Pruning does not work with FSDPStrategy, which shards or moves the"),
    "model parallel": (
        under(ModelParallelStrategy), ValueError,
        "Pruning does not work with ModelParallelStrategy, which shards or moves the parameters; use strategy='ddp' or "
        "a single device.",
    ),
    "DeepSpeed": (under(DeepSpeedStrategy), ValueError, "Pruning does not work with DeepSpeedStrategy, which shards"),
    "XLA": (under(XLAStrategy), ValueError, "Pruning does not work with XLAStrategy, which shards or moves the"),
    "a gradient compressor with a memory": (
        under(DDPStrategy, _ddp_comm_state=PowerSGDState(None)), ValueError,
        "PowerSGDState remembers gradients in the shapes they have now, which does not follow when channels are "
        "pruned; use fp16_compress_hook or bf16_compress_hook.",
    ),
    "SWA": (
        fit(StochasticWeightAveraging(swa_lrs=1e-2), PruningCallback()), ValueError,
        f"StochasticWeightAveraging {OTHER} PruningCallback prunes channels; use one of the two.",
    ),
    "Lightning's own pruning": (
        fit(ModelPruning("l1_unstructured"), PruningCallback()), ValueError, f"ModelPruning {OTHER} PruningCallback",
    ),
    "the same callback twice": (
        fit(PruningCallback(), PruningCallback()), ValueError,
        "Two callbacks PruningCallback prune the whole model; keep one of them, or give each a submodule",
    ),
    "a part and the whole": (
        fit(PruningCallback(), body(), module=Parts()), ValueError,
        "PruningCallback and PruningCallback both prune 'body'; keep one of them, or give each a submodule of its own "
        "with `module`.",
    ),
    "a part of a part": (
        fit(body(module="body.0"), body(TaylorRankCallback), module=Parts()), ValueError,
        "PruningCallback and TaylorRankCallback both prune 'body.0'; keep one of them,",
    ),
}  # fmt: skip
MODELS: dict[str, Row] = {
    "LBFGS": (
        fit(PruningCallback(), module=WithLBFGS()), TypeError,
        "LBFGS keeps its history for all parameters in one vector, which cannot lose channels; use another optimizer, "
        "such as SGD or AdamW.",
    ),
    "state spread over the ranks": (
        fit(PruningCallback(), module=WithShards()), TypeError,
        "Shards spreads its state over the ranks, where it cannot be sliced; use the AdamW in it as it is.",
    ),
    "state that belongs to no channel": (
        fit(PruningCallback(criterion="l1"), module=WithOddState()), TypeError,
        "SGD keeps 'history' of 'stem.weight' in shape (3, 108), where nothing says which numbers belong to which "
        "channel; use another optimizer, such as SGD or AdamW.",
    ),
    "a module that cannot be copied": (
        fit(LearnToPruneCallback(finetune_steps=1), module=WithLock()), ValueError,
        "finetune_steps=1 trains copies of WithLock, which cannot be copied: cannot pickle '_thread.lock' object; set "
        "finetune_steps=0, or keep that object out of the module.",
    ),
    "quantized": (
        fit(PruningCallback(), module=Quantized()), ValueError,
        "'extra' is quantized; prune the model before quantizing it.",
    ),
    "a reader of its own kind under Taylor": (
        fit(TaylorRankCallback(), module=Mixing()), ValueError,
        "The Taylor criterion cannot watch what 'mix' (Mix) consumes of group 'lift'; add 'lift' to ignore, or use a "
        "criterion that needs no activations, such as 'l1', or 'taylor' with variant 'gate'.",
    ),
    "blocks and a method of its own": (
        lambda root: AFIEEarlyPruneCallback(blocks=True), ValueError,
        "AFIEEarlyPruneCallback decides by a method of its own how much each layer gives, which says nothing of",
    ),
    "blocks and scores of one layer": (
        lambda root: PruningCallback(criterion="l1", blocks=True), ValueError,
        "criterion='l1' compares channels with others of their group, which tells nothing of blocks; leave blocks out,",
    ),
    "blocks and scores of Taylor divided by their norm": (
        lambda root: TaylorRankCallback(blocks=True), ValueError,
        "variant='a' with normalize=None compares channels with others of their group, which tells nothing of blocks;",
    ),
    "a network without some of its blocks": (
        fit(AFIEEarlyPruneCallback(), module=without_blocks()), ValueError,
        "AFIEEarlyPruneCallback cannot go on with a network that residual blocks have been pruned of; use",
    ),
    "a part that is nothing but output": (
        fit(PruningCallback(module="head", example_inputs=[1, 48])), ValueError,
        "PruningCallback finds nothing to prune: head: is an output of the network.",
    ),
    "a part without forward": (
        fit(body(module="stacks"), module=Parts()), ValueError,
        f"The example inputs [(1, 1, 8, 8)] {INPUTS} ModuleList: Module [ModuleList] is missing the required",
    ),
    "a part that is not there": (
        fit(body(module="body.7"), module=Parts()), ValueError,
        "The model has no module 'body.7'; its modules nearest to that are 'body.0'",
    ),
    "inputs without sizes": (
        fit(PruningCallback(example_inputs=[])), ValueError, f"The example inputs [] {INPUTS} ResidualClassifier:",
    ),
    "inputs as text": (
        fit(PruningCallback(example_inputs="1,1,8,8")), ValueError,
        f"The example inputs [] {INPUTS} ResidualClassifier: conv2d() received an invalid combination of arguments",
    ),
    "inputs by a wrong name": (
        fit(PruningCallback(example_inputs={"x": EXAMPLE})), ValueError,
        f"The example inputs [(1, 1, 8, 8)] {INPUTS} ResidualClassifier: ResidualClassifier.forward() got an "
        "unexpected keyword argument 'x'",
    ),
    "inputs without channels": (
        fit(PruningCallback(example_inputs=[8, 8])), ValueError,
        f"The example inputs [(8, 8)] {INPUTS} ResidualClassifier: Expected 3D (unbatched) or 4D (batched) input",
    ),
    "data without a batch": (
        fit_on(Nothing()), ValueError,
        "No example input is to be had from a batch of type NoneType, as no step of ResidualClassifier works with it "
        "on a copy; set example_input_array on it, or example_inputs on the callback.",
    ),
    "data in words": (fit_on(Words()), ValueError, "No example input is to be had from a batch of type str, as no"),
}  # fmt: skip
CHECKPOINTS: dict[str, Row] = {
    "a folder": (load(lambda path: path.mkdir()), FileNotFoundError, "There is no checkpoint at '{root}/a.ckpt'."),
    "version as text": (
        load_changed(set_plan("version", "2")), ValueError,
        "The plan is damaged: its format version is '2'; make it anew with `lightning_prune.plan` or",
    ),
    "a group of nothing": (
        load_changed(set_kept([])), ValueError,
        "A group of 12 channels must keep at least one of them, ascending and without repetition; got [].",
    ),
    "a channel twice": (
        load_changed(set_kept([0, 0, 1])), ValueError,
        "A group of 12 channels must keep at least one of them, ascending and without repetition; got [0, 0, 1].",
    ),
    "a channel too many": (
        load_changed(set_kept([3, 12])), ValueError,
        "A group of 12 channels must keep at least one of them, ascending and without repetition; got [3, 12].",
    ),
    "another plan than the weights": (
        load_changed(set_kept([0, 1, 2, 3, 4])), ValueError,
        "The checkpoint is damaged: 'stem.weight' has shape (10, 1, 3, 3), where its plan says (5, 1, 3, 3).",
    ),
    "a weight that is missing": (
        load_changed(lambda checkpoint: checkpoint["state_dict"].pop("stem.bias")), ValueError,
        "The checkpoint '{root}/a.ckpt' is of another architecture. Error(s) in loading state_dict for Residual",
    ),
    "resumed into another width": (
        resume(lambda checkpoint: None, lambda: battery.ResidualClassifier(width=10)), ValueError,
        "The checkpoint is of another architecture: 'stem.weight' has shape (12, 1, 3, 3) in it and (10, 1, 3, 3) in",
    ),
    "resumed from a newer format": (
        resume(set_plan("version", 3)), ValueError,
        "The plan has format version 3, this lightning-prune reads up to 1; install a newer lightning-prune.",
    ),
    "resumed from nowhere": (
        lambda root: battery.train(root, PruningCallback(), ckpt_path=root / "nowhere.ckpt"), FileNotFoundError,
        "Checkpoint file not found: {root}/nowhere.ckpt",  # Lightning's
    ),
}  # fmt: skip
TABLE: dict[str, Row] = {**SETTINGS, **COMPANY, **MODELS, **CHECKPOINTS}


@pytest.mark.parametrize("use", TABLE)
def test_every_wrong_use_gets_its_sentence(use: str, tmp_path: Path) -> None:
    act, kind, start = TABLE[use]
    with pytest.raises(kind, match="^" + re.escape(start.replace("{root}", str(tmp_path)))):
        act(tmp_path)


RUNS = {use for use, (act, _, _) in TABLE.items() if isinstance(act, Fit)}


@pytest.mark.parametrize("use", sorted(RUNS))
def test_a_trial_run_of_two_batches_finds_what_a_run_refuses(use: str, tmp_path: Path) -> None:
    act, kind, start = TABLE[use]
    with pytest.raises(kind, match="^" + re.escape(start)):
        act(tmp_path, fast_dev_run=2)


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) == len(SETTINGS) + len(COMPANY) + len(MODELS) + len(CHECKPOINTS) >= 40
