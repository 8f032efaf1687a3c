"""lightning-hydra-template: its own `train` and `eval.py`, with MNIST's files synthesised; `run.py` checks it out.

The folder of the checkout is in the environment variable ``TEMPLATE``.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from case import Case
from synthesised import picture

TEMPLATE = Path(os.environ["TEMPLATE"])
sys.path.insert(0, str(TEMPLATE))

_GIVEN: list[Any] = []  # callbacks that the config names by their number


def given(number: int) -> Any:
    """Return a callback; the config's target is this function, so that a trial may look at it afterwards."""
    return _GIVEN[number]


class OfTemplate(Case):
    """A case that ``src/train.py`` trains, with the callbacks of its config."""

    folder: Path

    def callbacks(self, work: Path) -> list[Any]:
        return []

    def fit(self, work: Path, callbacks: list[Any], ckpt_path: str | None = None, **settings: Any) -> tuple[Any, Any]:
        from hydra import compose, initialize_config_dir
        from src.train import train

        _GIVEN[:] = callbacks
        made = [*overrides(self.folder, work), "seed=0", "test=true", f"ckpt_path={ckpt_path or 'null'}"]
        made += [f"+callbacks.given{n}={{_target_: hydra_template.given, number: {n}}}" for n in range(len(callbacks))]
        made += [f"++trainer.{name}={value}" for name, value in settings.items()]
        if settings.get("fast_dev_run"):
            made += ["test=false"]
        with initialize_config_dir(str(TEMPLATE / "configs"), version_base="1.3"):
            _, objects = train(compose("train.yaml", made))
        return objects["model"], objects["trainer"]

    def evaluate(self, work: Path, path: str) -> str:
        """Run ``eval.py`` on a checkpoint as a process of its own; its Trainer has to know of plans: a line of help."""
        work.mkdir(parents=True, exist_ok=True)
        made = [*overrides(self.folder, work), f"ckpt_path={path}"]
        made.append("+trainer.callbacks=[{_target_: lightning_prune.callbacks.PruningCallback}]")
        command = [sys.executable, "src/eval.py", *made]
        done = subprocess.run(command, cwd=TEMPLATE, capture_output=True, text=True, check=False)
        return "eval.py runs" if done.returncode == 0 else f"eval.py: {done.stderr.strip().splitlines()[-1]}"


def overrides(data: Path, work: Path) -> list[str]:
    """Return what says where data and outputs lie, and that the data are few."""
    return [
        f"data.data_dir={data}",
        "data.train_val_test_split=[32,16,16]",
        "data.batch_size=8",
        f"paths.root_dir={TEMPLATE}",
        f"paths.output_dir={work}",
        f"paths.work_dir={work}",
        "trainer.accelerator=cpu",
        "trainer.min_epochs=1",
        "extras.print_config=false",
    ]


def _write_idx(path: Path, content: np.ndarray) -> None:
    head = np.array([0x800 + content.ndim, *content.shape], dtype=">i4")
    path.write_bytes(head.tobytes() + content.tobytes())


def mnist(data: Path) -> Case:
    """Digits, as files of MNIST."""
    from src.models.components.simple_dense_net import SimpleDenseNet
    from src.models.mnist_module import MNISTLitModule

    raw = data / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 48), ("t10k", 16)):
        images = np.stack([picture(number, 28, 1)[..., 0] for number in range(count)])
        labels = np.arange(count, dtype=np.uint8) % 4
        head = np.array([0x803, count, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, count], dtype=">i4").tobytes() + labels.tobytes()
        )

    def objects() -> dict[str, Any]:
        return {
            "net": SimpleDenseNet(784, 64, 128, 64, 10),
            "optimizer": partial(torch.optim.Adam, lr=0.001, weight_decay=0.0),
            "scheduler": partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="min", factor=0.1, patience=10),
        }

    case = OfTemplate(
        module=lambda: MNISTLitModule(**objects(), compile=False),
        data=dict,
        monitor="val/acc",
        given=objects,
        help=("+trainer.callbacks=[{_target_: lightning_prune.callbacks.PruningCallback}] for eval.py",),
    )
    case.folder = data
    return case
