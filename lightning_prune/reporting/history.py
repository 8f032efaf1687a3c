"""What became of a network in a run: kept by the callback, saved in checkpoints, and written beside the logs.

The history is part of the callback's state. A run that is resumed therefore goes on with that of its checkpoint:
nothing is lost where the logs of the new run are in another folder, and nothing is told twice.
"""

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightning_prune.graph import ChannelGraph
from lightning_prune.planning.segments import time_by_layer
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.reporting.summary import Measurement

if TYPE_CHECKING:
    from lightning_prune.callbacks.base import PruningCallback

__all__ = ["History", "Layer", "Prune", "layers_at", "read_histories", "run_folder", "write_history"]

FORMAT_VERSION = 1


@dataclass
class Layer:
    """What one layer costs.

    Attributes:
        name: Dotted name of the module, or the class of the model for what it does by itself.
        flops: FLOPs of the example inputs.
        params: Number of parameters that channels are slices of.
        ms: Milliseconds from the start of the layer, or of the model, to the start of the next one.
    """

    name: str
    flops: float
    params: float
    ms: float


@dataclass
class Prune:
    """One prune.

    Attributes:
        step: Its number, from 1.
        epoch: Number of epochs trained before it.
        budget: What was asked, reachable, rounded and achieved, as fractions of the original; see
            `lightning_prune.pruning_plan`.
        widths: Channels that stay, by group name.
        left: The network that is left.
    """

    step: int
    epoch: int
    budget: dict[str, Any]
    widths: dict[str, int]
    left: Measurement


@dataclass
class History:
    """What became of a network in a run.

    Attributes:
        model: Import path of the LightningModule.
        callback: Class name of the pruning callback.
        settings: Its settings, by name.
        module: Dotted name of the part that was pruned; empty for the whole model.
        groups: Original number of channels, by group name.
        held: What stays whole: (channels, reason) by module name.
        before: The network before the first prune.
        layers_before: What its layers cost, in the order of the forward pass.
        prunes: The prunes so far.
        layers_after: What the layers cost after the last prune.
        epochs: For each validation the epochs trained until then, as ``epoch``, what is kept, as ``keep_flops``,
            ``keep_params`` and ``keep_channels``, and the metrics.
        after: The network at the end of training.
    """

    model: str
    callback: str
    settings: dict[str, Any]
    module: str
    groups: dict[str, int]
    held: dict[str, tuple[int, str]]
    before: Measurement
    layers_before: list[Layer]
    prunes: list[Prune] = field(default_factory=list)
    layers_after: list[Layer] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    after: Measurement | None = None

    @classmethod
    def begin(cls, callback: "PruningCallback", graph: ChannelGraph, before: Measurement) -> "History":
        """Begin the history of a run.

        Args:
            callback: The callback that prunes.
            graph: The traced model.
            before: The network before the first prune.
        """
        kind = type(graph.model)
        return cls(
            model=f"{kind.__module__}.{kind.__qualname__}",
            callback=type(callback).__name__,
            settings=_settings(callback),
            module=graph.module,
            groups={name: group.size for name, group in graph.groups.items()},
            held={name: (held.channels, held.reason) for name, held in graph.unprunable.items()},
            before=before,
            layers_before=layers_at(graph, {}),
        )

    def add_prune(self, graph: ChannelGraph, plan: PruningPlan, step: int, epoch: int, left: Measurement) -> None:
        """Add a prune that has just been done."""
        self.prunes.append(Prune(step, epoch, dict(plan.budget or {}), plan.widths, left))
        self.layers_after = layers_at(graph, plan.widths)

    def add_epoch(self, epoch: int, kept: Mapping[str, float], metrics: Mapping[str, float]) -> None:
        """Add a validation after some epochs of training; a second one of the same epoch takes its place."""
        told = {"epoch": epoch, **{f"keep_{metric}": fraction for metric, fraction in kept.items()}, **metrics}
        self.epochs = [*(each for each in self.epochs if each["epoch"] != epoch), told]

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each group now, by group name."""
        return {**self.groups, **(self.prunes[-1].widths if self.prunes else {})}

    @property
    def metrics(self) -> list[str]:
        """The names of the validation metrics, with accuracies first and losses last."""
        names = {name for each in self.epochs for name in each if name != "epoch" and not name.startswith("keep_")}
        return sorted(names, key=lambda name: ("acc" not in name, "loss" in name, len(name), name))

    @property
    def shown_metric(self) -> str:
        """The metric that stands for how good the network is; empty if there is none."""
        return self.metrics[0] if self.metrics else ""

    @property
    def last(self) -> Measurement:
        """The network as it was last measured, with the metrics of the last validation."""
        if self.after is not None:
            return self.after
        known = self.prunes[-1].left if self.prunes else self.before
        latest = self.epochs[-1] if self.epochs else {}
        metrics = {name: latest[name] for name in self.metrics if name in latest}
        return Measurement(known.params, known.flops, known.latency_ms, metrics)

    def to_json(self) -> dict[str, Any]:
        """Return the history as plain values."""
        return {"version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "History":
        """Make a history from what `to_json` returned.

        Raises:
            ValueError: If the content is no history, or of a newer format.
        """
        given = dict(content)
        version = given.pop("version", None)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"The history has format version {version!r}, this lightning-prune reads up to {FORMAT_VERSION}; "
                "install a newer lightning-prune."
            )
        for name in ("layers_before", "layers_after"):
            given[name] = [Layer(**layer) for layer in given[name]]
        given["before"] = Measurement.from_json(given["before"])
        given["after"] = Measurement.from_json(given["after"]) if given["after"] else None
        given["prunes"] = [Prune(**{**each, "left": Measurement.from_json(each["left"])}) for each in given["prunes"]]
        given["held"] = {name: (channels, reason) for name, (channels, reason) in given["held"].items()}
        return cls(**given)


def layers_at(graph: ChannelGraph, widths: Mapping[str, int]) -> list[Layer]:
    """Return what each layer costs at some widths, in the order of the forward pass.

    Args:
        graph: The traced model.
        widths: Channels by group name; groups that are absent are whole.
    """
    flops, params = (_by_module(graph, metric, widths) for metric in ("flops", "params"))
    times = time_by_layer(graph, dict(widths))
    times[type(graph.model).__name__] = times.pop("", 0.0)  # as what the model does by itself is called in the costs
    order = dict.fromkeys([*times, *flops, *params])
    return [Layer(name, flops.get(name, 0.0), params.get(name, 0.0), times.get(name, 0.0)) for name in order]


def _by_module(graph: ChannelGraph, metric: str, widths: Mapping[str, int]) -> dict[str, float]:
    costs: dict[str, float] = {}
    for term in graph.terms[metric]:
        cost = term.coefficient
        for axis in term.axes:
            cost *= axis.fixed + sum(n * widths.get(name, graph.groups[name].size) for name, n in axis.groups)
        costs[term.module] = costs.get(term.module, 0.0) + cost
    return costs


def _settings(callback: "PruningCallback") -> dict[str, Any]:
    """Return the arguments of the constructors of a callback's classes, as plain values."""
    kinds = [kind for kind in type(callback).__mro__ if "__init__" in vars(kind) and kind is not object]
    names = dict.fromkeys(name for kind in reversed(kinds) for name in inspect.signature(kind).parameters)
    return {name: _plain(getattr(callback, name)) for name in names if hasattr(callback, name)}


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except TypeError:  # a tensor, say
        return type(value).__name__


# -- files -------------------------------------------------------------------------------------------------------------


def run_folder(trainer: "pl.Trainer") -> Path | None:
    """Return the folder that the first logger writes to, or None if there is no logger that has one on this machine."""
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None)
        if not isinstance(folder, str | os.PathLike) and isinstance(logger.save_dir, str | os.PathLike):
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            folder = os.path.join(logger.save_dir, str(logger.name), version)  # as ModelCheckpoint finds its folder
        if isinstance(folder, str | os.PathLike) and "://" not in str(folder):  # as in s3://bucket/logs
            return Path(folder)
    return None


def write_history(trainer: "pl.Trainer", history: History) -> None:
    """Write a history into the folder of the run, in one step; for the first rank.

    Args:
        trainer: The trainer; nothing is written if it has no logger.
        history: What to write, into ``pruning.json``, or ``pruning.<module>.json`` if it is about a part of the model.
    """
    folder = run_folder(trainer)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"pruning.{history.module}.json" if history.module else "pruning.json")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(history.to_json(), indent=1))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_histories(run: str | Path) -> list[History]:
    """Read the histories of a run.

    Args:
        run: The folder of the run, such as ``logs/quickstart/version_0``.

    Returns:
        One for each pruning callback.

    Raises:
        FileNotFoundError: If there is no such folder, or no pruning callback wrote into it.
        ValueError: If a file is damaged, or of a newer format.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no run at {str(run)!r}: give the folder with its logs.")
    paths = sorted(folder.glob("pruning*.json"))
    if not paths:
        below = sorted(str(path.parent) for path in folder.glob("*/**/pruning*.json"))
        hint = f"; there are runs in {', '.join(dict.fromkeys(below))}" if below else ""
        raise FileNotFoundError(f"{str(run)!r} has no pruning.json, so no pruning callback has logged there{hint}.")
    return [_read(path) for path in paths]


def _read(path: Path) -> History:
    try:
        return History.from_json(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as raised:
        raise ValueError(f"{str(path)!r} is damaged or no history of a pruning run ({raised!r}).") from raised
