import pickle
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision.models import WeightsEnum

from lightning_prune.models import build_network, load_weights
from lightning_prune.models.weights import load_pretrained


def make_network(classes=3):
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, classes))


class Wrapped(nn.Module):
    """A network whose own keys begin with a prefix that load_weights removes elsewhere."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(2, 2)


def state_with_prefix(network, prefix):
    return {prefix + key: value for key, value in network.state_dict().items()}


@pytest.mark.parametrize("container", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "network.", "module.network."])
def test_wrappers_are_removed(tmp_path, container, prefix):
    trained = make_network()
    state = state_with_prefix(trained, prefix)
    torch.save(state if container is None else {container: state, "epoch": 3}, tmp_path / "w.th")
    network = make_network()
    assert load_weights(network, tmp_path / "w.th") is network
    for key, value in trained.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key


@pytest.mark.parametrize("prefix", ["", "module."])
def test_prefix_of_the_network_itself_stays(tmp_path, prefix):
    trained = Wrapped()
    torch.save(state_with_prefix(trained, prefix), tmp_path / "w.th")
    assert torch.equal(load_weights(Wrapped(), str(tmp_path / "w.th")).model.weight, trained.model.weight)


def test_counter_of_batchnorm_may_be_missing(tmp_path):
    state = {key: value for key, value in make_network().state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "w.th")
    assert load_weights(make_network(), tmp_path / "w.th")[1].num_batches_tracked == 0


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no weights file '.*none.th': correct the path"):
        load_weights(make_network(), tmp_path / "none.th")


def test_wrong_shapes_are_named(tmp_path):
    torch.save(make_network(classes=4).state_dict(), tmp_path / "w.th")
    with pytest.raises(
        ValueError, match=r"does not fit Sequential \(of another shape: 2.weight \(4, 2\) instead of \(3"
    ):
        load_weights(make_network(), tmp_path / "w.th")


def test_missing_and_unexpected_keys_are_named_and_counted(tmp_path):
    state = {key: value for key, value in make_network().state_dict().items() if key.startswith("0.")}
    torch.save({**state, **{f"extra{i}": torch.zeros(1) for i in range(5)}}, tmp_path / "w.th")
    message = r"missing: 1.weight, 1.bias, 1.running_mean and 3 more; unexpected: extra0, extra1, extra2 and 2 more\)"
    with pytest.raises(ValueError, match=message):
        load_weights(make_network(), tmp_path / "w.th")


def test_network_is_left_alone_by_a_file_that_does_not_fit(tmp_path):
    torch.save(make_network(classes=4).state_dict(), tmp_path / "w.th")
    network = make_network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(network, tmp_path / "w.th")
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())


def test_value_that_is_no_tensor_does_not_fit(tmp_path):
    torch.save({**make_network().state_dict(), "0.weight": 3}, tmp_path / "w.th")
    with pytest.raises(ValueError, match=r"of another shape: 0.weight None instead of"):
        load_weights(make_network(), tmp_path / "w.th")


class Touch:
    """Leaves a trace where unpickling runs code."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_code_does_not_run(tmp_path):
    torch.save({"state_dict": make_network().state_dict(), "extra": Touch(tmp_path / "ran")}, tmp_path / "w.th")
    with pytest.raises(ValueError, match="cannot be read as tensors only"):
        load_weights(make_network(), tmp_path / "w.th")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut off", pickle.dumps({"a": 1}, protocol=2)[:7]])
def test_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "w.th").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as tensors only: it is damaged"):
        load_weights(make_network(), tmp_path / "w.th")


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}, {"state_dict": {}}])
def test_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.th")
    with pytest.raises(ValueError, match=r"has no state_dict: save network.state_dict\(\)"):
        load_weights(make_network(), tmp_path / "w.th")


# ---- names of other collections, new heads, torchvision's own ----


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("resnet20", {"linear.": "fc.", ".shortcut.": ".downsample."}),
        ("resnet18", {"fc.": "linear.", ".downsample.": ".shortcut."}),
    ],
)
def test_residual_networks_load_from_both_usual_layouts(tmp_path, name, renamed):
    arguments = {"shortcut": "B"} if name == "resnet20" else {}
    trained = build_network(name, **arguments)
    state = trained.state_dict()
    for ours, theirs in renamed.items():
        state = {("." + key).replace("." + ours.lstrip("."), "." + theirs.lstrip("."))[1:]: state[key] for key in state}
    assert state.keys() != trained.state_dict().keys()
    torch.save({"state_dict": {"module." + key: value for key, value in state.items()}}, tmp_path / "w.th")
    loaded = load_weights(build_network(name, **arguments), tmp_path / "w.th")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in trained.state_dict().items())


def test_new_head_keeps_its_weights_and_all_else_is_loaded(tmp_path):
    trained, network = make_network(classes=7), make_network(classes=3)
    torch.save(trained.state_dict(), tmp_path / "w.th")
    head = network[2].weight.clone()
    load_weights(network, tmp_path / "w.th", new_head="2")
    assert torch.equal(network[0].weight, trained[0].weight)
    assert torch.equal(network[2].weight, head)


def test_only_the_head_may_differ(tmp_path):
    torch.save(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 3)).state_dict(), tmp_path / "w.th")
    with pytest.raises(ValueError, match=r"of another shape: 0.weight"):
        load_weights(make_network(), tmp_path / "w.th", new_head="2")


@pytest.fixture
def ones_published(monkeypatch):
    """Let torchvision have published ones, for whatever is asked for."""

    def ones(self, *args, **kwargs):
        with torch.device("meta"):
            state = build_network("torchvision/resnet18").state_dict()
        return {key: torch.ones(value.shape, dtype=value.dtype) for key, value in state.items()}

    monkeypatch.setattr(WeightsEnum, "get_state_dict", ones)


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "DEFAULT"])
def test_torchvisions_own_weights_load_by_name(ones_published, weights):
    network = load_pretrained(build_network("torchvision/resnet18"), "torchvision/resnet18", weights)
    assert all((value == 1).all() for value in network.state_dict().values())
    small = build_network("torchvision/resnet18", num_classes=5)
    load_pretrained(small, "torchvision/resnet18", weights, new_head="fc")
    assert (small.conv1.weight == 1).all()
    assert small.fc.weight.std() > 0


def test_torchvisions_weights_for_other_classes_need_a_new_head(ones_published):
    with pytest.raises(ValueError, match=r"Weights 'DEFAULT' of 'torchvision/resnet18' .* a new head with `transfer`"):
        load_pretrained(build_network("torchvision/resnet18", num_classes=5), "torchvision/resnet18", "DEFAULT")


def test_name_that_torchvision_does_not_know_is_a_file():
    with pytest.raises(FileNotFoundError, match="There is no weights file 'IMAGENET'"):
        load_pretrained(build_network("torchvision/resnet18"), "torchvision/resnet18", "IMAGENET")


def test_without_a_network_the_file_and_its_place_are_named(monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", unreachable)
    with pytest.raises(ConnectionError, match=r"put the file https://\S+resnet18\S+.pth into '.*checkpoints'"):
        load_pretrained(build_network("torchvision/resnet18"), "torchvision/resnet18", "IMAGENET1K_V1")
