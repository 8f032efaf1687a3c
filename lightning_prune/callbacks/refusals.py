"""Refusals: what cannot work together with pruning, said before training starts."""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

from lightning_prune.callbacks.followers import Candidate
from lightning_prune.callbacks.schedule import pruning_among, pruning_callbacks
from lightning_prune.callbacks.trial_run import epochs_of, forgets, steps_of
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.namesakes import namesakes
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.reporting.loggers import say

if TYPE_CHECKING:
    from lightning_prune.callbacks.base import PruningCallback

__all__ = [
    "can_prune_under",
    "refuse_alike",
    "refuse_averaged_models",
    "refuse_few_steps",
    "refuse_other_callbacks",
    "refuse_pruned_blocks",
    "refuse_short_run",
    "refuse_strategy",
]


def refuse_pruned_blocks(callback: "PruningCallback", graph: ChannelGraph) -> None:
    """Raise a ValueError if residual blocks have been pruned, and a method of its own looks at every group.

    Args:
        callback: The callback.
        graph: What it is to prune.
    """
    plan = plan_in_force(graph.model)
    if plan is not None and plan.emptied and len(callback.rankings) == 1:
        raise ValueError(
            f"{type(callback).__name__} cannot go on with a network that residual blocks have been pruned of; use "
            "PruningCallback or TaylorRankCallback."
        )


def can_prune_under(strategy: Any) -> bool:
    """Tell whether a strategy keeps all parameters, complete, in the module itself."""
    shards = isinstance(strategy, namesakes(DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy))
    return isinstance(strategy, namesakes(SingleDeviceStrategy, DDPStrategy)) and not shards


def refuse_strategy(trainer: "pl.Trainer") -> None:
    """Raise a ValueError unless parameters can be replaced under the strategy of a trainer."""
    _refuse_another_version(trainer)
    if not can_prune_under(trainer.strategy):
        raise ValueError(
            f"Pruning does not work with {type(trainer.strategy).__name__}, which shards or moves the parameters; use "
            "strategy='ddp' or a single device."
        )
    memory = getattr(trainer.strategy, "_ddp_comm_state", None)
    if hasattr(memory, "error_dict"):  # the PowerSGD hooks: what they did not send of earlier gradients, by bucket
        raise ValueError(
            f"{type(memory).__name__} remembers gradients in the shapes they have now, which does not follow when "
            "channels are pruned; use fp16_compress_hook or bf16_compress_hook."
        )


def _refuse_another_version(trainer: "pl.Trainer") -> None:
    """Raise a ValueError if the Trainer is of another version of Lightning than that whose insides are known."""
    package = type(trainer).__module__.partition(".")[0]
    classes = [other for other in type(trainer).__mro__ if other in namesakes(pl.Trainer)]
    if not classes:
        raise ValueError(
            f"The Trainer is that of {package!r}, whose classes are other ones than those of lightning; write "
            "`import lightning.pytorch as pl`, and Trainer, modules and callbacks from there."
        )
    package = classes[0].__module__.partition(".")[0]
    version, known = sys.modules[package].__version__, pl.__version__
    if version.split(".")[:2] != known.split(".")[:2]:
        raise ValueError(
            f"The Trainer is that of {package} {version}, and lightning, whose insides are known here, is {known}; "
            f"install the same version: pip install {package.replace('_', '-')}=={known}."
        )


def refuse_other_callbacks(trainer: "pl.Trainer", callback: "PruningCallback") -> None:
    """Raise a ValueError if another callback prunes the same submodule, or keeps a copy of the weights."""
    pruning = pruning_callbacks(trainer)
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, namesakes(StochasticWeightAveraging, ModelPruning)):
            raise ValueError(
                f"{type(other).__name__} keeps a copy or a mask of the weights in the shapes they have now, which does "
                f"not follow when {type(callback).__name__} prunes channels; use one of the two."
            )
        if other is not callback and other in pruning:
            _refuse_overlap(callback, other)


def refuse_alike(callbacks: Any) -> None:
    """Raise a ValueError if two pruning callbacks of one class are about the same submodule.

    Lightning would refuse them too, as their states in a checkpoint had the same name.

    Args:
        callbacks: What a Trainer is given: a list, a single callback, or nothing.
    """
    given = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
    known: dict[str, PruningCallback] = {}
    for callback in pruning_among(given):
        alike = known.setdefault(callback.state_key, callback)
        if alike is not callback:
            about = repr(callback.module) if callback.module else "the whole model"
            raise ValueError(
                f"Two callbacks {type(callback).__name__} prune {about}; keep one of them, or give each a submodule of "
                "its own with `module`."
            )


def _refuse_overlap(callback: "PruningCallback", other: "PruningCallback") -> None:
    """Raise a ValueError if two callbacks prune the same submodule, or one inside the other, or both teach."""
    if callback.distill and other.distill:
        names = type(callback).__name__, type(other).__name__
        raise ValueError(
            f"{' and '.join(names)} both have distill; set it for one of them, whose teacher is the whole model."
        )
    inner, outer = sorted((callback.module, other.module), key=len, reverse=True)
    if outer not in ("", inner) and not inner.startswith(outer + "."):
        return
    both = repr(inner) if inner else "the whole model"
    raise ValueError(
        f"{type(callback).__name__} and {type(other).__name__} both prune {both}; keep one of them, or give each a "
        "submodule of its own with `module`."
    )


def refuse_short_run(trainer: "pl.Trainer", callback: "PruningCallback") -> None:
    """Raise a ValueError if the run ends before a prune that is still to come."""
    if callback.is_complete and plan_in_force(trainer.lightning_module) is not None:
        return
    if forgets(trainer):
        say(
            "The Trainer of this trial run was made before lightning_prune.callbacks was imported: whether the "
            f"schedule of {type(callback).__name__} fits into max_epochs, and whether the run validates, has not been "
            "checked."
        )
    epochs, last = epochs_of(trainer), callback.last_prune_epoch
    recovery = callback.every_n_epochs if callback.max_drop is not None else 1
    if epochs is None or last + recovery <= epochs:
        return
    if callback.max_drop is not None:
        raise ValueError(
            f"{type(callback).__name__} prunes before epoch {last} (counted from 0) first, and validates what the "
            f"{recovery} epochs after it have recovered, but the run ends after {epochs} epochs; raise max_epochs to "
            f"at least {last + recovery}, or lower start_epoch or every_n_epochs."
        )
    raise ValueError(
        f"{type(callback).__name__} prunes before epochs {callback.start_epoch} to {last} (counted from 0), but the "
        f"run ends after {epochs} epochs; raise max_epochs to at least {last + 1}, or lower start_epoch, steps or "
        "every_n_epochs."
    )


def refuse_few_steps(trainer: "pl.Trainer", callback: "PruningCallback") -> None:
    """Raise a ValueError if ``max_steps`` ends the run before a prune that is still to come.

    Args:
        trainer: The trainer, when training starts.
        callback: The callback.
    """
    limits = steps_of(trainer)
    if limits is None or callback.is_complete:
        return
    most, per_epoch = limits
    last, now = callback.last_prune_epoch, trainer.current_epoch
    begun = 1 if trainer.global_step else 0  # a run that goes on may have done some of this epoch
    needed = trainer.global_step + max(0, last - now - begun) * per_epoch + 1
    if callback.max_drop is not None:
        needed += callback.every_n_epochs * per_epoch - 1
    if needed > most:
        raise ValueError(
            f"{type(callback).__name__} prunes before epoch {last} (counted from 0), but the run ends after {most} "
            f"steps, of which an epoch takes {per_epoch}; raise max_steps to at least {needed}, or lower start_epoch, "
            "steps or every_n_epochs."
        )


def refuse_averaged_models(
    pl_module: "pl.LightningModule", graph: ChannelGraph, followers: Sequence[Candidate]
) -> None:
    """Raise a ValueError if the module or a callback of somebody's has an average that is not pruned with the weights.

    Args:
        pl_module: The LightningModule.
        graph: The traced model.
        followers: The copies of weights that are pruned with them.
    """
    pruned_along = {id(candidate.follower.module) for candidate in followers}
    own = {id(tensor): name for name, tensor in named_tensors(pl_module).items()}
    prunable = {one.tensor for group in graph.groups.values() for one in group.slices}
    for place, value in _attributes(pl_module):
        averages = [leaf for leaf in tree_leaves(value) if isinstance(leaf, AveragedModel)]
        for average in averages:
            names = [own.get(id(tensor)) for tensor in named_tensors(average.module).values()]
            follows = id(average.module) in pruned_along or bool(prunable.intersection(names))
            source = _averaged_submodule(pl_module, graph, average)
            if source and not follows:
                raise ValueError(
                    f"{place} averages the weights of {source!r} in the shapes they have now, which does not follow "
                    "when channels are pruned; use Lightning's WeightAveraging or EMAWeightAveraging callback, which "
                    "does."
                )


def _attributes(pl_module: "pl.LightningModule") -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module, its submodules and the callbacks, each with its name in words."""
    for prefix, module in pl_module.named_modules():
        for name, value in (*module._modules.items(), *vars(module).items()):
            dotted = f"{prefix}.{name}".lstrip(".")
            yield f"{dotted!r} of {type(pl_module).__name__}", value
    for callback in pl_module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, namesakes(WeightAveraging)):  # whose copies are pruned too
            continue
        for name, value in vars(callback).items():
            yield f"{name!r} of {type(callback).__name__}", value


def _averaged_submodule(pl_module: "pl.LightningModule", graph: ChannelGraph, average: AveragedModel) -> str | None:
    """Name the submodule that can be pruned and has the tensors of an average, if there is one."""
    shapes = {name: tensor.shape for name, tensor in average.module.state_dict().items()}
    prunable = {slice_.tensor for group in graph.groups.values() for slice_ in group.slices}
    for prefix, module in pl_module.named_modules():
        if {name: tensor.shape for name, tensor in module.state_dict().items()} != shapes:
            continue
        if any(f"{prefix}.{name}".lstrip(".") in prunable for name in shapes):
            return prefix or type(pl_module).__name__
    return None
