"""A prune in `fit` that fails leaves the module, its optimizers, averages and place in the schedule as they were."""

import copy
import signal
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from lightning_prune import ddp
from lightning_prune.callbacks import PruningCallback, surgery_step
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.surgery import replacing

SETTINGS: dict[str, Any] = {"keep": 0.5, "start_epoch": 1, "round_to": 2, "validate_batches": 0}


class Failing(PruningCallback):
    """Remembers what there is right before a prune."""

    def make_plan(self, trainer: L.Trainer, *args: Any) -> Any:
        made = super().make_plan(trainer, *args)
        self.before = everything(trainer)
        self.trainer = trainer
        return made


def everything(trainer: L.Trainer) -> list[Any]:
    averages = [one._average_model for one in trainer.callbacks if isinstance(one, EMAWeightAveraging)]
    states = [dict(values) for values in trainer.optimizers[0].state.values()]
    models = [trainer.lightning_module, *averages]
    return copy.deepcopy([states, *(dict(model.state_dict()) for model in models)])


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(map(same, one, other))


@pytest.mark.parametrize("fails_at", ["a put", "the average", "what comes after"])
def test_a_prune_that_fails_in_fit_leaves_everything_as_it_was(
    fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, count = replacing.of_tensor, [0]

    def of_tensor(tensor: Tensor, *args: Any) -> replacing.Replacement:
        replacement = made(tensor, *args)
        count[0] += 1
        number = count[0]

        def put() -> None:
            if number == {"a put": 3, "the average": 12}.get(fails_at):
                raise torch.OutOfMemoryError("out of memory")
            replacement.put()

        return replacing.Replacement(put, replacement.undo)

    def rewrap(_: Any) -> None:
        if fails_at == "what comes after":
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(replacing, "of_tensor", of_tensor)
    monkeypatch.setattr(surgery_step, "rewrap", rewrap)
    callback = Failing(**SETTINGS)
    with pytest.raises(torch.OutOfMemoryError):
        battery.train(tmp_path, callback, EMAWeightAveraging())
    assert same(everything(callback.trainer), callback.before)
    assert callback.steps_done == 0
    assert plan_in_force(callback.trainer.lightning_module) is None
    assert callback.trainer.lightning_module.stem.out_channels == 12


def test_a_checkpoint_that_a_signal_asks_for_during_a_prune_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a scheduler does that is about to take the machine away."""
    callback = Failing(**SETTINGS)
    made, path = replacing.of_tensor, tmp_path / "asked for.ckpt"

    def save(*_: Any) -> None:
        if not path.exists():
            callback.trainer.save_checkpoint(path)

    def of_tensor(*args: Any) -> replacing.Replacement:
        replacement = made(*args)

        def put() -> None:
            replacement.put()
            signal.raise_signal(signal.SIGUSR1)

        return replacing.Replacement(put, replacement.undo)

    monkeypatch.setattr(replacing, "of_tensor", of_tensor)
    earlier = signal.signal(signal.SIGUSR1, save)
    try:
        unbroken, _ = battery.train(tmp_path, callback)
    finally:
        monkeypatch.undo()
        signal.signal(signal.SIGUSR1, earlier)
    content = torch.load(path, weights_only=True)
    assert content["callbacks"][callback.state_key]["steps_done"] == 1
    widths = {name: len(tensor) for name, tensor in content["state_dict"].items() if name.endswith("weight")}
    assert widths == {name: len(tensor) for name, tensor in unbroken.named_parameters() if name.endswith("weight")}
    resumed, _ = battery.train(tmp_path / "resumed", Failing(**SETTINGS), ckpt_path=path)
    assert plan_in_force(resumed) == plan_in_force(unbroken)  # it has no prune to make, nor any missing in its history


def test_a_wrapper_that_cannot_be_made_anew_is_put_back() -> None:
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = nn.Linear(2, 2)

    class Strategy:
        model = wrapper

        def configure_ddp(self) -> None:
            raise ConnectionError

    class Trainer:
        strategy = Strategy()

    with pytest.raises(ConnectionError):
        ddp.rewrap(Trainer)
    assert Trainer.strategy.model is wrapper
