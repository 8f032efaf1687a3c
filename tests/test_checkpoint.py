"""Checkpoints of pruned models: onto the original class, and what is said about those that do not fit."""

import random
from pathlib import Path
from typing import Any

import battery
import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.checkpoint import CHECKPOINT_KEY, restore_shape, save_plan, widened
from lightning_prune.files import read_checkpoint
from lightning_prune.models import ImageClassifier
from lightning_prune.pruning_plan import plan_in_force

EXAMPLE = torch.zeros(1, 1, 8, 8)


def pruned(keep: float = 0.5) -> nn.Module:
    model = battery.ResidualClassifier()
    graph = lp.trace(model, EXAMPLE)
    lp.prune(model, lp.plan(graph, lp.criteria.magnitude(graph), keep=keep, round_to=2))
    return model


def save(model: nn.Module, path: Path, **changes: Any) -> Path:
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict(), "hyper_parameters": {"width": 12, "norm": True}}
    save_plan(model, checkpoint)
    torch.save({**checkpoint, **changes}, path)
    return path


def test_onto_class_instance_and_an_instance_pruned_otherwise(tmp_path: Path) -> None:
    model = pruned()
    path = save(model, tmp_path / "a.ckpt")
    for target in (battery.ResidualClassifier, battery.ResidualClassifier(), pruned(0.3), pruned(0.8)):
        loaded = lp.load_pruned(target, path)
        assert battery.differences(model, loaded) == []
        assert plan_in_force(loaded) == plan_in_force(model)
        assert loaded.first.out_channels == model.first.out_channels == loaded.norm.num_features
        assert loaded(EXAMPLE).shape == (1, 4)


def test_an_unpruned_checkpoint_widens_a_pruned_model_again(tmp_path: Path) -> None:
    whole = battery.ResidualClassifier()
    loaded = lp.load_pruned(pruned(), save(whole, tmp_path / "whole.ckpt"))
    assert battery.differences(whole, loaded) == []
    assert plan_in_force(loaded) is None


def test_widened_puts_zeros_where_channels_were_removed() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    lp.prune(model, plan := lp.trace(model, torch.zeros(1, 2)).plan({"0": torch.tensor([0, 2])}))
    weights = model.state_dict()
    checkpoint = {"state_dict": weights, "epoch": 3, CHECKPOINT_KEY: {"plan": plan.to_json()}}
    wide = widened(checkpoint, plan)
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        whole[name][1] = 0
    whole["2.weight"][:, 1] = 0
    assert wide.keys() == {"state_dict", "epoch"}
    assert wide["state_dict"].keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in wide["state_dict"].items())
    assert wide["state_dict"]._metadata == weights._metadata  # tells torch how old the layers are
    assert weights["0.weight"].shape == (2, 2)
    assert CHECKPOINT_KEY in checkpoint


class Scaled(battery.ResidualClassifier):
    """Keeps numbers per channel that are in no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(1, 2, 12)[:, None, None], persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = nn.functional.relu(self.stem(images) * self.scale)
        return self.head(nn.functional.adaptive_avg_pool2d(features, 2).flatten(1))


def test_buffers_that_are_in_no_checkpoint_keep_their_numbers(tmp_path: Path) -> None:
    model = Scaled()
    graph = lp.trace(model, EXAMPLE)
    lp.prune(model, graph.plan({"stem": torch.tensor([1, 3, 11])}))
    path = save(model, tmp_path / "a.ckpt", hyper_parameters={}, **{"pytorch-lightning_version": "2.5.0"})
    checkpoint, restored = torch.load(path, weights_only=True), Scaled()
    restore_shape(restored, checkpoint)
    restored.load_state_dict(checkpoint["state_dict"])
    restore_shape(restored, checkpoint)  # a second time changes nothing
    for loaded in (lp.load_pruned(Scaled, path), Scaled.load_from_checkpoint(path), restored):
        torch.testing.assert_close(loaded.scale, torch.linspace(1, 2, 12)[[1, 3, 11], None, None])
        torch.testing.assert_close(loaded.eval()(EXAMPLE), model.eval()(EXAMPLE), rtol=0, atol=0)


def test_an_instance_that_is_made_lies_where_the_weights_are_loaded_to(tmp_path: Path) -> None:
    path = save(model := pruned(), tmp_path / "a.ckpt")
    loaded = lp.load_pruned(battery.ResidualClassifier, path, map_location="meta")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in loaded.state_dict().items() if tensor.is_meta} == shapes


def test_training_goes_on_after_loading(tmp_path: Path) -> None:
    loaded = lp.load_pruned(battery.ResidualClassifier, save(pruned(), tmp_path / "a.ckpt")).train()
    optimizer = torch.optim.SGD(loaded.parameters(), 0.1)
    before = [p.detach().clone() for p in loaded.parameters()]
    loaded(torch.randn(4, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not any(
        torch.equal(p, q) for p, q in zip(loaded.parameters(), before, strict=True) if p.grad.abs().sum() > 0
    )


def test_messages(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint at '.*nowhere\.ckpt'"):
        lp.load_pruned(battery.ResidualClassifier, tmp_path / "nowhere.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"list\.ckpt' is no checkpoint of a Lightning Trainer"):
        lp.load_pruned(battery.ResidualClassifier, tmp_path / "list.ckpt")
    path = save(pruned(), tmp_path / "a.ckpt")
    other = r"The checkpoint is of another architecture: 'stem.weight' has shape \(12, .* and \(10, .* in ResidualClass"
    with pytest.raises(ValueError, match=other):
        lp.load_pruned(battery.ResidualClassifier, path, width=10)
    with pytest.raises(
        ValueError, match=r"The plan is about another architecture: the model has no tensor 'stem.weight'"
    ):
        lp.load_pruned(nn.Sequential(nn.Conv2d(1, 2, 3)), path)
    whole = save(battery.ResidualClassifier(width=10), tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"The checkpoint is of another architecture: 'stem.weight' has shape"):
        lp.load_pruned(battery.ResidualClassifier(), whole)
    missing = save(nn.Linear(2, 2), tmp_path / "linear.ckpt")
    with pytest.raises(ValueError, match=r"linear\.ckpt' is of another architecture"):
        lp.load_pruned(battery.ResidualClassifier, missing)
    newer = torch.load(path, weights_only=True)
    newer[CHECKPOINT_KEY]["plan"]["version"] = 99
    torch.save(newer, tmp_path / "newer.ckpt")
    with pytest.raises(ValueError, match="The plan has format version 99, this lightning-prune reads up to 1"):
        lp.load_pruned(battery.ResidualClassifier, tmp_path / "newer.ckpt")


def test_a_class_without_saved_arguments_says_what_to_do(tmp_path: Path) -> None:
    class Needy(battery.ResidualClassifier):
        def __init__(self, size: int) -> None:
            super().__init__(size)

    path = save(pruned(), tmp_path / "a.ckpt", hyper_parameters={})
    with pytest.raises(ValueError, match=r"Needy cannot be made from the hyper-parameters.*save_hyperparameters"):
        lp.load_pruned(Needy, path)
    assert lp.load_pruned(Needy, path, size=12)(EXAMPLE).shape == (1, 4)


def test_a_class_that_fetches_weights_without_a_network_says_what_to_do(tmp_path: Path) -> None:
    class Fetching(battery.ResidualClassifier):
        def __init__(self, fetches: bool = True) -> None:
            super().__init__()
            if fetches:
                raise ConnectionError("no network.")

    path = save(pruned(), tmp_path / "a.ckpt", hyper_parameters={})
    said = "^Fetching cannot be made here, as its constructor fails with ConnectionError: no network. If that looks for"
    with pytest.raises(ValueError, match=said):
        lp.load_pruned(Fetching, path)
    for given in (lp.load_pruned(Fetching(fetches=False), path), lp.load_pruned(Fetching, path, fetches=False)):
        assert given(EXAMPLE).shape == (1, 4)


def test_a_failed_restore_leaves_the_model_as_it_was() -> None:
    model = battery.ResidualClassifier(width=10)
    checkpoint: dict[str, Any] = {}
    save_plan(pruned(), checkpoint)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="another architecture"):
        restore_shape(model, checkpoint)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert plan_in_force(model) is None


def test_image_classifier_loads_by_its_own_means(tmp_path: Path) -> None:
    module = ImageClassifier(network="digits", input_shape=(1, 8, 8))
    graph = lp.trace(module, module.example_input_array)
    lp.prune(module, lp.plan(graph, lp.criteria.magnitude(graph), keep=0.5))
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    checkpoint["pytorch-lightning_version"] = "2.5.0"
    save_plan(module, checkpoint)
    torch.save(checkpoint, tmp_path / "digits.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "digits.ckpt", weights_only=True)
    assert battery.differences(module, loaded) == []


def scaled(*kept: int) -> Scaled:
    model = Scaled()
    lp.prune(model, lp.trace(model, EXAMPLE).plan({"stem": torch.tensor(kept)}))
    return model


def test_a_later_checkpoint_onto_a_model_pruned_less_keeps_buffers_that_are_in_none(tmp_path: Path) -> None:
    path = save(scaled(1, 3, 11), tmp_path / "a.ckpt", hyper_parameters={})
    restored = scaled(1, 3, 7, 11)
    restore_shape(restored, torch.load(path, weights_only=True))
    for model in (restored, lp.load_pruned(scaled(1, 3, 7, 11), path)):
        torch.testing.assert_close(model.scale, torch.linspace(1, 2, 12)[[1, 3, 11], None, None])


@pytest.mark.parametrize("earlier", [Scaled(), scaled(1, 3, 7, 11), scaled(2, 3)], ids=["whole", "wider", "others"])
def test_values_that_are_in_no_checkpoint_are_not_made_up(earlier: nn.Module, tmp_path: Path) -> None:
    model, path = scaled(1, 3, 11), save(earlier, tmp_path / "a.ckpt", hyper_parameters={})
    before = {name: value.clone() for name, value in model.state_dict(keep_vars=True).items()}
    message = (
        "Scaled has been pruned of channels that the checkpoint brings back, but without the values of 'scale', which"
    )
    with pytest.raises(ValueError, match=message):
        lp.load_pruned(model, path)
    with pytest.raises(ValueError, match=message):
        restore_shape(model, torch.load(path, weights_only=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.scale.shape[0] == 3
    assert battery.differences(earlier, lp.load_pruned(Scaled(), path)) == []


class Tied(nn.Module):
    """One layer by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 1)
        self.c = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) + self.c(x))


def tied() -> Tied:
    model = Tied()
    lp.prune(model, lp.trace(model, torch.zeros(1, 2)).plan({"a": torch.tensor([0, 2])}))
    return model


def test_tied_weights_in_checkpoints_with_and_without_a_note_of_their_names(tmp_path: Path) -> None:
    model = tied()
    path = save(model, tmp_path / "a.ckpt", hyper_parameters={})
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint[CHECKPOINT_KEY].pop("aliases") == {"c.weight": "a.weight", "c.bias": "a.bias"}
    torch.save(checkpoint, tmp_path / "older.ckpt")
    for saved in (path, tmp_path / "older.ckpt"):
        assert battery.differences(model, lp.load_pruned(Tied, saved)) == []


def test_tied_weights_that_a_checkpoint_holds_by_their_other_name_can_be_widened() -> None:
    whole, model = Tied(), tied()
    weights = {name: value for name, value in whole.state_dict().items() if not name.startswith("a.")}
    restore_shape(model, {"state_dict": weights})
    model.load_state_dict(weights, strict=False)
    assert battery.differences(whole, model) == []


HOSTILE = {
    "no dictionary": (lambda entry: [], "has an entry 'lightning_prune' without a plan; it is damaged"),
    "no plan": (lambda entry: {"aliases": {}}, "has an entry 'lightning_prune' without a plan; it is damaged"),
    "a list": (lambda entry: {**entry, "plan": [1]}, "A plan is a mapping with groups and shapes; got a list"),
    "aliases": (lambda entry: {**entry, "aliases": {"a": 1}}, "with aliases that are no names; it is damaged"),
    "another tensor": (
        lambda entry: {**entry, "plan": {**entry["plan"], "shapes": {**entry["plan"]["shapes"], "nothing": [1]}}},
        "The plan is about another architecture: the model has no tensor 'nothing'",
    ),
    "room for nobody": (
        lambda entry: {**entry, "plan": {**entry["plan"], "groups": {}}},
        r"damaged: 'stem.weight' has shape \(10, 1, 3, 3\), where its plan says \(12, 1, 3, 3\)",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_plan_in_a_checkpoint_touches_no_tensor(kind: str, tmp_path: Path) -> None:
    change, message = HOSTILE[kind]
    path = save(pruned(), tmp_path / "a.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[CHECKPOINT_KEY] = change(checkpoint[CHECKPOINT_KEY])
    torch.save(checkpoint, path)
    for model in (battery.ResidualClassifier(), pruned(0.8)):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message) as raised:
            lp.load_pruned(model, path)
        assert "\n" not in str(raised.value)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.long
def test_a_plan_of_shapes_that_no_machine_can_hold_is_refused(tmp_path: Path) -> None:
    size = 2**28
    entry = {"version": 1, "shapes": {"a": [size, size]}, "groups": {}}
    for axis in range(2):
        entry["groups"][str(axis)] = {"size": size, "kept": [0], "slices": [["a", axis, 0, 1, 1]]}
    checkpoint = {"state_dict": {"a": torch.zeros(1, 1)}, CHECKPOINT_KEY: {"plan": entry, "aliases": {}}}
    with pytest.raises(
        ValueError, match=r"no tensor of shape \(1, 268435456\)|no tensor of shape \(268435456, 2684354"
    ):
        widened(checkpoint, lp.checkpoint.saved_plan(checkpoint))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_whatever_is_no_checkpoint_is_refused_in_a_sentence(tmp_path: Path) -> None:
    chance, path = random.Random(0), save(pruned(), tmp_path / "a.ckpt")
    whole = path.read_bytes()
    spoilt = [b"", b"hello", bytes(100), *(whole[:end] for end in range(0, len(whole), 997))]
    spoilt += [b"\x80\x02" + chance.randbytes(chance.randrange(30)) for _ in range(300)]
    spoilt += [chance.randbytes(chance.randrange(1, 60)) for _ in range(100)]
    for content in spoilt:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a.ckpt' (cannot be read as a checkpoint|is no checkpoint)") as raised:
            read_checkpoint(path)
        assert "\n" not in str(raised.value)
