"""The command line: ``lightning-prune fit --config configs/quickstart.yaml``."""

import os
import sys
from collections.abc import Callable, Sequence

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

import lightning_prune.callbacks
import lightning_prune.datamodules
import lightning_prune.models  # noqa: F401  so that YAML may name these classes without their path
from lightning_prune.cli import benchmark, compare, export, report, shipped_configs
from lightning_prune.graph import trace
from lightning_prune.reporting.inspect import describe

__all__ = ["COMMANDS", "PruneCLI", "main"]

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "report": report.main,
    "export": export.main,
    "benchmark": benchmark.main,
    "compare": compare.main,
}
_EPILOG = f"Besides these: inspect, configs, {', '.join(COMMANDS)}. Each has a --help of its own."


class PruneCLI(LightningCLI):
    """LightningCLI with one more option: ``torch_threads``, the number of CPU threads of torch."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--torch_threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of torch (default: torch's own choice). Small networks are fastest with 1, above all "
            "where other programs keep the cores busy.",
        )

    @override
    def before_instantiate_classes(self) -> None:
        threads = (self.config[self.subcommand] if self.subcommand else self.config).torch_threads
        if threads is not None:
            torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lightning-prune``: fit, validate, test or predict, from configs and options of `LightningCLI`, and more.

    ``lightning-prune inspect --config FILE`` prints what can be pruned in the model of a config, what it costs, and
    what stays whole and why. ``lightning-prune configs`` lists the configs that ship with the package, and
    ``lightning-prune configs NAME`` copies one out. A config that is not found is looked for among them. What comes
    after training, ``report``, ``export``, ``benchmark`` and ``compare``, has modules of its own.

    Args:
        arguments: The command line without the program's name; default that of the process.
    """
    if os.getcwd() not in sys.path:  # so that it finds classes of the project at hand, as `python -m` does
        sys.path.append(os.getcwd())
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if typed[:1] == ["configs"]:
        shipped_configs.main(typed[1:])
        return
    if typed and typed[0] in COMMANDS:
        COMMANDS[typed[0]](typed[1:])
        return
    given = [shipped_configs.find(argument) for argument in typed]
    if given[:1] == ["inspect"]:
        _inspect(given[1:])
        return
    if arguments is None:
        sys.argv[1:] = given
    _command_line(None if arguments is None else given)


def _command_line(arguments: list[str] | None, run: bool = True) -> PruneCLI:
    return PruneCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=arguments,
        run=run,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lightning-prune", "epilog": _EPILOG},
    )


def _inspect(arguments: list[str]) -> None:
    sys.argv[1:] = arguments  # what LightningCLI reads when it is given none
    model = _command_line(None, run=False).model
    if model.example_input_array is None:
        sys.exit(f"{type(model).__name__} has no example_input_array; set it to what its forward takes.")
    print(describe(trace(model, model.example_input_array)))


if __name__ == "__main__":
    main()
