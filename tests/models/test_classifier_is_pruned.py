"""The classifier with all that it can do, beside a callback that prunes it."""

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from shortened import ordinary
from torch.utils.data import DataLoader

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback
from lightning_prune.models import ImageClassifier, build_network
from lightning_prune.pruning_plan import plan_in_force

EPOCHS = 4
SETTINGS = {
    "distillation": {},  # its file is not there yet
    "transfer": {"transfer": {"frozen": ["stage1.*"], "unfreeze_epoch": 2}},
    "adamw": {"optimization": {"optimizer": "AdamW", "lr": 0.01, "warmup_epochs": 1}},
    "channels_last": {"channels_last": True},
    "mixing": {"regularization": {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1}},
}


@pytest.fixture
def teacher(tmp_path):
    """Write the weights of a whole network."""
    network = build_network("digits", num_classes=4, in_channels=1, width=8)
    torch.save({f"module.{key}": value for key, value in network.state_dict().items()}, tmp_path / "teacher.pt")
    return str(tmp_path / "teacher.pt")


def make_module(name, teacher):
    settings = SETTINGS[name]
    if name == "distillation":
        settings = {"distillation": {"share": 0.5, "weights": teacher}}
    return ImageClassifier("digits", 4, (1, 8, 8), {"width": 8}, weights=teacher, **settings)


def train(root, module, ckpt_path=None):
    L.seed_everything(0, verbose=False)
    prune = PruningCallback(keep=0.5, steps=2, start_epoch=1, round_to=2)
    trainer = L.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=root,
        callbacks=[prune, ModelCheckpoint(root / "checkpoints", filename="{epoch}", save_top_k=-1)],
    )  # fmt: skip
    trainer.fit(module, *(DataLoader(battery.images(48), 16) for _ in range(2)), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("name", ordinary(SETTINGS, "distillation", "mixing"))
def test_it_is_pruned_resumes_and_loads(name, teacher, tmp_path):
    module = train(tmp_path, make_module(name, teacher))
    plan = plan_in_force(module)
    assert plan.budget["achieved"] <= 0.5
    again = train(tmp_path / "again", make_module(name, teacher), tmp_path / "checkpoints" / "epoch=1.ckpt")
    assert plan_in_force(again).shapes == plan.shapes
    if name != "mixing":  # what is drawn at random is not drawn again by a run that resumes
        assert battery.differences(module, again) == []

    path = tmp_path / "checkpoints" / f"epoch={EPOCHS - 1}.ckpt"
    (tmp_path / "teacher.pt").unlink()  # the machine that loads the checkpoint does not have the file
    for loaded in (lp.load_pruned(ImageClassifier, path), ImageClassifier.load_from_checkpoint(path)):
        assert battery.differences(module, loaded) == []
        assert loaded.optimization == module.optimization


def test_teacher_stays_whole(teacher, tmp_path):
    module = train(tmp_path, make_module("distillation", teacher))
    whole = torch.load(teacher, weights_only=True)
    state = module.teacher.network.state_dict()
    assert all(torch.equal(value, whole[f"module.{key}"]) for key, value in state.items())
    parameters = sum(parameter.numel() for parameter in module.network.parameters())
    assert parameters < 0.8 * sum(parameter.numel() for parameter in module.teacher.network.parameters())
