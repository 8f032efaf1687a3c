import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest
import torch

from lightning_prune.datamodules import ImageNetDataModule
from lightning_prune.models import build_network


@pytest.fixture
def imagenet_root(image_root):
    """Give a tree the names of ImageNet's folders."""
    (image_root / "test").rename(image_root / "val")
    return image_root


def ready(root, **settings):
    data = ImageNetDataModule(str(root), image_size=24, num_workers=0, val_fraction=0.2, **settings)
    data.setup("fit")
    data.setup("test")
    return data


def test_validation_images_are_training_images_and_the_folder_val_is_the_test(imagenet_root):
    data = ready(imagenet_root)
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [24, 6, 9]
    assert data.train_set.images is data.val_set.images
    assert all(b"/val/" in path for path in data.test_set.images.paths.tolist())
    assert all(b"/train/" in path for path in data.train_set.images.paths.tolist())


def test_training_images_are_boxed_and_flipped_and_the_others_are_not(imagenet_root):
    data = ready(imagenet_root)
    assert (data.augmentation.crop_padding, data.augmentation.flip) == (0, True)
    epochs = []
    for epoch in (0, 1):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        pixels, *_ = next(iter(loader))
        assert pixels.shape == (24, 3, 24, 24)
        epochs.append(pixels)
    assert not torch.equal(epochs[0].flatten(1).sort(0)[0], epochs[1].flatten(1).sort(0)[0])
    assert torch.equal(next(iter(data.val_dataloader()))[0], next(iter(data.val_dataloader()))[0])


def test_classes_that_differ_are_refused(imagenet_root, extra_images):
    extra_images(imagenet_root / "val", 1, classes=["ant"])
    with pytest.raises(ValueError, match=r"train and val in .* different classes \(ant only in val\): give both the"):
        ready(imagenet_root)


def test_missing_part_is_named_with_the_layout(imagenet_root):
    (imagenet_root / "val").rename(imagenet_root / "validation")
    with pytest.raises(FileNotFoundError, match=r"val' does not exist: .* train/<class>/ and val/<class>/ of the root"):
        ready(imagenet_root)


# ---- training on the sample images, on two ranks ----


TRAINING = """
    import sys
    from pathlib import Path
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning_prune.callbacks import PruningCallback
    from lightning_prune.datamodules import ImageNetDataModule
    from lightning_prune.models import build_network
    from torch.nn import functional as F

    class Classifier(L.LightningModule):
        def __init__(self, network):
            super().__init__()
            # Dropout draws from the global generator, whose state Lightning does not bring back.
            arguments = {"dropout": 0.0} if "mobilenet" in network else {}
            self.network = build_network(network, num_classes=1000, **arguments)
            self.example_input_array = torch.zeros(1, 3, 48, 48)

        def forward(self, images):
            return self.network(images)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)

    torch.set_num_threads(1)
    network, folder = sys.argv[1], Path(sys.argv[2])
    checkpoint = sys.argv[3] if len(sys.argv) > 3 else None
    torch.manual_seed(0)
    module = Classifier(network)
    torch.manual_seed(1 if checkpoint else 2)  # nothing may depend on the global generator
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, limit_val_batches=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
        callbacks=[
            PruningCallback(keep=0.5, start_epoch=1, round_to=1),
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=13, save_top_k=-1),
        ],
    )
    data = ImageNetDataModule(str(folder.parent / "imagenet"), 48, batch_size=50, num_workers=1, val_fraction=0.5)
    trainer.fit(module, data, ckpt_path=checkpoint)
    torch.save(module.state_dict(), folder / f"{'resumed' if checkpoint else 'unbroken'}{trainer.global_rank}.pt")
"""


@pytest.fixture(scope="module")
def sample_root(tmp_path_factory):
    """Unpack the 1,000 sample images, one per class; each is in train twice, so that one can be kept for validation."""
    archive = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "imagenet-samples.tar"
    if not archive.is_file():
        pytest.skip("the shared ImageNet samples are not here")
    root = tmp_path_factory.mktemp("samples")
    with tarfile.open(archive) as tar:
        tar.extractall(root / "imagenet" / "val", filter="data")
    for image in (root / "imagenet" / "val").glob("*/*"):
        folder = root / "imagenet" / "train" / image.parent.name
        folder.mkdir(parents=True)
        for name in ("0.jpg", "1.jpg"):
            (folder / name).symlink_to(image)
    return root


@pytest.mark.long
@pytest.mark.parametrize("network", ["torchvision/resnet18", "torchvision/mobilenet_v2"])
def test_samples_train_prune_and_resume_on_two_ranks(sample_root, network):
    folder = sample_root / Path(network).name
    folder.mkdir()
    (folder / "train.py").write_text(textwrap.dedent(TRAINING))
    command = [sys.executable, folder / "train.py", network, folder]
    for arguments in ([], [folder / "step=13.ckpt"]):  # 10 batches in the first epoch, then 3 of the pruned network
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    weights = {name: torch.load(folder / f"{name}.pt") for name in ("unbroken0", "unbroken1", "resumed0", "resumed1")}
    whole = sum(parameter.numel() for parameter in build_network(network, num_classes=1000).parameters())
    assert sum(value.numel() for value in weights["unbroken0"].values()) < 0.9 * whole
    for rank, name in ((0, "unbroken1"), (0, "resumed0"), (1, "resumed1")):
        for key, value in weights[f"unbroken{rank}"].items():
            if name != "unbroken1" or not key.endswith(("running_mean", "running_var")):  # these are each rank's own
                assert torch.equal(weights[name][key], value), (name, key)
