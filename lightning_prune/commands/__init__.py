"""The subcommands of ``lightning-prune`` that come after training; each module has a ``main``."""

from collections.abc import Callable, Sequence

from lightning_prune.commands import benchmark, compare, export, report

__all__ = ["COMMANDS"]

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "report": report.main,
    "export": export.main,
    "benchmark": benchmark.main,
    "compare": compare.main,
}
