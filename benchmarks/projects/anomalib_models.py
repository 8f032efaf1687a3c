"""anomalib: STFPM, whose student learns what a frozen teacher sees, trained by the library's own Engine."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Stfpm
from case import Case
from synthesised import mask, picture, write


class OfEngine(Case):
    """A case that the Engine trains, with a Trainer and a ModelCheckpoint of its own."""

    def callbacks(self, work: Path) -> list[Any]:
        return []

    def fit(self, work: Path, callbacks: list[Any], ckpt_path: str | None = None, **settings: Any) -> tuple[Any, Any]:
        pl.seed_everything(0, verbose=False)
        module = self.module()
        engine = Engine(
            callbacks=callbacks, default_root_dir=work, accelerator="cpu", enable_progress_bar=False, **settings
        )
        engine.fit(module, ckpt_path=ckpt_path, **self.data())
        return module, engine.trainer


def stfpm(data: Path) -> Case:
    """Pictures without a square are as they should be."""
    for number in range(12):
        write(data / "good" / f"{number}.png", picture(number) // 2)
    for number in range(6):
        write(data / "bad" / f"{number}.png", picture(number))
        write(data / "masks" / f"{number}.png", 255 * (mask(number) > 0).astype("uint8"))

    def module() -> Any:
        return Stfpm(pre_processor=Stfpm.configure_pre_processor(image_size=(64, 64)))

    def folders() -> dict[str, Any]:
        made = Folder(
            name="squares", root=data, normal_dir="good", abnormal_dir="bad", mask_dir="masks", train_batch_size=4,
            eval_batch_size=4, num_workers=0, seed=0,
        )  # fmt: skip
        return {"datamodule": made}

    return OfEngine(module=module, data=folders)


_create_model = timm.create_model


def _without_weights(*args: Any, **kwargs: Any) -> Any:
    return _create_model(*args, **{**kwargs, "pretrained": False})


# The teacher's published weights are not fetched, also where a file is loaded: the registry of packages has none.
timm.create_model = _without_weights
