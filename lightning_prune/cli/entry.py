"""Entry of the command line: ``lightning-prune fit --config configs/quickstart.yaml``.

Nothing is imported before it is known what was asked for: Lightning and its parser take seconds.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_prune import __version__

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "inspect": "lightning_prune.cli.inspect",
    "configs": "lightning_prune.cli.shipped_configs",
    "report": "lightning_prune.cli.report",
    "export": "lightning_prune.cli.export",
    "benchmark": "lightning_prune.cli.benchmark",
    "compare": "lightning_prune.cli.compare",
    "profile": "lightning_prune.cli.profile",
}
"""Modules of the subcommands that are not LightningCLI's; each has a ``main``."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lightning-prune``: fit, validate, test or predict, from configs and options of `LightningCLI`, and more.

    ``lightning-prune inspect --config FILE`` prints what can be pruned in the model of a config, what it costs, and
    what cannot be pruned and why. ``lightning-prune configs`` lists the configs that ship with the package, and
    ``lightning-prune configs NAME`` copies one out. A config that is not found is looked for among them. ``report``,
    ``export``, ``benchmark`` and ``compare`` come after training.

    Args:
        arguments: The command line without the program's name; default that of the process.
    """
    if os.getcwd() not in sys.path:  # so that it finds classes of the project at hand, as `python -m` does
        sys.path.append(os.getcwd())
    typed = list(sys.argv[1:] if arguments is None else arguments)
    command = typed[0] if typed else ""
    if command == "--version":
        print(f"lightning-prune {__version__}")
    elif command in COMMANDS:
        import_module(COMMANDS[command]).main(typed[1:])
    else:
        import_module("lightning_prune.cli.training").main(typed)


if __name__ == "__main__":
    main()
