"""Loading: the original class, or an instance of it, takes its shape and its weights from a checkpoint."""

import argparse
import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.checkpoint.copies import hidden_copies
from lightning_prune.checkpoint.names import renamed_for
from lightning_prune.checkpoint.plans import fitted, prune_copies, refuse_other_shapes, saved_plan
from lightning_prune.files import Unread, read_checkpoint
from lightning_prune.importing import nothing_imported_for
from lightning_prune.surgery import check_plan, complete, prune

__all__ = ["asked_for", "load_onto", "load_pruned", "made"]

Model = TypeVar("Model", bound=nn.Module)
Checkpoint = Mapping[str, Any]


def load_pruned(
    model: Model | type[Model],
    path: str | Path,
    *,
    map_location: Any = "cpu",
    weights_only: bool | None = None,
    **settings: Any,
) -> Model:
    """Load a checkpoint of a pruned model onto its original class; a checkpoint that was never pruned loads as well.

    Args:
        model: The LightningModule class that was trained, or an instance of it, pruned already or not (any
            ``nn.Module`` whose names fit the weights). Its ``configure_model`` and ``strict_loading`` are heeded.
        path: The checkpoint file, as ``Trainer`` or `ModelCheckpoint` wrote it.
        map_location: Where to load the weights to, and where an instance that is made here lies.
        weights_only: True to refuse a file that holds more than tensors and plain values. False to make the objects
            that are among its hyper-parameters, which runs code of the file: only for files that you trust. By default
            they are left out, and are to be given if the class needs them.
        settings: Arguments for the class, in place of the hyper-parameters in the checkpoint.

    Returns:
        The pruned model with its weights, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, of another architecture, or lacks the arguments that the class needs.
        TypeError: If there are arguments for a class where an instance was given, or neither was given.

    Example:
        A checkpoint that training with a pruning callback has written::

            model = load_pruned(ImageClassifier, "logs/version_0/checkpoints/last.ckpt")
    """
    if not isinstance(model, type | nn.Module):
        raise TypeError(
            "load_pruned takes a class or an instance, then the path of the checkpoint: "
            f"load_pruned(LitModule, 'last.ckpt'); got {model!r} first."
        )
    checkpoint = read_checkpoint(path, map_location, weights_only)
    try:
        instance = made(model, checkpoint, settings, is_trusted=weights_only is False)
        return load_onto(instance, checkpoint).eval()
    except RuntimeError as raised:
        raise ValueError(f"The checkpoint {str(path)!r} is of another architecture. {raised}") from raised


def load_onto(instance: Any, checkpoint: Checkpoint, strict: bool | None = None) -> Any:
    """Give a model the shape and the weights that are in a checkpoint.

    Args:
        instance: The model, pruned already or not.
        checkpoint: What a Trainer has saved; it is not changed.
        strict: Whether all names have to be the same; default what the model says.

    Returns:
        The model.

    Raises:
        ValueError: If the checkpoint is damaged, or of another architecture.
        RuntimeError: If names differ.
    """
    saved_plan(checkpoint)  # refuses what is damaged
    checkpoint = renamed_for(instance, checkpoint)
    plan = saved_plan(checkpoint)
    if plan is not None:
        complete(instance, plan)
    prune_copies(instance, checkpoint, hidden_copies(instance))
    checkpoint = fitted(instance, checkpoint)
    # The hooks of a LightningModule, in Lightning's order.
    if hasattr(instance, "on_load_checkpoint"):
        instance.on_load_checkpoint(checkpoint)
    weights = checkpoint["state_dict"]  # with what the hook has made of them
    refuse_other_shapes(instance, weights)
    if plan is not None:
        check_plan(instance, plan)  # before the weights are loaded
    instance.load_state_dict(weights, strict=getattr(instance, "strict_loading", True) if strict is None else strict)
    if plan is not None:
        prune(instance, plan)
    return instance


# -- making an instance ------------------------------------------------------------------------------------------------


def made(
    model: Model | type[Model], checkpoint: Checkpoint, settings: Mapping[str, Any], is_trusted: bool = False
) -> Model:
    """Return an instance with all its layers.

    Args:
        model: A class, or the instance.
        checkpoint: What a Trainer has saved.
        settings: Arguments for the class, in place of the hyper-parameters in the checkpoint.
        is_trusted: Whether modules that the hyper-parameters name may be imported.

    Raises:
        ValueError: If the checkpoint lacks the arguments that the class needs.
        TypeError: If there are arguments for an instance.
    """
    if isinstance(model, type):
        with nullcontext() if is_trusted else _nothing_imported(model, checkpoint):
            instance: Any = _instantiate(model, checkpoint, settings)
    elif settings:
        raise TypeError(
            f"{', '.join(settings)}: arguments are for a class, and an instance of {type(model).__name__} was given."
        )
    else:
        instance = model
    if hasattr(instance, "configure_model"):
        instance.configure_model()
    if isinstance(model, type):
        instance.to(_device_of(checkpoint["state_dict"]))
    return instance


def _nothing_imported(model: type[nn.Module], checkpoint: Checkpoint) -> AbstractContextManager[None]:
    """Let nothing be imported on the word of the hyper-parameters, but what is of the package of the class."""
    saved = _hyper_parameters(checkpoint)
    saved.pop("_instantiator", None)  # Lightning's own
    return nothing_imported_for(saved, model.__module__.partition(".")[0])


def _device_of(weights: Mapping[str, Any]) -> Any:
    """Return the device of the first tensor."""
    for value in weights.values():
        if isinstance(value, Tensor):
            return value.device
    return "cpu"


def _instantiate(model: type[Model], checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Model:
    """Make an instance from the hyper-parameters that Lightning saved, as ``load_from_checkpoint`` does."""
    saved = _hyper_parameters(checkpoint)
    made_by_parser = "_instantiator" in saved
    saved.pop("_instantiator", None)
    arguments = _arguments(model, saved, checkpoint.get("hparams_name"), settings, made_by_parser)
    _refuse_unread(model, arguments)
    try:
        return _instantiate_by_parser(model, arguments) if made_by_parser else model(**arguments)
    except (TypeError, argparse.ArgumentError) as raised:
        raise ValueError(
            f"{model.__name__} cannot be made from the hyper-parameters in the checkpoint ({raised}); call "
            "`self.save_hyperparameters()` in its constructor, or pass the missing arguments or an instance."
        ) from raised
    except (OSError, RuntimeError) as raised:
        raise ValueError(
            f"{model.__name__} cannot be made here, as its constructor fails with {type(raised).__name__}: {raised} "
            "If that looks for published weights, which give way to those of the checkpoint, let it find them, or pass "
            "an instance that was made without them in place of the class."
        ) from raised


def _refuse_unread(model: type[nn.Module], arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError if an argument is an object that was not made of the file."""
    kinds = {name: kind for name, value in arguments.items() for kind in _unread_in(value)}
    if not kinds:
        return
    told = ", ".join(f"{name} (of {kind})" for name, kind in kinds.items())
    given = ", ".join(f"{name}=..." for name in kinds)
    raise ValueError(
        f"{model.__name__} takes {told}: the checkpoint holds an object there, which is not made on the word of a "
        f"file; pass what it was made with, load_pruned({model.__name__}, path, {given}), or an instance in place of "
        "the class, or weights_only=False if you trust the file."
    )


def _unread_in(value: Any) -> Iterator[str]:
    """Yield the class name of each object in a value that was not made."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Unread):
            yield type(leaf).__name__
        elif isinstance(leaf, type) and issubclass(leaf, Unread):
            yield leaf.__name__


def asked_for(model: type[nn.Module], checkpoint: Checkpoint) -> list[str]:
    """Return the names of the arguments that have to be given to make a class again with a checkpoint.

    Args:
        model: The class.
        checkpoint: What was saved, read without making objects.
    """
    saved = checkpoint.get("hyper_parameters", {})
    if not isinstance(saved, Mapping):
        saved = {}
    if "_instantiator" in saved:
        return []
    single = checkpoint.get("hparams_name")
    arguments = _arguments(model, dict(saved), single, {}, made_by_parser=False)
    required = [
        name
        for name, parameter in inspect.signature(model).parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in _VARIADIC
    ]
    unread = [name for name, value in arguments.items() if any(_unread_in(value))]
    return list(dict.fromkeys([*(name for name in required if name not in arguments), *unread]))


def _hyper_parameters(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the hyper-parameters that Lightning saved, by name."""
    saved = checkpoint.get("hyper_parameters", {})
    if isinstance(saved, Unread):  # of OmegaConf
        return {}
    if not isinstance(saved, Mapping) or not all(isinstance(name, str) for name in saved):
        raise ValueError("The checkpoint is damaged: its hyper-parameters are no settings by name.")
    return dict(saved)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _arguments(
    model: type[nn.Module], saved: dict[str, Any], single: str | None, settings: Mapping[str, Any], made_by_parser: bool
) -> dict[str, Any]:
    """Return the arguments to make an instance with.

    Args:
        model: The class.
        saved: The hyper-parameters in the checkpoint.
        single: Name of the one argument that they are all in, as ``save_hyperparameters(conf)`` saves them, or None.
        settings: Arguments that were given, which come first.
        made_by_parser: Whether a parser makes the instance, which knows also the names that start with an underscore.
    """
    parameters = inspect.signature(model).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters if parameter.kind not in _VARIADIC}
    if single in names:
        if single in settings:  # all of it is given
            return dict(settings)
        arguments: dict[str, Any] = {single: saved}
        for name, value in settings.items():
            holder = arguments if name in names else saved
            holder[name] = value
        return arguments
    if not takes_any:
        saved = {name: value for name, value in saved.items() if name in names}
    elif not made_by_parser:
        saved = {name: value for name, value in saved.items() if not name.startswith("_")}
    return {**saved, **settings}


def _instantiate_by_parser(model: type[Model], arguments: dict[str, Any]) -> Model:
    """Make an instance as `LightningCLI` does, which notes classes and their arguments by name."""
    from lightning.pytorch.cli import instantiate_module

    return instantiate_module(model, arguments)
