"""Every config that ships with the package, on stand-in data of the right shapes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import WeightsEnum, get_model

from lightning_prune.callbacks import (
    LearnToPruneCallback,
    PruningCallback,
    RLJointPruneCallback,
    SensitivenessCallback,
)
from lightning_prune.cli import shipped_configs
from lightning_prune.cli.entry import main
from lightning_prune.cli.training import PruneCLI
from lightning_prune.pruning_plan import plan_in_force

CONFIGS = sorted(shipped_configs.FOLDER.glob("*.yaml"))
HERE = [
    "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.precision=32-true",
    "--trainer.fast_dev_run=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip
# Images as small as the network can bear, where 32 pixels are too few, or more than is needed.
SIZES = {
    "alexnet": 64, "torchvision/alexnet": 64, "resnet18": 16, "resnet20": 16, "resnet56": 16, "vit": 16,
    "torchvision/swin_t": 112,
}  # fmt: skip
# Positions of tokens are among the weights of a vision transformer, so that these are for one size of images.
WITHOUT_WEIGHTS = {"torchvision/vit_b_16"}
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
# A few small networks train in the ordinary suite; the others are parsed in `test_cli.py`.
SMALL = {
    "quickstart", "lenet_mnist_taylor", "conv4_mnist_sensitiveness", "vit_cifar10_isomorphic",
}  # fmt: skip
trained = [pytest.param(path, marks=() if path.stem in SMALL else pytest.mark.long, id=path.stem) for path in CONFIGS]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, with weights of torchvision that are all 0.01 instead of downloaded."""

    def constant(weights: WeightsEnum, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            state = get_model(type(weights).__name__.removesuffix("_Weights").lower()).state_dict()
        return {key: torch.full(value.shape, 0.01).to(value.dtype) for key, value in state.items()}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", constant)
    for draw in (torch.Tensor.uniform_, torch.Tensor.normal_):
        monkeypatch.setattr(torch.Tensor, draw.__name__, _quickly(draw))


def _quickly(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let a function that draws numbers fill the largest tensors with one."""

    def drawn(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return tensor.fill_(0.01) if tensor.numel() > 10**7 else draw(tensor, *args, **kwargs)

    return drawn


def instantiate(config: Path, *options: str) -> PruneCLI:
    """Make what a config describes, without running it."""
    return PruneCLI(
        L.LightningModule, L.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, run=False,
        args=["--config", str(config), *HERE, *options],
    )  # fmt: skip


def narrow_head(network: nn.Module) -> None:
    """Leave 16 of the 4096 hidden units of AlexNet and VGG, which take longer than all of the convolutions."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and 4096 in (layer.in_features, layer.out_features):
            sizes = [16 if size == 4096 else size for size in (layer.in_features, layer.out_features)]
            network.set_submodule(name, nn.Linear(*sizes))


def favour_the_first_class(network: nn.Module) -> None:
    """Let every image be taken for class 0, so that no accuracy is 0, whatever the machine makes of one step."""
    *_, head = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        head.bias[0] = 10


def shorten(pruner: PruningCallback) -> None:
    """Take as few measurements as the callback can do with."""
    if isinstance(pruner, SensitivenessCallback):
        pruner.levels, pruner.draws = [0.5], 1
    if isinstance(pruner, LearnToPruneCallback):
        pruner.samples = 2
    if isinstance(pruner, RLJointPruneCallback):
        pruner.search_settings.update(agent_updates=1, environment_updates=1)


def pruner_of(callbacks: list[Callback]) -> PruningCallback:
    (pruner,) = [callback for callback in callbacks if isinstance(callback, PruningCallback)]
    return pruner


@pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter.*")
@pytest.mark.filterwarnings("ignore:Prune .* leaves hardly any channels")  # of weights that are all alike
@pytest.mark.parametrize("path", trained)
def test_every_config_trains_and_prunes(path: Path) -> None:
    copied = shipped_configs.copy(path.stem, Path())
    content = yaml.safe_load(copied.read_text())
    model = content["model"]["init_args"]
    shape = [
        model["input_shape"][0],
        *(min(size, SIZES.get(model["network"], 32)) for size in model["input_shape"][1:]),
    ]
    without_weights = ["--model.init_args.weights=null"] if model["network"] in WITHOUT_WEIGHTS else []
    calm = "--model.init_args.optimization.lr=0.001"  # two images make steps that deep networks do not survive
    cli = instantiate(copied, f"--model.init_args.input_shape={shape}", calm, *without_weights)
    data: Any = cli.datamodule
    assert list(data.input_shape) == model["input_shape"]
    if hasattr(type(data), "num_classes") and not isinstance(type(data).num_classes, property):
        assert data.num_classes == model["num_classes"]
    pruner = pruner_of(cli.trainer.callbacks)  # type: ignore[attr-defined]
    assert pruner.last_prune_epoch < content["trainer"]["max_epochs"]

    narrow_head(cli.model.network)
    favour_the_first_class(cli.model.network)
    shorten(pruner)
    batch = TensorDataset(torch.randn(2, *shape), torch.tensor([0, model["num_classes"] - 1]))
    cli.trainer.fit(cli.model, DataLoader(batch, 2), DataLoader(batch, 2))
    plan = plan_in_force(cli.model)
    assert plan is not None
    assert plan.budget is not None
    assert 0 < plan.budget["achieved"] <= pruner.keep


@every_config
def test_every_config_says_what_it_is(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")
    assert path.stem == "quickstart" or "(" in first  # the paper
    content = yaml.safe_load(shipped_configs.copy(path.stem, Path()).read_text())
    assert content["trainer"]["logger"]["init_args"]["name"] == path.stem
    if "imagenet" in path.stem:
        assert content["trainer"]["strategy"] == "ddp"
        assert content["trainer"]["devices"] == -1


def test_a_copy_is_one_file_that_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    copied = shipped_configs.copy("vgg16_cifar10_afie", Path())
    assert list(Path().iterdir()) == [copied]
    assert "# VGG-16 with BatchNorm for CIFAR-10" in copied.read_text()  # comments too
    told = []
    for config in ("configs/vgg16_cifar10_afie.yaml", str(copied)):
        with pytest.raises(SystemExit) as left:
            main(["fit", "--config", config, "--print_config"])
        assert left.value.code == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert "network: vgg16_bn" in told[0]


def test_listing_shows_each_config_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [path.stem for path in CONFIGS]
    for line, path in zip(lines, CONFIGS, strict=True):
        assert line.endswith(path.read_text().splitlines()[0].removeprefix("# "))


def test_configs_are_copied_where_asked_and_never_over_anything(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    for arguments, expected in (([], "quickstart.yaml"), (["mine"], "mine/quickstart.yaml"), (["a.yaml"], "a.yaml")):
        main(["configs", "quickstart.yaml" if arguments else "quickstart", *arguments])
        assert capsys.readouterr().out == f"Copied to {expected}\n"
        assert Path(expected).read_text() == (shipped_configs.FOLDER / "quickstart.yaml").read_text()
    Path("a.yaml").write_text("mine")
    with pytest.raises(SystemExit, match=r"'a.yaml' exists: give another name, or remove it first"):
        main(["configs", "quickstart", "a.yaml"])
    assert Path("a.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quick"], "No config 'quick' ships with lightning-prune: choose one of .*quickstart"),
        (["../pyproject"], "No config '../pyproject' ships"),
        (["datasets/imagenet"], "No config 'datasets/imagenet' ships"),
        (["quickstart", "nowhere/a.yaml"], "There is no folder 'nowhere': make it first"),
    ],
)
def test_what_cannot_be_copied_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["configs", *arguments])
