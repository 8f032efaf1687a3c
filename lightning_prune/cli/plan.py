"""``lightning-prune plan CKPT``: what a budget will cost, before any training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_prune.cli.option_errors import CommandParser
from lightning_prune.cli.project import add_project_options, load_project, without_settings
from lightning_prune.cli.prune_options import add_prune_options, settings_of
from lightning_prune.cli.survey_table import told
from lightning_prune.files import check_folder
from lightning_prune.planning import check_keep

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-prune plan``.

    Args:
        arguments: The command line after ``plan``.
    """
    own, dotted = without_settings(arguments)
    given = _parser().parse_args(own)
    for keep in given.keep:
        check_keep(keep)
    if given.checkpoint is None and given.config is None:
        raise ValueError("plan needs a trained network: give a checkpoint, or a --config that names its weights.")
    from lightning_prune.cli.fitting import run_once
    from lightning_prune.cli.surveying import Surveyor, place_of

    path = given.out or place_of(given.checkpoint or Path(given.config.name))
    check_folder(path)
    methods = _methods(given.method)
    keeps = sorted(dict.fromkeys(given.keep), reverse=True)
    project = load_project(given.checkpoint, given, dotted)
    settings: dict[str, Any] = settings_of(given)
    about = type(project.model).__name__, project.data_settings
    surveyor = Surveyor(methods, keeps, path, about, **settings)
    run_once(project, surveyor, given)
    assert surveyor.survey is not None
    lines = [surveyor.remark] if surveyor.remark else []
    lines += told(surveyor.survey, methods, keeps, surveyor.asked)
    print("\n".join([*lines, "", f"kept in {path}, and as a page in {path.with_suffix('.html')}"]))


def _parser() -> CommandParser:
    parser = CommandParser(
        "lightning-prune plan",
        description="Measure what budgets would cost before any training: widths, FLOPs, parameters, time, and the "
        "module's own validation right after the compensated prune. The network itself is not pruned.",
    )
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="checkpoint of a trained model; without it, that of --config"
    )
    parser.add_argument(
        "--keep",
        type=float,
        nargs="+",
        default=[0.8, 0.65, 0.5, 0.35],
        metavar="F",
        help="fractions of the cost that are kept (default: 0.8 0.65 0.5 0.35)",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        default=["coherent_obs"],
        metavar="NAME",
        help="criteria that score channels, or all; searches for widths, if named: greedy, evolution, halving, "
        "skip-whole or an agent such as ppo-cim, each with 100 measurements; random and uniform are measured with any "
        "(default: coherent_obs)",
    )
    parser.add_argument(
        "--out", type=Path, help="JSON file that keeps what is measured (default: CKPT without its ending, .plan.json)"
    )
    add_prune_options(parser)
    add_project_options(parser)
    return parser


def _methods(given: Sequence[str]) -> list[str]:
    """Return the methods to compare: those that are named, or all, and always the controls."""
    from lightning_prune.cli.methods import ALL, CONTROLS, check_methods

    if "all" in given:
        others = [name for name in given if name != "all"]
        given = [*ALL, *others]
    check_methods(given)
    return list(dict.fromkeys([*(name for name in given if name not in CONTROLS), *CONTROLS]))
