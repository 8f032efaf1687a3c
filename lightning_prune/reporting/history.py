"""History of a run: what became of a network, kept by the callback, saved in checkpoints and written beside the logs.

The history is part of the callback's state. A run that is resumed therefore goes on with that of its checkpoint:
nothing is missing where the logs of the new run are in another folder, and nothing is told twice.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_prune.files import read_checkpoint, written_whole
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.channel_graph import Axis
from lightning_prune.plain import MisfitError, made
from lightning_prune.planning.segments import LayerTimer
from lightning_prune.planning.spread import Spread
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.reporting.measurement import Measurement
from lightning_prune.reporting.speed import Speed
from lightning_prune.surgery.compensation_report import CompensationReport

__all__ = [
    "Compensation",
    "History",
    "Layer",
    "MetricsAround",
    "Prune",
    "accuracies_first",
    "histories_in",
    "layers_at",
    "read_histories",
    "write_history",
]

FORMAT_VERSION = 5  # 2 had no compensation, 3 no metrics around prunes, 4 no spread of times
FEW = 4  # metrics that are told of at each prune; files and loggers have all
_FORMER_NAMES = {"held": "unprunable", "left": "after"}  # of version 1


@dataclass
class Layer:
    """What one layer costs.

    Attributes:
        name: Dotted name of the module, or the class of the model for what it does by itself.
        flops: FLOPs of the example inputs, counted by the cost model.
        params: Number of parameters that channels are slices of.
        ms: Median of the milliseconds from the start of the layer, or of the model, to the start of the next one; None
            until it has been timed.
        quartiles: The quartiles around it; None in what earlier versions have written.
    """

    name: str
    flops: float
    params: float
    ms: float | None = None
    quartiles: tuple[float, float] | None = None

    @property
    def time(self) -> Spread | None:
        """The milliseconds with their quartiles; None if these are not known."""
        if self.ms is None or self.quartiles is None:
            return None
        return Spread(self.ms, *self.quartiles)

    def set_time(self, spread: Spread | None) -> None:
        """Note the milliseconds with their quartiles, if there are any."""
        if spread is not None:
            self.ms = spread.median
            self.quartiles = spread.low, spread.high


@dataclass
class Compensation:
    """How the weights that are kept made up for what was pruned.

    Attributes:
        method: ``"statistics"``, ``"fold"`` or ``"refit"``.
        samples: Number of samples that it looked at.
        errors: The squared error of each layer before and after it, as a share of the variance of what the layer
            returned before the prune, by the name of the weight.
        not_compensated: Why a weight that consumes pruned channels, or makes pruned queries and keys, is as it was, by
            its name.
        mean_error: The mean over layers of the error after it.
        worst_error: The greatest of these.
        scores: The same as errors for products of queries and keys, by the name of the weight that makes the queries.
    """

    method: str
    samples: int
    errors: dict[str, tuple[float, float]]
    not_compensated: dict[str, str]
    mean_error: float = 0.0
    worst_error: float = 0.0
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, report: CompensationReport) -> "Compensation | None":
        """Return what is written of a compensation; None if there was none."""
        if report.method == "none":
            return None
        return cls(
            method=report.method,
            samples=report.samples,
            errors={name: (error.before, error.after) for name, error in report.errors.items()},
            not_compensated=report.not_compensated,
            mean_error=report.mean_error,
            worst_error=max((error.after for error in report.errors.values()), default=0.0),
            scores={name: (error.before, error.after) for name, error in report.scores.items()},
        )


@dataclass
class MetricsAround:
    """Validation metrics around a prune, by name; all on the same batches of the validation split.

    Attributes:
        before: Right before it.
        uncompensated: Right after it, if nothing made up for it; empty if nothing did.
        after: Right after it.
    """

    before: dict[str, float] = field(default_factory=dict)
    uncompensated: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of the metrics, with accuracies first and losses last."""
        both = self.before.keys() & self.after.keys()
        return sorted(both, key=accuracies_first)

    @property
    def lines(self) -> list[str]:
        """The first metrics in words, one a line."""
        return [self._told(name) for name in self.names[:FEW]]

    def _told(self, name: str) -> str:
        told = f"{name}: {self.before[name]:.4f} before, "
        if name in self.uncompensated:
            return f"{told}{self.uncompensated[name]:.4f} pruned, {self.after[name]:.4f} compensated"
        return f"{told}{self.after[name]:.4f} right after"


@dataclass
class Prune:
    """One prune.

    Attributes:
        step: Its number, from 1.
        epoch: Number of epochs trained before it.
        budget: What was asked, reachable, rounded and achieved, as fractions of the original; see
            `lightning_prune.pruning_plan`.
        widths: Channels that are kept, by group name.
        after: The network after it.
        compensation: How the weights that are kept made up for it; None if they did not.
        metrics: Validation metrics right before and right after it.
        until: Number of epochs trained when it was taken back; None if it was not.
    """

    step: int
    epoch: int
    budget: dict[str, Any]
    widths: dict[str, int]
    after: Measurement
    compensation: Compensation | None = None
    metrics: MetricsAround = field(default_factory=MetricsAround)
    until: int | None = None


@dataclass
class History:
    """What became of a network in a run.

    Attributes:
        model: Import path of the LightningModule.
        callback: Class name of the pruning callback.
        settings: Its settings, by name.
        module: Dotted name of the submodule that was pruned; empty for the whole model.
        groups: Original number of channels, by group name.
        unprunable: What cannot be pruned: (channels, reason) by module name.
        before: The network before the first prune.
        layers_before: What its layers cost, in the order of the forward pass.
        prunes: The prunes so far.
        layers_after: What the layers cost after the last prune.
        epochs: For each validation the epochs trained until then, as ``epoch``, what is kept, as ``keep_flops``,
            ``keep_params`` and ``keep_channels``, and the metrics.
        after: The network at the end of training.
        metrics_at_end: Validation metrics at the end of training, on the batches of those around prunes.
        speed: Times of the network before the first prune and at the end of training, taken in turns.
        taken_back: Prunes after which the network went back to what it had been before.
    """

    model: str
    callback: str
    settings: dict[str, Any]
    module: str
    groups: dict[str, int]
    unprunable: dict[str, tuple[int, str]]
    before: Measurement
    layers_before: list[Layer]
    prunes: list[Prune] = field(default_factory=list)
    layers_after: list[Layer] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    after: Measurement | None = None
    metrics_at_end: dict[str, float] = field(default_factory=dict)
    speed: Speed | None = None
    taken_back: list[Prune] = field(default_factory=list)

    @classmethod
    def begin(
        cls, model: str, callback: str, settings: dict[str, Any], graph: ChannelGraph, before: Measurement
    ) -> "History":
        """Begin the history of a run.

        Args:
            model: Import path of the LightningModule.
            callback: Class name of the pruning callback.
            settings: Its settings, by name, as plain values.
            graph: The traced model.
            before: The network before the first prune.
        """
        return cls(
            model=model,
            callback=callback,
            settings=settings,
            module=graph.module,
            groups={name: group.channels for name, group in graph.groups.items()},
            unprunable={name: (found.channels, found.reason) for name, found in graph.unprunable.items()},
            before=before,
            layers_before=layers_at(graph, {}),
        )

    def add_prune(self, graph: ChannelGraph, plan: PruningPlan, step: int, epoch: int, after: Measurement) -> None:
        """Add a prune that has just been done.

        Args:
            graph: The traced model.
            plan: What the model has been pruned to.
            step: The number of the prune, from 1.
            epoch: Number of epochs trained before it.
            after: The network after it.
        """
        prune = Prune(
            step=step,
            epoch=epoch,
            budget=dict(plan.budget or {}),
            widths={name: width * graph.groups[name].width for name, width in plan.widths.items()},
            after=after,
        )
        self.prunes.append(prune)
        self.layers_after = layers_at(graph, plan.widths, [layer.name for layer in self.layers_before])

    def take_back(self, graph: ChannelGraph, widths: Mapping[str, int], step: int, epoch: int) -> None:
        """Set aside the prunes after one, as the network is again what that one has left.

        Args:
            graph: The traced model.
            widths: Channels by group name that the network has now.
            step: The number of the prune; 0 for the original network.
            epoch: Number of epochs trained until now.
        """
        later = [prune for prune in self.prunes if prune.step > step]
        self.prunes = [prune for prune in self.prunes if prune.step <= step]
        self.taken_back += [replace(prune, until=epoch) for prune in later]
        names = [layer.name for layer in self.layers_before]
        self.layers_after = layers_at(graph, widths, names) if self.prunes else []

    def add_times(self, speed: Speed, layers: tuple[Mapping[str, Spread], Mapping[str, Spread]]) -> None:
        """Add times that were taken in turns, of the network before the first prune and as it is now.

        Args:
            speed: The times of forward passes.
            layers: Milliseconds by layer, before and now; under ``""`` what the model does by itself.
        """
        self.speed = speed
        self.before.set_latency(speed.spread_before)
        itself = self.model.rpartition(".")[2]
        before, after = layers
        for layer in self.layers_before:
            layer.set_time(before.get("" if layer.name == itself else layer.name))
        for layer in self.layers_after:
            layer.set_time(after.get("" if layer.name == itself else layer.name))

    def add_epoch(self, epoch: int, kept: Mapping[str, float], metrics: Mapping[str, float]) -> None:
        """Add a validation; a second one of the same epoch takes the place of the first.

        Args:
            epoch: Number of epochs trained until then.
            kept: What is kept, as a fraction of the original, by what it is a fraction of.
            metrics: What was measured, by name.
        """
        fractions = {f"keep_{metric}": fraction for metric, fraction in kept.items()}
        earlier = [validation for validation in self.epochs if validation["epoch"] != epoch]
        self.epochs = [*earlier, {"epoch": epoch, **fractions, **metrics}]

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each group now, by group name."""
        pruned = self.prunes[-1].widths if self.prunes else {}
        return {**self.groups, **pruned}

    @property
    def metrics(self) -> list[str]:
        """The names of the validation metrics, with accuracies first and losses last."""
        names: set[str] = set()
        for validation in self.epochs:
            names.update(validation)
        metrics = filter(_is_metric, names)
        return sorted(metrics, key=accuracies_first)

    @property
    def shown_metric(self) -> str:
        """The metric that stands for how good the network is; empty if there is none."""
        return self.metrics[0] if self.metrics else ""

    @property
    def last(self) -> Measurement:
        """The network as it was last measured, with the metrics of the last validation."""
        if self.after is not None:
            return self.after
        known = self.prunes[-1].after if self.prunes else self.before
        latest = self.epochs[-1] if self.epochs else {}
        metrics = {name: latest[name] for name in self.metrics if name in latest}
        return replace(known, metrics=metrics)

    def to_json(self) -> dict[str, Any]:
        """Return the history as plain values."""
        return {"version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: Any) -> "History":
        """Make a history from what `to_json` returned.

        Raises:
            ValueError: If the content is no history, or of a newer format.
        """
        try:
            return _made(content)
        except MisfitError as wrong:
            raise ValueError(f"The history of the pruning run is damaged: {wrong}.") from wrong


def _made(content: Any) -> History:
    """Make a history from plain values; raise a MisfitError unless they are one, or a ValueError for a newer format."""
    values = _with_names_of_today(content)
    if not isinstance(values, dict) or "version" not in values:
        raise MisfitError("", "has no format version")
    version = made(int, values.pop("version"))
    if version > FORMAT_VERSION:
        raise ValueError(
            f"The history has format version {version!r}, this lightning-prune reads up to {FORMAT_VERSION}; "
            "install a newer lightning-prune."
        )
    prunes = values.get("prunes")
    if isinstance(prunes, list):
        values["prunes"] = [_with_names_of_today(prune) for prune in prunes]
    history: History = made(History, values)
    for validation in history.epochs:
        if "epoch" not in validation:
            raise MisfitError("epochs", "has a validation without its epoch")
    if history.speed is not None and not history.speed.is_sound:
        raise MisfitError("speed", "is not as many times before as after, all of them above 0")
    return history


def _with_names_of_today(content: Any) -> Any:
    if not isinstance(content, Mapping):
        return content
    return {_FORMER_NAMES.get(name, name): value for name, value in content.items()}


def _is_metric(name: str) -> bool:
    return name != "epoch" and not name.startswith("keep_")


def accuracies_first(metric: str) -> tuple[bool, bool, int, str]:
    """Return what names of metrics are sorted by, with accuracies first and losses last."""
    no_accuracy = "acc" not in metric
    loss = "loss" in metric
    return no_accuracy, loss, len(metric), metric


# -- costs by layer ----------------------------------------------------------------------------------------------------


def layers_at(graph: ChannelGraph, widths: Mapping[str, int], names: Iterable[str] | None = None) -> list[Layer]:
    """Return what each layer costs at some widths, in the order of the forward pass.

    Args:
        graph: The traced model.
        widths: Channels by group name; groups that are absent have all of theirs.
        names: Names of the layers, in that order, if they are known; otherwise the network runs once.
    """
    lengths = {name: widths.get(name, group.size) for name, group in graph.groups.items()}
    flops = _by_module(graph, "flops", lengths)
    params = _by_module(graph, "params", lengths)
    ordered = _in_order(graph) if names is None else names
    every = dict.fromkeys([*ordered, *flops, *params])
    return [Layer(name, flops.get(name, 0.0), params.get(name, 0.0)) for name in every]


def _in_order(graph: ChannelGraph) -> list[str]:
    """Return the names of the layers in the order of the forward pass, that of the class for the model itself last."""
    with LayerTimer.at(graph, {}) as timer:
        called = timer.run()
    itself = type(graph.model).__name__  # as what the model does by itself is called in the costs
    return [*(name for name in called if name), itself]


def _by_module(graph: ChannelGraph, metric: str, widths: Mapping[str, int]) -> dict[str, float]:
    costs: dict[str, float] = {}
    for term in graph.terms[metric]:
        cost = term.coefficient
        for axis in graph.axes_of(term):
            cost *= _length(axis, widths)
        costs[term.module] = costs.get(term.module, 0.0) + cost
    return costs


def _length(axis: Axis, widths: Mapping[str, int]) -> int:
    positions = [per_channel * widths[group] for group, per_channel in axis.groups]
    return axis.fixed + sum(positions)


# -- files -------------------------------------------------------------------------------------------------------------


def write_history(folder: Path, history: History) -> None:
    """Write a history into the folder of its run; the file is there whole or not at all.

    Args:
        folder: The folder; it is made if it is not there.
        history: What to write, into ``pruning.json``, or ``pruning.<module>.json`` if it is about a submodule.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"pruning.{history.module}.json" if history.module else "pruning.json"
    with written_whole(folder / name) as file:
        file.write_text(json.dumps(history.to_json(), indent=1))


def read_histories(run: str | Path) -> list[History]:
    """Read the histories of a run.

    Args:
        run: The folder of the run, such as ``logs/quickstart/version_0``, or a checkpoint of it.

    Returns:
        One for each pruning callback.

    Raises:
        FileNotFoundError: If there is no such folder, or no pruning callback wrote into it.
        ValueError: If a file is damaged, or of a newer format.
    """
    folder = Path(run)
    if folder.is_file():
        return _read_checkpoint(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no run at {str(run)!r}: give the folder with its logs.")
    paths = sorted(path for path in folder.glob("pruning*.json") if path.is_file())
    if not paths:
        raise FileNotFoundError(
            f"{str(run)!r} has no pruning.json, so no pruning callback has logged there{_hint(folder)}."
        )
    return [_read(path) for path in paths]


def histories_in(checkpoint: Mapping[str, Any]) -> list[History]:
    """Return what pruning callbacks, or ``lightning-prune prune``, have noted in a checkpoint.

    Args:
        checkpoint: What is in it.

    Raises:
        ValueError: If it is damaged, or of a newer format.
    """
    states: list[Any] = [checkpoint]
    noted = checkpoint.get("callbacks")
    if isinstance(noted, Mapping):
        states.extend(noted.values())
    kept = filter(lambda state: isinstance(state, Mapping), states)
    contents = [state.get("history") for state in kept]
    return [History.from_json(content) for content in contents if content]


def _read_checkpoint(path: Path) -> list[History]:
    found = histories_in(read_checkpoint(path))
    if not found:
        raise ValueError(f"{str(path)!r} holds no history of a pruning run: give one that pruning has written.")
    return found


def _hint(folder: Path) -> str:
    """Return where below a folder there are runs."""
    paths = sorted(folder.glob("*/**/pruning*.json"))
    runs = dict.fromkeys(sorted(str(path.parent) for path in paths))
    return f"; there are runs in {', '.join(runs)}" if runs else ""


def _read(path: Path) -> History:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as raised:  # no JSON, no text, numbers and nesting without end
        raise ValueError(f"{str(path)!r} is damaged: it is no JSON, as a history of a pruning run is.") from raised
    try:
        return _made(content)
    except MisfitError as wrong:
        raise ValueError(f"{str(path)!r} is damaged, or no history of a pruning run: {wrong}.") from wrong
