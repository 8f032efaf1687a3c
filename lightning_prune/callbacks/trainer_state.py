"""What the pruning callbacks need of a Trainer: its ranks, its batches, its metrics."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_prune.callbacks.batches import first_part, gives_samples, samples
from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan, plan_in_force

if TYPE_CHECKING:
    from lightning_prune.callbacks.base import PruningCallback

__all__ = [
    "agree",
    "averaged_copies",
    "decided_by_first_rank",
    "example_inputs",
    "log_epoch",
    "loss_scale",
    "metrics",
    "refuse_averaged_models",
    "refuse_other_callbacks",
    "refuse_short_run",
    "refuse_strategy",
    "unlogged",
]

# -- strategies and ranks ----------------------------------------------------------------------------------------------


def can_prune_under(strategy: Any) -> bool:
    """Tell whether a strategy keeps every parameter whole, on each device, in the module itself."""
    shards = isinstance(strategy, DeepSpeedStrategy | XLAStrategy | SingleDeviceXLAStrategy)
    return isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not shards


def refuse_strategy(trainer: "pl.Trainer") -> None:
    """Raise unless parameters can be replaced under the strategy of this trainer."""
    if not isinstance(trainer, pl.Trainer):
        raise ValueError(
            f"The Trainer is that of {type(trainer).__module__.partition('.')[0]!r}, whose classes are other ones than "
            "those of lightning; write `import lightning.pytorch as pl`, and Trainer, modules and callbacks from there."
        )
    if not can_prune_under(trainer.strategy):
        raise ValueError(
            f"Pruning does not work with {type(trainer.strategy).__name__}, which shards or moves the parameters; use "
            "strategy='ddp' or a single device."
        )
    memory = getattr(trainer.strategy, "_ddp_comm_state", None)
    if hasattr(memory, "error_dict"):  # the PowerSGD hooks: what they left out of earlier gradients, by bucket
        raise ValueError(
            f"{type(memory).__name__} remembers gradients in the shapes they have now, which does not follow when "
            "channels are removed; use fp16_compress_hook or bf16_compress_hook."
        )


def refuse_other_callbacks(trainer: "pl.Trainer", callback: "PruningCallback") -> None:
    """Raise if another callback prunes the same part of the model, or keeps a copy of its weights."""
    from lightning_prune.callbacks.base import PruningCallback

    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, StochasticWeightAveraging | ModelPruning):
            raise ValueError(
                f"{type(other).__name__} keeps a copy or a mask of the weights in the shapes they have now, which does "
                f"not follow when {type(callback).__name__} removes channels; leave one of them out."
            )
        if other is callback or not isinstance(other, PruningCallback):
            continue
        inner, outer = sorted((callback.module, other.module), key=len, reverse=True)
        if outer in ("", inner) or inner.startswith(outer + "."):
            part = repr(inner) if inner else "the whole model"
            raise ValueError(
                f"{type(callback).__name__} and {type(other).__name__} both prune {part}; keep one of them, or give "
                "each a part of its own with `module`."
            )


def refuse_short_run(trainer: "pl.Trainer", callback: "PruningCallback") -> None:
    """Raise if the run ends before a prune that is still to come."""
    epochs, last = trainer.max_epochs, callback.last_prune_epoch
    done = callback.steps_done >= callback.steps and plan_in_force(trainer.lightning_module) is not None
    if done or trainer.fast_dev_run or epochs is None or epochs < 0 or last < epochs:  # type: ignore[attr-defined]
        return
    raise ValueError(
        f"{type(callback).__name__} prunes before epochs {callback.start_epoch} to {last} (counted from 0), but the "
        f"run ends after {epochs} epochs; raise max_epochs to at least {last + 1}, or lower start_epoch, steps or "
        "every_n_epochs."
    )


def averaged_copies(trainer: "pl.Trainer") -> list[nn.Module]:
    """Return the copies of the module whose weights `WeightAveraging` callbacks average."""
    averaged = [other._average_model for other in trainer.callbacks if isinstance(other, WeightAveraging)]  # type: ignore[attr-defined]
    return [average.module for average in averaged if average is not None]


def refuse_averaged_models(pl_module: "pl.LightningModule", graph: ChannelGraph) -> None:
    """Raise if the module or a callback of yours holds an average of weights that can be pruned."""
    for holder, held in _held(pl_module):
        for average in tree_leaves(held):
            if isinstance(average, AveragedModel) and (source := _pruned_source(pl_module, graph, average)):
                raise ValueError(
                    f"{holder} averages the weights of {source!r} in the shapes they have now, which does not follow "
                    "when channels are removed; use Lightning's WeightAveraging or EMAWeightAveraging callback, which "
                    "does."
                )


def _held(pl_module: "pl.LightningModule") -> Iterator[tuple[str, Any]]:
    """Return the attributes of the module, its parts and the callbacks, each with its name in words."""
    for name, part in pl_module.named_modules():
        for attribute, held in (*part._modules.items(), *vars(part).items()):
            yield f"{f'{name}.{attribute}'.lstrip('.')!r} of {type(pl_module).__name__}", held
    for callback in pl_module.trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, WeightAveraging):  # whose copies are pruned too
            yield from ((f"{name!r} of {type(callback).__name__}", held) for name, held in vars(callback).items())


def _pruned_source(pl_module: "pl.LightningModule", graph: ChannelGraph, average: AveragedModel) -> str | None:
    """Name the part that can be pruned and has the tensors of an average, if there is one."""
    shapes = {name: value.shape for name, value in average.module.state_dict().items()}
    pruned = {part.tensor for group in graph.groups.values() for part in group.slices}
    for name, part in pl_module.named_modules():
        same = {key: value.shape for key, value in part.state_dict().items()} == shapes
        if same and any(f"{name}.{key}".lstrip(".") in pruned for key in shapes):
            return name or type(pl_module).__name__
    return None


def decided_by_first_rank(trainer: "pl.Trainer", decide: Callable[[], Any]) -> Any:
    """Return what a function returns on the first rank, on all ranks; the others do not call it.

    Raises:
        ValueError: On all ranks, if the function raises one on the first.
    """
    decided, error = None, ""
    if trainer.is_global_zero:
        try:
            decided = decide()
        except ValueError as raised:
            error = str(raised)
    decided, error = trainer.strategy.broadcast((decided, error))
    if error:
        raise ValueError(error)
    return decided


def agree(trainer: "pl.Trainer", make: Callable[[], PruningPlan]) -> PruningPlan:
    """Return the plan that the first rank makes, the same on every rank.

    Raises:
        ValueError: If there is no such plan.
        RuntimeError: If what a rank has received is not what the first one has sent.
    """

    def decide() -> tuple[dict[str, Any], str]:
        plan = make()
        return plan.to_json(), plan.digest

    content, digest = decided_by_first_rank(trainer, decide)
    agreed = PruningPlan.from_json(content)
    if agreed.digest != digest:
        raise RuntimeError(
            f"Rank {trainer.global_rank} has received another plan than rank 0 has sent; see that all nodes run "
            "the same version of lightning-prune."
        )
    return agreed


def loss_scale(trainer: "pl.Trainer") -> float:
    """Return what mixed precision multiplies losses by before their gradients are computed."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


# -- example inputs and metrics ----------------------------------------------------------------------------------------


def example_inputs(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", module: str, given: Any, seen: dict[str, Any] | None
) -> Any:
    """Return what the part to prune takes.

    Args:
        trainer: The trainer.
        pl_module: The LightningModule.
        module: Dotted name of the part.
        given: What the callback was given, if anything; a list of numbers is the shape of one tensor.
        seen: Shape and type of the first batch, if a run that is resumed has looked at it before.
    """
    if given is not None:
        shape = isinstance(given, list) and bool(given) and all(isinstance(size, int) for size in given)
        inputs = torch.zeros(given) if shape else given
    elif module:
        raise ValueError(
            f"example_inputs must be given to prune the part {module!r}, since its inputs are not those of the model."
        )
    elif pl_module.example_input_array is not None:
        inputs = pl_module.example_input_array
    elif seen is not None:
        inputs = torch.zeros(seen["shape"], dtype=getattr(torch, seen["dtype"]))
    else:
        inputs = _first_sample(trainer, pl_module)
    # As Lightning does with batches: the type for precisions such as 64-true, and the device.
    return move_data_to_device(trainer.precision_plugin.convert_input(inputs), pl_module.device)


def _first_sample(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Tensor:
    """Return the inputs of one sample, or of a batch where the loader has no data set that can be asked for one."""
    loaders, structure = tree_flatten(trainer.train_dataloader)
    with isolate_rng():
        parts = [
            samples(loader, [0]) if gives_samples(loader) else next(iter([] if loader is None else loader), None)
            for loader in loaders
        ]
        # What the model gets: data modules may leave the last steps to the hooks around the transfer to the device.
        batch = first_part(trainer, trainer.strategy.batch_to_device(tree_unflatten(parts, structure)))
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(first, Tensor):
        raise ValueError(
            f"No example input is to be had from a batch of type {type(batch).__name__}; set example_input_array on "
            f"{type(pl_module).__name__}, or example_inputs on the callback."
        )
    return first[:1]


def log_epoch(pl_module: "pl.LightningModule", name: str, value: float) -> None:
    """Log a number that holds for the epoch that begins."""
    # Lightning would look for the batch size in a batch that need not have been drawn yet, nor be made of tensors.
    pl_module.log(name, value, on_step=False, on_epoch=True, rank_zero_only=True, batch_size=1)


@contextmanager
def unlogged(pl_module: "pl.LightningModule") -> Iterator[None]:
    """Let ``self.log`` do nothing for a while, in which a callback runs the model: these are no steps of training."""
    parts = [vars(part) for part in pl_module.modules() if isinstance(part, pl.LightningModule)]
    own = [part.get("log") for part in parts]
    try:
        for part in parts:
            part["log"] = _log_nothing
        yield
    finally:
        for part, log in zip(parts, own, strict=True):
            part.pop("log")
            if log is not None:
                part["log"] = log


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def metrics(trainer: "pl.Trainer") -> dict[str, float]:
    """Return the metrics of the last validation."""
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    return {name: value for name, value in sorted(found.items()) if not name.endswith(("_step", "_epoch"))}
