"""Loading what projects save: modules made of objects, compiled modules, and the lines that are told of it."""

import contextlib
import functools
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from processes import warm
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback
from lightning_prune.files import Unread, read_without_objects
from lightning_prune.importing import imported
from lightning_prune.pruning_plan import plan_in_force


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))


class TakesNet(L.LightningModule):
    """As projects of hydra are written: the network, and what makes the optimizer, are handed over."""

    def __init__(self, net: nn.Module, optimizer: Any, classes: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net
        self.head = nn.Linear(16, classes)  # in a group with the last layer of the network

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.net(images))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.hparams["optimizer"](self.parameters())


SGD = functools.partial(torch.optim.SGD, lr=0.1)


def trained(module: L.LightningModule, root: Path, **settings: Any) -> str:
    """Prune a module in training and return the path of the result."""
    callback = PruningCallback(keep=0.5, round_to=2)
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=root, limit_train_batches=2, callbacks=[callback], **settings,
    )  # fmt: skip
    trainer.fit(module, battery.loaders()[0])
    return callback.result_path


@pytest.fixture(scope="module")
def made_of_objects(tmp_path_factory: pytest.TempPathFactory) -> tuple[L.LightningModule, str]:
    module = TakesNet(net(), SGD)
    path = trained(module, tmp_path_factory.mktemp("objects"))
    assert module.net[3].out_features == module.head.in_features < 16
    return module, path


def half_pruned(path: str) -> nn.Module:
    """Return the network out of the file: pruned along with the head, of which nothing is noted on it."""
    saved = torch.load(path, weights_only=False)["hyper_parameters"]["net"]
    assert saved[3].out_features < 16
    return saved


WAYS: dict[str, Any] = {
    "arguments are given": lambda path: lp.load_pruned(TakesNet, path, net=net(), optimizer=SGD),
    "a network that is pruned already": lambda path: lp.load_pruned(
        TakesNet, path, net=half_pruned(path), optimizer=SGD
    ),
    "an instance": lambda path: lp.load_pruned(TakesNet(net(), SGD), path),
    "an instance of a network that is pruned": lambda path: lp.load_pruned(TakesNet(half_pruned(path), SGD), path),
    "an instance that is pruned already": lambda path: lp.load_pruned(lp.load_pruned(TakesNet(net(), SGD), path), path),
    "all that the file holds": lambda path: lp.load_pruned(TakesNet, path, weights_only=False),
    "Lightning, all that the file holds": lambda path: TakesNet.load_from_checkpoint(path, weights_only=False),
    "Lightning, given": lambda path: TakesNet.load_from_checkpoint(path, weights_only=False, net=net(), optimizer=SGD),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_module_made_of_objects(way: str, made_of_objects: tuple[L.LightningModule, str]) -> None:
    module, path = made_of_objects
    loaded = WAYS[way](path)
    assert battery.differences(module, loaded) == []
    assert plan_in_force(loaded) == plan_in_force(module)
    assert loaded.net[1].out_features == module.net[1].out_features
    assert loaded(torch.zeros(1, 1, 8, 8)).shape == (1, 4)


REFUSALS: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing given": (
        lambda path: lp.load_pruned(TakesNet, path),
        ValueError,
        r"TakesNet takes net \(of Sequential\), optimizer \(of partial\): .* load_pruned\(TakesNet, path, net=\.\.\., "
        r"optimizer=\.\.\.\), or an instance in place of the class, or weights_only=False",
    ),
    "not all given": (lambda path: lp.load_pruned(TakesNet, path, net=net()), ValueError, r"TakesNet takes optimizer "),
    "weights only": (
        lambda path: lp.load_pruned(TakesNet, path, weights_only=True, net=net(), optimizer=SGD),
        ValueError,
        "holds more than tensors and plain values, which weights_only=True refuses",
    ),
    "arguments for an instance": (
        lambda path: lp.load_pruned(TakesNet(net(), SGD), path, classes=3),
        TypeError,
        "classes: arguments are for a class, and an instance of TakesNet was given",
    ),
    "the path first": (
        lambda path: lp.load_pruned(path, TakesNet), TypeError, "takes a class or an instance, then the path"
    ),
    "another network": (
        lambda path: lp.load_pruned(TakesNet, path, net=net()[:2], optimizer=SGD), ValueError, "another architecture"
    ),
}  # fmt: skip


@pytest.mark.parametrize("use", REFUSALS)
def test_what_has_to_be_given_is_said(use: str, made_of_objects: tuple[L.LightningModule, str]) -> None:
    act, kind, message = REFUSALS[use]
    with pytest.raises(kind, match=message) as raised:
        act(made_of_objects[1])
    assert "\n" not in str(raised.value) or use == "another network"


class Hostile:
    """Runs what it likes when it is read."""

    def __reduce__(self) -> Any:
        return sys.exit, (13,)


def test_objects_that_are_left_out_run_no_code(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    content = {"state_dict": model.state_dict(), "hyper_parameters": {"one": Hostile(), "many": [Hostile(), 3]}}
    torch.save(content, tmp_path / "a.ckpt")
    found = read_without_objects(tmp_path / "a.ckpt")
    assert isinstance(found["hyper_parameters"]["one"], Unread)
    assert found["hyper_parameters"]["many"][1] == 3
    assert battery.differences(lp.load_pruned(nn.Linear(2, 2), tmp_path / "a.ckpt"), model) == []
    with pytest.raises(SystemExit):
        torch.load(tmp_path / "a.ckpt", weights_only=False)


# -- modules that are compiled in setup --------------------------------------------------------------------------------


class Compiled(battery.ResidualClassifier):
    """Compiles a layer and a part of itself where it is trained, as templates of projects do."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(12, 12, 1), nn.ReLU())

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.compile_parts()

    def compile_parts(self) -> "Compiled":
        self.part = torch.compile(self.part, backend="eager")
        self.first = torch.compile(self.first, backend="eager")
        return self

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(self.part(F.relu(self.stem(images))))))
        return self.head(F.adaptive_avg_pool2d(self.second(x), 2).flatten(1))


def as_written(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): value for name, value in state.items()}


def test_names_of_compiled_modules_are_those_of_what_is_loaded_onto(tmp_path: Path) -> None:
    module, path = Compiled().compile_parts(), tmp_path / "compiled.ckpt"
    kept = {"stem": torch.arange(7), "part._orig_mod.0": torch.arange(3, 9), "first._orig_mod": torch.arange(0, 24, 3)}
    lp.prune(module, lp.trace(module, torch.zeros(1, 1, 8, 8)).plan(kept))
    lp.save(module, path, **{"pytorch-lightning_version": L.__version__, "epoch": 0, "global_step": 0})
    state = as_written(module.state_dict())
    assert state.keys() != module.state_dict().keys()
    evaluated = Compiled()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.test(evaluated, battery.loaders()[1], ckpt_path=path, verbose=False)  # setup compiles for fit alone
    loaded: dict[str, Any] = {
        "class": lp.load_pruned(Compiled, path),
        "Lightning": Compiled.load_from_checkpoint(path),
        "compiled": lp.load_pruned(Compiled().compile_parts(), path),
        "Trainer": evaluated,
    }
    for way, model in loaded.items():
        found = as_written(model.state_dict())
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], value) for name, value in state.items()), way
        compiled = any("_orig_mod" in name for name in model.state_dict())
        assert compiled == (way == "compiled")
        assert any("_orig_mod" in group for group in plan_in_force(model).groups) == compiled
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    lp.save(loaded["class"], tmp_path / "plain.ckpt")  # and the other way round
    again = lp.load(Compiled().compile_parts(), tmp_path / "plain.ckpt")
    assert battery.differences(again, loaded["compiled"]) == []


# -- lines that are told at the end of a run ---------------------------------------------------------------------------

SCRIPT = """
import logging, sys
import lightning as L
import torch
import battery
from torch import nn
from lightning_prune.callbacks import PruningCallback

class Plain(battery.ResidualClassifier):
    def __init__(self, width=12):
        super().__init__(width)
        self.save_hyperparameters()

class Holder:
    class Inner(Plain):
        pass

class Named(Plain):
    def __init__(self, activation="my_layers.Twice"):
        super().__init__()
        self.save_hyperparameters()
        module, _, name = activation.partition(".")
        self.second = torch.nn.Sequential(self.second, getattr(__import__(module), name)())

class Needs(Plain):
    def __init__(self, net, extra):
        super().__init__()
        del self.hparams["extra"]

def main(kind, *arguments):
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(logging.StreamHandler(sys.stdout))
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        limit_train_batches=1, callbacks=[PruningCallback(round_to=2)],
    )
    module = kind(*arguments)
    trainer.fit(module, battery.loaders()[0])
    torch.save(module.state_dict(), "state.pt")

"""
STARTS = {
    "a script": "if __name__ == '__main__':\n    main(Plain, 8)\n",
    "a class in a class": "if __name__ == '__main__':\n    main(Holder.Inner, 8)\n",
    "an installed class": "main(battery.ResidualClassifier)\n",
    "a module that is named by a setting": "if __name__ == '__main__':\n    main(Named)\n",
    "arguments are needed": "if __name__ == '__main__':\n    main(Needs, nn.Linear(1, 1), 3)\n",
    "importing would run it": "main(Plain, 8)\n",
    "a local class": "def make():\n    class Local(Plain):\n        pass\n    return Local\nmain(make())\n",
}
ORDINARY = ("a script", "a module that is named by a setting", "arguments are needed", "importing would run it")
REMARKS = {
    "arguments are needed": "# give what the file does not hold, as for the training: extra, net",
    "importing would run it": "# where Plain is defined: to import my_training.py would run it",
    "a local class": "# where Local is defined: it is made in a function, from which it cannot be imported",
}


def _train(folder: Path) -> None:
    """Run a script as Python does."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    with open("said.txt", "w") as said, contextlib.redirect_stdout(said):
        runpy.run_path("my_training.py", run_name="__main__")


def _paste(folder: Path, lines: list[str]) -> None:
    """Run the lines that were told, in a process of its own that stands elsewhere."""
    names: dict[str, Any] = {"net": None, "extra": None}
    if "is defined" in lines[1]:
        names["Plain"] = names["Local"] = battery.ResidualClassifier
    exec("\n".join(lines), names)
    state, found = torch.load(folder / "state.pt"), names["model"].state_dict()
    same = state.keys() == found.keys() and all(torch.equal(found[name], value) for name, value in state.items())
    (folder / "loaded.txt").write_text(str(same))


@pytest.mark.parametrize(
    "start", [name if name in ORDINARY else pytest.param(name, marks=pytest.mark.long) for name in STARTS]
)
def test_the_lines_that_are_told_load_the_result_in_another_process(start: str, tmp_path: Path) -> None:
    (tmp_path / "my_training.py").write_text(SCRIPT + STARTS[start])
    (tmp_path / "my_layers.py").write_text("import torch\nclass Twice(torch.nn.ReLU):\n    pass\n")
    for target, arguments in ((_train, ()), (_paste, ())):
        if target is _paste:
            told = (tmp_path / "said.txt").read_text().split("load it:\n")[1].splitlines()
            end = next(number for number, line in enumerate(told) if line.startswith("model = "))
            arguments = (told[: end + 1],)
        process = warm().Process(target=target, args=(tmp_path, *arguments))
        process.start()
        process.join(120)
        assert process.exitcode == 0
    assert (tmp_path / "loaded.txt").read_text() == "True"
    assert [line for line in told if line.startswith("#")] == [REMARKS[start] for _ in range(start in REMARKS)]


# -- without a Trainer -------------------------------------------------------------------------------------------------


def test_a_plain_model_is_saved_with_its_plan_and_goes_on(tmp_path: Path) -> None:
    """Two models take the same steps; one is saved, loaded and given a new optimizer in between."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 128).view(2, 64)).square().sum().backward()
        optimizer.step()

    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    lp.prune(model, lp.trace(model, torch.zeros(1, 64)).plan({"1": torch.arange(9)}), optimizer)
    step(model, optimizer)
    lp.save(model, tmp_path / "a.pt", optimizer=optimizer.state_dict(), epoch=3)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content.keys() == {"state_dict", "lightning_prune", "optimizer", "epoch"}
    for again in (net(), lp.load(net(), tmp_path / "a.pt")):
        assert lp.load(again, tmp_path / "a.pt") is again
        assert plan_in_force(again) == plan_in_force(model)
    new = torch.optim.Adam(again.parameters())
    new.load_state_dict(content["optimizer"])
    for one, other in ((model, optimizer), (again, new)):
        step(one, other)
    assert battery.differences(model, again) == []


def test_an_unpruned_model_is_saved_as_well_and_takes_no_names_of_ours(tmp_path: Path) -> None:
    model = net()
    lp.save(model, tmp_path / "a.pt")
    assert battery.differences(model, lp.load(net(), tmp_path / "a.pt")) == []
    with pytest.raises(
        TypeError, match="state_dict: the file has these names for the weights and the plan; use others"
    ):
        lp.save(model, tmp_path / "b.pt", state_dict={})
    assert not (tmp_path / "b.pt").exists()
    with pytest.raises(ValueError, match="another architecture"):
        lp.load(nn.Linear(2, 2), tmp_path / "a.pt")


@pytest.mark.parametrize("early", [True, False])
def test_fabric_sets_up_before_the_prune_or_after_it(early: bool, tmp_path: Path) -> None:
    """Both ways, the steps are those of a plain loop."""
    fabric = L.Fabric(accelerator="cpu", devices=1)

    def steps(model: nn.Module, optimizer: Any, backward: Any) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            backward(model(torch.linspace(-1, 1, 128).view(2, 64)).square().sum())
            optimizer.step()

    def optimized(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters())

    torch.manual_seed(0)
    plain = net()
    inside = lp.load(net(), _saved(plain, tmp_path / "start.pt"))
    plan = lp.trace(plain, torch.zeros(1, 64)).plan({"1": torch.arange(9)})
    optimizer = optimized(plain)
    steps(plain, optimizer, torch.Tensor.backward)
    lp.prune(plain, plan, optimizers=optimizer)
    steps(plain, optimizer, torch.Tensor.backward)
    model, optimizer = inside, optimized(inside)
    if early:
        model, optimizer = fabric.setup(inside, optimizer)
    steps(model, optimizer, torch.Tensor.backward)
    lp.prune(inside, plan, optimizers=optimizer)
    if not early:
        model, optimizer = fabric.setup(inside, optimizer)
    steps(model, optimizer, fabric.backward)
    assert battery.differences(plain, inside) == []
    for each in (model, inside):
        lp.save(each, tmp_path / "end.pt")
        assert battery.differences(plain, lp.load(net(), tmp_path / "end.pt")) == []
    wrapped = fabric.setup_module(net())
    assert lp.load(wrapped, tmp_path / "end.pt") is wrapped
    assert battery.differences(plain, wrapped.module) == []


def _saved(model: nn.Module, path: Path) -> Path:
    lp.save(model, path)
    return path


class Imports(TakesNet):
    """Imports what a setting names."""

    def __init__(self, net: nn.Module, optimizer: Any = None, tool: str = "colorsys.rgb_to_hls") -> None:
        super().__init__(net, optimizer)
        imported(tool)


def test_what_hyper_parameters_name_is_imported_where_the_file_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path = Imports(net()), tmp_path / "a.ckpt"
    lp.prune(module, lp.trace(module, torch.zeros(1, 1, 8, 8)).plan({"net.3": torch.arange(5)}))
    of_lightning = {"pytorch-lightning_version": L.__version__, "epoch": 0, "global_step": 0}
    lp.save(module, path, hyper_parameters=dict(module.hparams), **of_lightning)
    ways: list[Any] = [
        lambda: lp.load_pruned(Imports, path, net=net()),
        lambda: lp.load_pruned(Imports, path, weights_only=False),
        lambda: Imports.load_from_checkpoint(path, weights_only=False),
    ]
    for way in ways:
        monkeypatch.delitem(sys.modules, "colorsys", raising=False)
        if way is ways[0]:
            with pytest.raises(ValueError, match="name the module 'colorsys', which is not imported on the word of a"):
                way()
        else:
            assert battery.differences(module, way()) == []
