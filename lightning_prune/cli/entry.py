"""Entry of the command line: ``lightning-prune fit --config configs/quickstart.yaml``.

Nothing is imported before it is known what was asked for: Lightning and its parser take seconds.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_prune import __version__
from lightning_prune.cli.option_errors import OptionError, command_error
from lightning_prune.cli.sentences import is_refusal, sentence

__all__ = ["COMMANDS", "TRACEBACK", "main"]

TRACEBACK = "--traceback"

COMMANDS = {
    "prune": "lightning_prune.cli.prune",
    "plan": "lightning_prune.cli.plan",
    "inspect": "lightning_prune.cli.inspect",
    "configs": "lightning_prune.cli.shipped_configs",
    "report": "lightning_prune.cli.report",
    "export": "lightning_prune.cli.export",
    "benchmark": "lightning_prune.cli.benchmark",
    "compare": "lightning_prune.cli.compare",
    "profile": "lightning_prune.cli.profile",
}
"""Modules of the subcommands that are not LightningCLI's; each has a ``main``."""

TRAINING = ("fit", "validate", "test", "predict")
"""The subcommands of LightningCLI."""

_HELP = """\
lightning-prune: trained networks, and networks that train, become physically smaller.

  fit        train a model, and prune it while it trains, as a --config says
  validate   run the module's own validation, of a checkpoint that was pruned or not
  test       run its own test
  predict    run its own predict_step

  plan       measure before any training what budgets cost
  prune      prune a trained checkpoint to a budget without training
  inspect    print what can be pruned in a model, what it costs, and what cannot be pruned and why

  report     write what pruning did in a run as one HTML page
  benchmark  time a pruned model against its original
  compare    two runs, or two checkpoints, side by side
  export     write a checkpoint as ONNX, as a program of torch.export, or as plain weights
  configs    list the configs that ship with the package, or copy one

lightning-prune COMMAND --help says more. With any command, --traceback shows where an error comes from; --version tells
the version. Begin with: lightning-prune fit --config quickstart"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lightning-prune``: fit, validate, test or predict, from configs and options of `LightningCLI`, and more.

    ``lightning-prune inspect --config FILE`` prints what can be pruned in the model of a config, what it costs, and
    what cannot be pruned and why. ``lightning-prune configs`` lists the configs that ship with the package, and
    ``lightning-prune configs NAME`` copies one out. A config that is not found is looked for among them. ``report``,
    ``export``, ``benchmark`` and ``compare`` come after training. What this package refuses is said in one sentence;
    with ``--traceback`` also where.

    Args:
        arguments: The command line without the program's name; default that of the process.
    """
    if os.getcwd() not in sys.path:  # so that it finds classes of the project at hand, as `python -m` does
        sys.path.append(os.getcwd())
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if TRACEBACK in typed:
        typed.remove(TRACEBACK)
        _run(typed)
        return
    try:
        _run(typed)
    except BrokenPipeError:  # whoever was to read has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OptionError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not is_refusal(error, runs_projects=_command(typed) not in COMMANDS):
            raise
        sys.exit(sentence(error))


def _run(typed: list[str]) -> None:
    command = _command(typed)
    if command == "--version":
        print(f"lightning-prune {__version__}")
    elif command in ("--help", "-h"):
        print(_HELP)
    elif command in COMMANDS:
        import_module(COMMANDS[command]).main(typed[1:])
    elif command in TRAINING or command.startswith("-"):
        import_module("lightning_prune.cli.training").main(typed)
    else:
        raise command_error(command, [*TRAINING, *COMMANDS])


def _command(typed: list[str]) -> str:
    return typed[0] if typed else ""


if __name__ == "__main__":
    main()
