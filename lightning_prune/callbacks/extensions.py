"""Extensions of Lightning that let a pruned module be restored without a pruning callback.

A run that only trains a pruned module on, validates it or hands it back from spawned ranks has no callback of this
package that could set anything up, and ``load_from_checkpoint`` has not even a Trainer. So two things are extended when
`lightning_prune.callbacks` is imported, once per process, and by no other import:

- ``Trainer.__init__``: what it is asked for is noted, as one with ``fast_dev_run`` forgets it (`trial_run`), and a
  Trainer that has been made gets a `PlanCheckpointIO`, by the public setter of its strategy. A
  callback from Lightning's entry-point group would do for most runs, but not for the parent process of spawned ranks,
  where no hook is called; and it would join every Trainer of an environment in which this package is installed.
- ``lightning.pytorch.core.saving._load_state``, which is private: ``load_from_checkpoint`` makes the module and loads
  its weights in this one function, and no hook of a class that knows nothing of pruning is called in between.

Both were read in Lightning 2.6. A callback does the same when a Trainer of ``pytorch_lightning`` sets it up, which may
have been imported later. Modules that were never pruned are not touched.
"""

import sys
from functools import cache, wraps
from importlib import import_module
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_prune.callbacks.plan_checkpoint_io import carry_plans
from lightning_prune.callbacks.refusals import refuse_alike
from lightning_prune.callbacks.trial_run import note_settings
from lightning_prune.checkpoint import has_copies, load_onto, made, saved_plan, widened
from lightning_prune.namesakes import PACKAGES
from lightning_prune.surgery import prune

__all__ = ["extend_lightning"]


def extend_lightning() -> None:
    """Let every Trainer that is made from now on, and ``load_from_checkpoint``, restore pruned modules.

    Where ``pytorch_lightning`` is imported beside ``lightning``, its own are extended too.
    """
    for package in PACKAGES:
        if package in sys.modules:
            _extend(package)


@cache
def _extend(package: str) -> None:
    module = sys.modules[package]
    _extend_trainer(module.Trainer)
    _extend_load_from_checkpoint(import_module(f"{package}.core.saving"), module.LightningModule)


def _extend_trainer(trainer: Any) -> None:
    construct = trainer.__init__

    @wraps(construct)
    def construct_and_carry_plans(self: "pl.Trainer", *args: Any, **kwargs: Any) -> None:
        refuse_alike(kwargs.get("callbacks"))
        note_settings(self, kwargs)
        construct(self, *args, **kwargs)
        carry_plans(self)

    trainer.__init__ = construct_and_carry_plans


def _extend_load_from_checkpoint(saving: Any, lightning_module: type) -> None:
    load_state = saving._load_state

    @wraps(load_state)
    def load_state_and_prune(cls: type, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        plan = saved_plan(checkpoint) if issubclass(cls, lightning_module) else None
        if plan is None:
            return load_state(cls, checkpoint, *args, **kwargs)
        if _is_more_than_lightning_does(checkpoint, kwargs):
            strict = args[0] if args else kwargs.pop("strict", None)
            return load_onto(made(cls, checkpoint, kwargs, is_trusted=True), checkpoint, strict)
        # The class makes the module in its original shape, and finds weights of that shape.
        module: Any = load_state(cls, widened(checkpoint, plan), *args, **kwargs)
        prune(module, plan)
        return module

    saving._load_state = load_state_and_prune


def _is_more_than_lightning_does(checkpoint: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Tell whether a module is made of modules, perhaps pruned ones, has copies, or other names once compiled."""
    saved = checkpoint.get(pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    made_of_modules = any(isinstance(leaf, nn.Module) for leaf in tree_leaves([dict(saved), settings]))
    return made_of_modules or has_copies(checkpoint) or any("_orig_mod" in name for name in checkpoint["state_dict"])
