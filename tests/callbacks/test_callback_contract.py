"""The contract of callbacks: what a subclass may say, what the base does with it, and a stranger's callback."""

import copy
import gc
import inspect
import pickle
import re
import weakref
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from shortened import WAYS, ordinary
from torch import Tensor

from lightning_prune import callbacks
from lightning_prune.callbacks import PruningCallback, RLJointPruneCallback, TaylorRankCallback
from lightning_prune.callbacks.state import State, deal_out, from_checkpoint, per_rank, to_checkpoint
from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan, plan_in_force

pytestmark = [
    pytest.mark.filterwarnings("ignore:Prune . of . has pruned nothing"),
    pytest.mark.filterwarnings("ignore:Training has ended with"),
]
CONTRACT = {
    "State", "Run", "cap", "make_plan", "scores", "allocate", "check_criterion", "check_budget", "prepare",
    "begin_epoch", "ready", "run_on_batch", "distillation_loss", "rankings", "can_stop", "checked_blocks",
}  # fmt: skip
GUIDE = Path(__file__).parents[2] / "docs" / "write_your_own_criterion.md"
SUBCLASSES = [getattr(callbacks, name) for name in callbacks.__all__ if name != "PruningCallback"]


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_subclasses_override_the_contract_and_hooks_of_lightning_alone(kind: type[PruningCallback]) -> None:
    hooks = {name for name in vars(Callback) if name.startswith(("on_", "setup", "teardown"))}
    inherited = set(dir(PruningCallback)) - {"__init__", "__doc__", "__module__", "__annotations__", "__firstlineno__"}
    overridden = set(vars(kind)) & (inherited - set(dir(object)))
    assert overridden <= CONTRACT | hooks
    assert "__getstate__" not in vars(kind)
    for nested in (kind.State, kind.Run):
        assert issubclass(nested, (State, PruningCallback.Run))


def test_nothing_is_asserted_away() -> None:
    for path in Path(inspect.getfile(callbacks)).parent.glob("*.py"):
        assert not re.search(r"^\s*assert .*is not None", path.read_text(), re.MULTILINE), path.name


# -- the state ---------------------------------------------------------------------------------------------------------


@dataclass
class Counted(State):
    """A state with one field of each kind."""

    seen: int = 0
    weights: Tensor | None = None
    shares: list[int] = field(default_factory=list, metadata=per_rank(tuple, lambda saved: sorted(sum(saved, ()))))


def test_a_state_is_saved_field_by_field_and_read_again() -> None:
    content = to_checkpoint(Counted(steps_done=2, seen=3, weights=torch.ones(2), shares=[7, 5]))
    own = {"steps_done", "batch_like", "training_batch_like", "history", "teacher", "stop"}
    assert content.keys() == {*own, "seen", "weights", "shares"}
    assert content["shares"] == [(7, 5)]
    again = from_checkpoint(Counted, content)
    assert (again.steps_done, again.seen, again.shares) == (2, 3, [5, 7])
    assert from_checkpoint(Counted, {"steps_done": 1, "unknown": 4}) == Counted(steps_done=1)


@pytest.mark.parametrize(
    ("ranks", "expected"), [(1, [[1, 2, 3]]), (2, [[1, 3], [2]]), (3, [[1], [2], [3]]), (4, [[1], [2], [3], []])]
)
def test_what_differs_between_ranks_is_dealt_out(ranks: int, expected: list[list[int]]) -> None:
    for rank, shares in enumerate(expected):
        content: dict[str, Any] = {"steps_done": 1, "shares": [(1,), (2,), (3,)]}
        deal_out(Counted, content, rank, ranks)
        assert from_checkpoint(Counted, content).shares == shares


@pytest.mark.parametrize("name", ordinary(battery.CALLBACKS, *WAYS))
def test_every_field_of_a_state_is_in_checkpoints_and_starts_anew(name: str, tmp_path: Path) -> None:
    callback = battery.make_callback(name)
    names = {declared.name for declared in fields(callback.state)}
    assert set(callback.state_dict()) == names
    fresh = to_checkpoint(callback.State())
    _, trainer = battery.train(tmp_path, callback)
    assert callback.state.steps_done == callback.steps or callback.max_drop is not None
    callback.setup(trainer, battery.ResidualClassifier(), "fit")  # of another module
    assert to_checkpoint(callback.state) == fresh


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ordinary(battery.CALLBACKS, *WAYS))
def test_a_run_exists_while_training_goes_on_and_is_in_no_copy(name: str, tmp_path: Path) -> None:
    runs: list[Any] = []

    class Watch(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if not runs:
                runs.append(weakref.ref(callback.run))
                assert callback.run.graph.model is callback.run.trainer.lightning_module
                for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
                    assert not hasattr(twin, "run")
                    assert twin.state_dict().keys() == callback.state_dict().keys()

    callback = battery.make_callback(name)
    battery.train(tmp_path, callback, Watch())
    gc.collect()
    assert not hasattr(callback, "run")
    assert [run() for run in runs] == [None]


def test_a_run_ends_when_training_fails(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("out of memory")

    callback, module = TaylorRankCallback(round_to=2), battery.ResidualClassifier()
    with pytest.raises(RuntimeError, match="out of memory"):
        battery.train(tmp_path, callback, Fail(), module=module)
    assert not hasattr(callback, "run")
    assert not any(child._forward_pre_hooks or child._forward_hooks for child in module.modules())


def test_the_search_is_forgotten_once_it_has_chosen(tmp_path: Path) -> None:
    callback = battery.make_callback("rl_joint")
    _, trainer = battery.train(tmp_path, callback)
    assert isinstance(callback, RLJointPruneCallback)
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["callbacks"][callback.state_key]
    assert (saved["search"], saved["searched_epoch"], saved["best"], saved["in_force"]) == (None, -1, [], {})


# -- a stranger's callback ---------------------------------------------------------------------------------------------


def strangers_callback() -> type[PruningCallback]:
    """Return the callback of the guide."""
    blocks = re.findall(r"```python\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if "class RandomSharesCallback" in block]
    assert len(block.splitlines()) <= 40
    names: dict[str, Any] = {"__name__": "guide"}
    exec(compile(block, GUIDE.name, "exec"), names)
    return names["RandomSharesCallback"]


@pytest.mark.parametrize(
    "moments", [pytest.param({}, marks=pytest.mark.long), {"every_n_train_steps": 4}], ids=["epochs", "steps"]
)
def test_the_callback_of_the_guide_resumes_to_the_same_bits(moments: dict[str, int], tmp_path: Path) -> None:
    kind, settings = strangers_callback(), {"keep": 0.5, "steps": 3, "round_to": 2}
    saver = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}-{step}", save_top_k=-1, **moments)
    callback = kind(**settings)
    unbroken, _ = battery.train(tmp_path, callback, saver)
    assert 0.4 < plan_in_force(unbroken).budget["achieved"] <= 0.5
    assert len(callback.state.losses) == 3
    for path in sorted((tmp_path / "checkpoints").glob("*.ckpt")):
        again = kind(**settings)
        resumed, _ = battery.train(tmp_path / path.stem, again, ckpt_path=path)
        assert battery.differences(unbroken, resumed) == [], path.name
        assert again.state.losses == callback.state.losses


def test_the_state_of_the_guides_callback_is_needed(tmp_path: Path) -> None:
    """Without the random numbers of the checkpoint, a resumed run would try other shares."""
    kind, settings = strangers_callback(), {"keep": 0.5, "steps": 3, "round_to": 2, "tries": 1}
    unbroken, _ = battery.train(tmp_path, kind(**settings))

    class Forgets(kind):  # type: ignore[misc, valid-type]
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict({**state_dict, "random": None})

    path = next((tmp_path / "checkpoints").glob("epoch=1-*.ckpt"))
    content = torch.load(path, weights_only=True)
    key = kind(**settings).state_key
    content["callbacks"][Forgets(**settings).state_key] = content["callbacks"].pop(key)
    torch.save(content, tmp_path / "changed.ckpt")
    resumed, _ = battery.train(tmp_path / "on", Forgets(**settings), ckpt_path=tmp_path / "changed.ckpt")
    assert battery.differences(unbroken, resumed) != []


def test_make_plan_is_called_with_the_budget_of_the_step(tmp_path: Path) -> None:
    calls: list[tuple[int, float]] = []

    class Halves(PruningCallback):
        def make_plan(
            self, trainer: L.Trainer, graph: ChannelGraph, keep: float
        ) -> tuple[PruningPlan, dict[str, Tensor]]:
            calls.append((self.run.step, keep))
            plan = graph.plan({name: graph.kept(name)[: -(-len(graph.kept(name)) // 2)] for name in graph.groups})
            return plan, {}

    module, _ = battery.train(tmp_path, Halves(keep=0.4, steps=2), max_epochs=3)
    assert calls == [(1, 0.7), (2, 0.4)]
    assert plan_in_force(module).widths == {"stem": 3, "first": 6}
