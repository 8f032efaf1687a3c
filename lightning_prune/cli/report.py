"""``lightning-prune report RUN [OUT.html]``: what pruning did in a run, as one HTML page."""

from collections.abc import Sequence
from pathlib import Path

from lightning_prune.cli.option_errors import CommandParser
from lightning_prune.reporting.report import write_report

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-prune report``.

    Args:
        arguments: The command line after ``report``.
    """
    parser = CommandParser("lightning-prune report", description="Write what pruning did in a run as HTML.")
    parser.add_argument("run", type=Path, help="folder of the run, such as logs/quickstart/version_0, or a checkpoint")
    parser.add_argument("out", type=Path, nargs="?", help="file to write (default: report.html in that folder)")
    given = parser.parse_args(arguments)
    print(f"Written to {write_report(given.run, given.out)}")
