"""``lightning-prune prune CKPT OUT``: a trained checkpoint to a smaller one, without training."""

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_prune.checkpoint import CHECKPOINT_KEY, save
from lightning_prune.cli.option_errors import CommandParser
from lightning_prune.cli.project import Project, add_project_options, load_project, without_settings
from lightning_prune.cli.prune_options import add_prune_options, settings_of
from lightning_prune.files import check_folder, read_checkpoint, written_whole
from lightning_prune.planning import check_keep, kept_of
from lightning_prune.planning.spread import ratios
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.reporting.load_lines import load_lines
from lightning_prune.reporting.summary import summarize

if TYPE_CHECKING:
    from lightning_prune.cli.methods import AtOnce

__all__ = ["main", "speed_up"]


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-prune prune``.

    Args:
        arguments: The command line after ``prune``.
    """
    started = time.perf_counter()
    own, settings = without_settings(arguments)
    given = _parser().parse_args(own)
    check_keep(given.keep)
    _check_place(given.out)
    project = load_project(given.checkpoint, given, settings)
    told = _pruned(project, given)
    print("\n".join([*told, "", f"{time.perf_counter() - started:.0f} seconds in all"]))


def _parser() -> CommandParser:
    parser = CommandParser(
        "lightning-prune prune",
        description="Prune a trained checkpoint to a budget without training: channels are scored on some training "
        "batches, those that are kept make up for the others, and the module's own validation is run before and after.",
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a trained model, or file of lightning_prune.save")
    parser.add_argument("out", type=Path, help="checkpoint to write")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the cost that is kept (default: 0.5)")
    parser.add_argument(
        "--method",
        default="auto",
        help="criterion that scores channels, uniform, or a search for widths as for plan (default: auto, what "
        "`lightning-prune plan --method all` has found best for this checkpoint, else coherent_obs)",
    )
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="what `lightning-prune plan` has kept (default: its file beside CKPT)"
    )
    add_prune_options(parser)
    add_project_options(parser)
    return parser


def _check_place(out: Path) -> None:
    """Refuse before the work a place that cannot be written to after it."""
    if out.is_dir():
        raise IsADirectoryError(f"{str(out)!r} is a folder: give the file to write.")
    check_folder(out)


def _pruned(project: Project, given: Namespace) -> list[str]:
    """Prune a network, write its file, read it back, and return what is told."""
    from lightning_prune.cli.fitting import run_once

    callback = _callback(project, given)
    trainer = run_once(project, callback, given)
    model, history = project.model, callback.history
    assert history is not None
    assert history.after is not None
    with written_whole(given.out) as file:
        if project.is_plain:
            save(model, file, history=history.to_json())
        else:
            trainer.save_checkpoint(file, weights_only=False)  # so that training may go on from it
        _read_back(model, file)
    last = history.prunes[-1]
    return [
        f"{type(model).__name__} pruned by {callback.method} ({callback.why})",
        "",
        *summarize(history.before, history.after),
        "",
        *last.metrics.lines,
        kept_of(last.budget),
        speed_up(*callback.times),
        "",
        *_whereabouts(project, given.out),
    ]


def _callback(project: Project, given: Namespace) -> "AtOnce":
    """Return what prunes: by the method that is named, or by what a survey has found best."""
    from lightning_prune.cli.methods import AtOnce, check_methods
    from lightning_prune.cli.surveying import PlannedOnce, place_of

    settings = {"keep": given.keep, **settings_of(given)}
    if given.method == "auto":
        path = given.plan or place_of(given.checkpoint)
        return PlannedOnce(path, project.data_settings, **settings)
    check_methods([given.method])
    return AtOnce(given.method, **settings)


def _read_back(model: nn.Module, path: Path) -> None:
    """Raise an OSError unless a file holds the plan and the weights of a model."""
    content = read_checkpoint(path)
    weights = model.state_dict()
    plan = plan_in_force(model)
    kept = content.get(CHECKPOINT_KEY, {}).get("plan") if isinstance(content.get(CHECKPOINT_KEY), Mapping) else None
    is_same = kept == (plan.to_json() if plan is not None else None)
    is_same &= content["state_dict"].keys() == weights.keys()
    if not (is_same and all(_equal(content["state_dict"][name], value) for name, value in weights.items())):
        raise OSError(f"What was written to {str(path.parent)!r} is not what was to be written: try another folder.")


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    return torch.equal(one.nan_to_num(), other.cpu().nan_to_num())


# -- what is told ------------------------------------------------------------------------------------------------------


def speed_up(before: Sequence[float], after: Sequence[float]) -> str:
    """Say how many times as fast a network is, with quartiles, from the times of turns of both.

    Args:
        before: Milliseconds of the one in each turn.
        after: Milliseconds of the other.

    Example:
        >>> speed_up([2.0, 2.2, 2.0], [1.0, 1.0, 1.1])
        'speed-up: 2.00x (quartiles 1.91-2.10 of 3 turns on this machine)'
    """
    spread = ratios(before, after)
    quartiles = f"quartiles {spread.low:.2f}-{spread.high:.2f} of {len(before)} turns on this machine"
    return f"speed-up: {spread.median:.2f}x ({quartiles})"


def _whereabouts(project: Project, out: Path) -> list[str]:
    """Say where the file is and how to load it."""
    lines = [f"checkpoint: {out}, read back", f"report:     lightning-prune report {out}", "load it:"]
    kind = type(project.model)
    if project.is_plain:
        return [*lines, f"lightning_prune.load({kind.__name__}(...), {str(out)!r})"]
    return [*lines, *load_lines(kind, str(out.absolute()), read_checkpoint(out))]
