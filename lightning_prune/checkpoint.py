"""Checkpoints of pruned models: the plan travels with the weights, and the original class takes its shape from it."""

import argparse
import copy
import inspect
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.surgery import prune, reshape

__all__ = [
    "CHECKPOINT_KEY",
    "fitted",
    "load_pruned",
    "refuse_other_shapes",
    "restore_shape",
    "save_plan",
    "saved_plan",
    "widened",
]

CHECKPOINT_KEY = "lightning_prune"

Model = TypeVar("Model", bound=nn.Module)


def save_plan(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Put the plan that a model was pruned by into its checkpoint, as plain values; nothing if it was never pruned.

    Args:
        model: The model whose weights the checkpoint holds.
        checkpoint: The checkpoint, changed in place.
    """
    plan = plan_in_force(model)
    if plan is not None:
        checkpoint[CHECKPOINT_KEY] = {"plan": plan.to_json(), "aliases": _aliases(model, plan)}


def saved_plan(checkpoint: Mapping[str, Any]) -> PruningPlan | None:
    """Return the plan that belongs to the weights in a checkpoint, or None if they were never pruned.

    Raises:
        ValueError: If the checkpoint is damaged, or of a newer format.
    """
    content = checkpoint.get(CHECKPOINT_KEY)
    if content is None:
        return None
    if "plan" not in content:
        raise ValueError(f"The checkpoint has an entry {CHECKPOINT_KEY!r} without a plan; it is damaged.")
    return PruningPlan.from_json(content["plan"])


def widened(checkpoint: Mapping[str, Any], plan: PruningPlan) -> dict[str, Any]:
    """Return a checkpoint as if nothing had been pruned: its weights in their original shapes, without a plan.

    Args:
        checkpoint: The checkpoint of a pruned model; it is not changed.
        plan: The plan in it.

    Returns:
        The checkpoint, with zeros where channels were removed.

    Raises:
        ValueError: If the weights do not have the shapes that the plan says.
    """
    weights = copy.copy(checkpoint["state_dict"])  # with the versions that torch notes on it
    aliases = checkpoint[CHECKPOINT_KEY].get("aliases")
    if aliases is None:  # an older checkpoint: names that share a tensor mostly share their numbers in the file too
        names = {(tensor.data_ptr(), tensor.shape): name for name, tensor in weights.items() if name in plan.shapes}
        tensors = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
        aliases = {name: names.get((tensor.data_ptr(), tensor.shape), name) for name, tensor in tensors.items()}
    index, shapes = plan.index(), plan.pruned_shapes()
    for alias, tensor in weights.items():
        name = aliases.get(alias, alias)
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"The checkpoint is damaged: {name!r} has shape {tuple(tensor.shape)}, where its plan says "
                f"{shapes[name]}."
            )
        for axis, stays in index.get(name, {}).items():
            shape = list(tensor.shape)
            shape[axis] = plan.shapes[name][axis]
            tensor = tensor.new_zeros(shape).index_copy(axis, stays.to(tensor.device), tensor)
        weights[alias] = tensor
    rest = {key: value for key, value in checkpoint.items() if key != CHECKPOINT_KEY}
    return {**rest, "state_dict": weights}


def restore_shape(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a model the shapes that the weights in a checkpoint have, before they are loaded.

    Args:
        model: The model that the weights go into, of the original architecture, pruned already or not.
        checkpoint: The checkpoint; one without a plan gives the model its original shapes.

    Raises:
        ValueError: If the checkpoint is of another architecture or of a newer format, or brings back channels of
            tensors that it does not hold.
    """
    plan, earlier = saved_plan(checkpoint), plan_in_force(model)
    if plan != earlier:
        if earlier is not None and not _removes_more(plan, earlier):
            _refuse_lost(model, earlier, checkpoint.get("state_dict", {}))
            reshape(model, None)
        if plan is not None:
            prune(model, plan)  # buffers that are in no checkpoint keep their numbers


def fitted(model: nn.Module, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Bring a checkpoint and a model to the same shapes; once the weights are loaded, `prune` by the plan saved in it.

    A model that is whole stays so until then: hooks of its own may go by the original shapes of the weights.

    Args:
        model: The model that the weights go into, of the original architecture, pruned already or not.
        checkpoint: The checkpoint; it is not changed.

    Returns:
        The checkpoint whose weights fit the model.

    Raises:
        ValueError: If `widened` or `restore_shape` does.
    """
    plan = saved_plan(checkpoint)
    if plan is not None and plan_in_force(model) is None:
        return widened(checkpoint, plan)
    restore_shape(model, checkpoint)
    return checkpoint


def load_pruned(model: Model | type[Model], path: str | Path, *, map_location: Any = "cpu", **settings: Any) -> Model:
    """Load a checkpoint of a pruned model onto its original class; a checkpoint that was never pruned loads as well.

    Args:
        model: The LightningModule class that was trained, or an instance of it in its original shape (any
            ``nn.Module`` whose names fit the weights). Its ``configure_model`` and ``strict_loading`` are heeded.
        path: The checkpoint file, as ``Trainer`` or `ModelCheckpoint` wrote it.
        map_location: Where to load the weights to, and where an instance that is made here lies.
        settings: Arguments for the class, in place of the hyper-parameters in the checkpoint.

    Returns:
        The pruned model with its weights, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, of another architecture, or lacks the arguments that the class needs.

    Example:
        A checkpoint that training with a pruning callback has written::

            model = load_pruned(ImageClassifier, "logs/version_0/checkpoints/last.ckpt")
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {str(path)!r}.")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as raised:
        raise ValueError(
            f"{str(path)!r} cannot be read as a checkpoint: the file is damaged, or holds more than tensors and plain "
            "values."
        ) from raised
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{str(path)!r} is no checkpoint of a Lightning Trainer: it has no 'state_dict'.")
    made: Any = _instantiate(model, checkpoint, settings) if isinstance(model, type) else model
    # The hooks of a LightningModule, in Lightning's order.
    if hasattr(made, "configure_model"):
        made.configure_model()
    if isinstance(model, type):
        made.to(next((t.device for t in checkpoint["state_dict"].values() if isinstance(t, Tensor)), "cpu"))
    plan, checkpoint = saved_plan(checkpoint), fitted(made, checkpoint)
    if hasattr(made, "on_load_checkpoint"):
        made.on_load_checkpoint(checkpoint)
    refuse_other_shapes(made, checkpoint["state_dict"])
    try:
        made.load_state_dict(checkpoint["state_dict"], strict=getattr(made, "strict_loading", True))
    except RuntimeError as raised:
        raise ValueError(f"The checkpoint {str(path)!r} is of another architecture. {raised}") from raised
    if plan is not None:
        prune(made, plan)
    return made.eval()


def refuse_other_shapes(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Raise a ValueError that names a tensor whose shape is not that of the model, if there is one."""
    for name, tensor in named_tensors(model).items():
        saved = weights.get(name)
        if isinstance(saved, Tensor) and saved.shape != tensor.shape:
            raise ValueError(
                f"The checkpoint is of another architecture: {name!r} has shape {tuple(saved.shape)} in it and "
                f"{tuple(tensor.shape)} in {type(model).__name__}; build it with the settings of the training."
            )


def _instantiate(model: type[Model], checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> Model:
    """Make an instance from the hyper-parameters that Lightning saved, as ``load_from_checkpoint`` does."""
    saved = dict(checkpoint.get("hyper_parameters", {}))
    by_parser = saved.pop("_instantiator", None) is not None
    parameters = inspect.signature(model).parameters.values()
    names = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    whole = checkpoint.get("hparams_name")
    if whole in names:  # of `save_hyperparameters(conf)`: they are all in one argument
        saved = {whole: {**saved, **{k: v for k, v in settings.items() if k not in names}}}
        settings = {k: v for k, v in settings.items() if k in names}
    elif any(p.kind is p.VAR_KEYWORD for p in parameters):
        saved = {k: v for k, v in saved.items() if by_parser or not k.startswith("_")}
    else:
        saved = {k: v for k, v in saved.items() if k in names}
    try:
        return _parsed(model, {**saved, **settings}) if by_parser else model(**{**saved, **settings})
    except (TypeError, argparse.ArgumentError) as raised:
        raise ValueError(
            f"{model.__name__} cannot be made from the hyper-parameters in the checkpoint ({raised}); call "
            "`self.save_hyperparameters()` in its constructor, or pass the missing arguments or an instance."
        ) from raised


def _parsed(model: type[Model], arguments: dict[str, Any]) -> Model:
    """Make an instance as `LightningCLI` does, which notes classes and their arguments by name."""
    from lightning.pytorch.cli import instantiate_module

    return instantiate_module(model, arguments)


def _aliases(model: nn.Module, plan: PruningPlan) -> dict[str, str]:
    """Return the other names of the tensors in a plan that have several, with the name that the plan knows them by."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    known = {id(tensor): name for name, tensor in named if name in plan.shapes}
    return {name: known[id(tensor)] for name, tensor in named if id(tensor) in known and name not in plan.shapes}


def _removes_more(plan: PruningPlan | None, earlier: PruningPlan) -> bool:
    """Return whether a plan keeps nothing that an earlier one has removed."""
    try:
        return plan is not None and plan.after(earlier) == plan
    except ValueError:
        return False


def _refuse_lost(model: nn.Module, plan: PruningPlan, weights: Mapping[str, Any]) -> None:
    """Raise if a tensor that has lost channels is not among the weights that are to bring them back."""
    aliases = _aliases(model, plan)
    held = {aliases.get(name, name) for name in weights}
    if lost := [name for name in plan.index() if name not in held]:
        raise ValueError(
            f"{type(model).__name__} has lost channels that the checkpoint brings back, but without the values of "
            f"{', '.join(map(repr, lost))}, which is not in it; load it onto a fresh instance."
        )
