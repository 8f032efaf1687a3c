"""Relatives: frozen parts of a module, and parts that follow the weights of others, found before training."""

import copy
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

from lightning_prune.callbacks.followers import Candidate, followed_inside
from lightning_prune.callbacks.rehearsal import Rehearsal
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.relations import Relations
from lightning_prune.graph.run import submodule_of
from lightning_prune.namesakes import namesakes
from lightning_prune.reporting.loggers import say

__all__ = ["frozen_parts", "may_thaw", "relations_in", "tell_of_relations", "thaw", "thaws_by_itself"]


def relations_in(rehearsal: Rehearsal, module: str, copies: Sequence[Candidate]) -> Relations:
    """Return which parts of what is pruned are frozen, and which follow others.

    Args:
        rehearsal: The steps of the LightningModule.
        module: Dotted name of the submodule to prune, or empty.
        copies: Copies elsewhere that follow what they are copies of.
    """
    is_for_good = not may_thaw(rehearsal.trainer)
    frozen = frozen_parts(rehearsal.pl_module, module) if is_for_good else []
    outside = [one.follower.tensors for one in copies if one.callback is None]
    return Relations(frozen, followed_inside(rehearsal, frozen), outside)


def may_thaw(trainer: "pl.Trainer") -> bool:
    """Tell whether what is frozen may be trained later on: by a callback for that, or by the module if it says so.

    Args:
        trainer: The trainer.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, namesakes(BaseFinetuning)) for callback in callbacks):
        return True
    return thaws_by_itself(trainer)


def thaws_by_itself(trainer: "pl.Trainer") -> bool:
    """Tell whether a module says that it lets frozen parts be trained later on.

    Args:
        trainer: The trainer.
    """
    return bool(getattr(trainer.lightning_module, "unfreezes", False))


def thaw(trainer: "pl.Trainer", model: nn.Module, epoch: int) -> None:
    """Let those parameters of a copy of the module be trained that finetuning callbacks will have thawed.

    Args:
        trainer: The trainer.
        model: The copy.
        epoch: The epoch that is asked about.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, namesakes(BaseFinetuning)):
            finetuning: Any = copy.copy(callback)  # which notes learning rates
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
            for number in range(epoch + 1):
                finetuning.finetune_function(model, number, optimizer)


def frozen_parts(model: nn.Module, module: str = "") -> list[str]:
    """Return the dotted names of the outermost submodules, of several layers, whose parameters are all frozen.

    Args:
        model: The model.
        module: Dotted name of the submodule to look into; where that is frozen itself, nothing in it is set apart.
    """
    if _is_frozen(submodule_of(model, module)):
        return []
    prefix = f"{module}." if module else ""
    parts: list[str] = []
    for name, submodule in model.named_modules():
        inside = name.startswith(prefix) and name not in ("", module)
        outermost = not any(name.startswith(f"{part}.") for part in parts)
        if inside and outermost and list(submodule.children()) and _is_frozen(submodule):
            parts.append(name)
    return parts


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def tell_of_relations(graph: ChannelGraph, copies: Sequence[Candidate]) -> None:
    """Say which frozen parts keep their channels, and what they cost, and which copies lose channels.

    Args:
        graph: The traced model.
        copies: Copies elsewhere that follow what they are copies of.
    """
    for one in copies:
        say(f"{one.place} follows the weights of {one.source or 'the module'!r}, and loses the same channels.")
    for part, flops in graph.frozen.items():
        say(
            f"{part!r} is frozen and keeps its channels; its {flops:,.0f} FLOPs are not part of the budget. To prune "
            f"it, name it with module={part!r}, or let it be trained."
        )
