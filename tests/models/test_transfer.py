import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.models import ImageClassifier, Transfer, build_network

SHAPE = (1, 8, 8)
ARGUMENTS = {"network": "digits", "num_classes": 3, "input_shape": SHAPE, "network_args": {"width": 4}}
FROZEN = ["stage1.*", "stage2.*"]


def loader():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.rand(12, *SHAPE, generator=generator), torch.arange(12) % 3), batch_size=4)


class Watch(L.Callback):
    """Note in each epoch which parts of the network have changed since the one before."""

    def __init__(self):
        self.changed = []
        self.before = None

    def on_train_epoch_end(self, trainer, pl_module):
        now = {name: value.detach().clone() for name, value in pl_module.network.named_parameters()}
        if self.before is not None:
            names = {name.split(".")[0] for name in now if not torch.equal(now[name], self.before[name])}
            self.changed.append(sorted(names))
        self.before = now


class SameOnAllRanks(L.Callback):
    """Refuse ranks that differ at the end."""

    def on_train_end(self, trainer, pl_module):
        both = trainer.strategy.all_gather(nn.utils.parameters_to_vector(pl_module.parameters()).detach())
        assert torch.equal(both[0], both[1])


def train(tmp_path, module, *callbacks, **settings):
    defaults = {"max_epochs": 4, "logger": False, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    quiet = {"enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = L.Trainer(callbacks=list(callbacks), **{**defaults, **quiet, **settings})
    trainer.fit(module, loader())
    return trainer


def test_new_head_on_published_features(tmp_path):
    trained = build_network("digits", num_classes=7, in_channels=1, width=4)
    torch.save(trained.state_dict(), tmp_path / "w.th")
    module = ImageClassifier(**ARGUMENTS, weights=str(tmp_path / "w.th"), transfer=Transfer(frozen=FROZEN))
    assert torch.equal(module.network.stage1[0][0].weight, trained.stage1[0][0].weight)
    assert module.network.linear.weight.shape == (3, 16)
    trained_now = {name.split(".")[0] for name, p in module.network.named_parameters() if p.requires_grad}
    assert trained_now == {"stage3", "linear"}


def test_head_is_the_last_linear_layer_or_the_named_module():
    network = build_network("torchvision/alexnet", num_classes=2)
    assert Transfer().head_of(network) == "classifier.6"
    assert Transfer(head="classifier").head_of(network) == "classifier"


def test_frozen_parts_are_trained_from_the_epoch_of_unfreezing(tmp_path):
    watch, module = Watch(), ImageClassifier(**ARGUMENTS, transfer=Transfer(frozen=FROZEN, unfreeze_epoch=2))
    train(tmp_path, module, watch)
    # Differences between the ends of epochs 0 and 1, 1 and 2, 2 and 3.
    assert watch.changed == [["linear", "stage3"]] + 2 * [["linear", "stage1", "stage2", "stage3"]]


def test_frozen_parts_stay_frozen_without_an_epoch(tmp_path):
    watch = Watch()
    train(tmp_path, ImageClassifier(**ARGUMENTS, transfer=Transfer(frozen=FROZEN)), watch)
    assert watch.changed == 3 * [["linear", "stage3"]]


def test_two_ranks_stay_equal_when_parts_are_unfrozen(tmp_path):
    # DDP averages gradients of parameters that were trained when it was set up; the images differ between the ranks.
    module = ImageClassifier(**ARGUMENTS, transfer=Transfer(frozen=FROZEN, unfreeze_epoch=1))
    before = module.network.stage1[0][0].weight.detach().clone()
    train(tmp_path, module, SameOnAllRanks(), devices=2, strategy="ddp_fork", max_epochs=3)
    assert not torch.equal(module.network.stage1[0][0].weight, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frozen": ["features.*"]}, r"No parameter of DigitsNet fits 'features\.\*': correct `frozen`"),
        ({"head": "fc"}, "DigitsNet has no module 'fc' to be the new head: name one with `head`"),
    ],
)
def test_names_that_fit_nothing_are_refused(settings, message, tmp_path):
    torch.save(build_network("digits", num_classes=3, in_channels=1, width=4).state_dict(), tmp_path / "w.th")
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**ARGUMENTS, weights=str(tmp_path / "w.th"), transfer=settings)


def test_network_without_a_linear_layer_needs_a_named_head():
    with pytest.raises(ValueError, match="Conv2d has no linear layer to be the new head"):
        Transfer().head_of(nn.Conv2d(1, 1, 1))
