"""What each of two ranks runs, one training after the other; see `test_two_ranks.py`."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import battery
import lightning as L
import torch
from lightning.fabric.strategies import DDPStrategy as DDPFabric
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.futures import Future

from lightning_prune import load, load_pruned, plan, prune, save, trace
from lightning_prune.callbacks import PruningCallback
from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import plan_in_force


class Compare(L.Callback):
    """Compare the weights of the ranks at the end of training."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        flat = torch.nn.utils.parameters_to_vector(pl_module.parameters()).detach()
        both = trainer.strategy.all_gather(flat)
        self.difference = float((both[0] - both[1]).abs().max())


class PressCtrlC(L.Callback):
    """Interrupt a run."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt


class Disagreeing(PruningCallback):
    """Scores the channels at random, differently on each rank."""

    def scores(self, trainer: L.Trainer, graph: ChannelGraph) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(trainer.global_rank)
        return {name: torch.rand(group.size, generator=generator) for name, group in graph.groups.items()}


class Compressed(DDPStrategy):
    """Sends half as many bits; Lightning itself registers hooks on GPUs alone."""

    calls = 0

    def _register_ddp_hooks(self) -> None:
        self.model.register_comm_hook(None, self.compress)

    def compress(self, state: None, bucket: GradBucket) -> Future[Tensor]:
        self.calls += 1
        return bf16_compress_hook(state, bucket)


# Kinds of DDP: the strategy, its settings, and the callbacks beside the one that prunes.
KINDS: dict[str, tuple[type[DDPStrategy], dict[str, Any], list[L.Callback]]] = {
    "plain": (DDPStrategy, {}, []),
    "find_unused": (DDPStrategy, {"find_unused_parameters": True}, []),
    "static_graph": (DDPStrategy, {"static_graph": True}, []),
    "bucket_view": (DDPStrategy, {"gradient_as_bucket_view": True}, []),
    "compressed": (Compressed, {}, []),
    "averaged": (DDPStrategy, {}, [EMAWeightAveraging(decay=0.9)]),
}
# What is trained with: the rows of the battery, and a callback whose ranks would each prune other channels.
CALLBACKS: dict[str, Callable[[], PruningCallback]] = {
    **{name: partial(battery.make_callback, name) for name in battery.CALLBACKS},
    "disagreeing": partial(Disagreeing, keep=0.5, start_epoch=1, round_to=2),
}


def train_with(name: str, nodes: int, devices: int, root: Path) -> dict[str, Any]:
    """Train with a callback, as one process does that takes twice as many images a step."""
    module = battery.network_of(name)(norm=False)
    strategy = DDPStrategy(process_group_backend="gloo")
    settings = {"precision": "64-true", "default_root_dir": root}
    return _train(module, CALLBACKS[name](), strategy, nodes, devices, **settings)


def train_kind(kind: str, nodes: int, devices: int, root: Path) -> dict[str, Any]:
    """Train under one kind of DDP."""
    make, settings, others = KINDS[kind]
    strategy = make(process_group_backend="gloo", **settings)
    module, callback = battery.ResidualClassifier(), battery.make_callback("taylor", validate_batches=2)
    result = _train(module, callback, strategy, nodes, devices, others, default_root_dir=root)
    loaded = load_pruned(battery.ResidualClassifier, callback.result_path)
    result["result"] = [Path(callback.result_path).name, battery.differences(module, loaded)]
    weights = torch.nn.utils.parameters_to_vector(module.parameters()).detach().numpy().tobytes()
    return {**result, "weights": hashlib.sha256(weights).hexdigest(), "compressed": getattr(strategy, "calls", 0)}


def interrupt(name: str, nodes: int, devices: int, root: Path) -> dict[str, Any]:
    """Press Ctrl-C on all ranks, in the middle of an epoch after a prune."""
    module, callback = battery.ResidualClassifier(), battery.make_callback("magnitude")
    strategy, place = DDPStrategy(process_group_backend="gloo"), {"default_root_dir": root}
    try:
        _train(module, callback, strategy, nodes, devices, [PressCtrlC()], **place)
    except SystemExit:
        path = callback.result_path
    loaded = load_pruned(battery.ResidualClassifier, path) if path else module
    rank = torch.distributed.get_rank()
    return {"place": [rank, 0, rank], "result": [Path(path).name, battery.differences(module, loaded)]}


def with_fabric(name: str, nodes: int, devices: int, root: Path) -> dict[str, Any]:
    """Prune in a loop of Fabric: the module inside, which is then set up again."""
    fabric = L.Fabric(
        accelerator="cpu", num_nodes=nodes, devices=devices, strategy=DDPFabric(process_group_backend="gloo")
    )
    fabric.launch()
    net = battery.ResidualClassifier()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9))
    batches = battery.loaders(rank=fabric.global_rank, ranks=2)[0]
    refused = ""
    for epoch in range(2):
        if epoch == 1:
            scores = Disagreeing().scores(fabric, graph := trace(net, torch.zeros(1, 1, 8, 8)))
            planned = fabric.broadcast(plan(graph, scores, keep=0.5, round_to=2))
            try:
                prune(model, planned, optimizers=optimizer)
            except TypeError as raised:
                refused = str(raised)
            prune(net, planned, optimizers=optimizer)
            model = fabric.setup_module(net)
        for images, labels in batches:
            optimizer.zero_grad()
            fabric.backward(torch.nn.functional.cross_entropy(model(images), labels))
            optimizer.step()
    flat = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    both = fabric.all_gather(flat)
    path = root.with_suffix(f".rank{fabric.global_rank}.pt")
    save(model, path)
    return {
        "place": [fabric.global_rank, fabric.node_rank, fabric.local_rank],
        "difference": float((both[0] - both[1]).abs().max()),
        "refused": refused,
        "widths": plan_in_force(net).widths,
        "saved": battery.differences(net, load(battery.ResidualClassifier(), path)),
    }


def _train(
    module: L.LightningModule, callback: PruningCallback, strategy: DDPStrategy, nodes: int, devices: int,
    others: Sequence[L.Callback] = (), **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    compare = Compare()
    trainer = L.Trainer(
        max_epochs=battery.EPOCHS, accelerator="cpu", num_nodes=nodes, devices=devices, strategy=strategy, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        callbacks=[callback, *others, compare], use_distributed_sampler=False, **settings,
    )  # fmt: skip
    # Each step the ranks share the 16 images that one process would take.
    trainer.fit(module, *battery.loaders(rank=trainer.global_rank, ranks=2))
    plan = plan_in_force(module)
    history = callback.history
    return {
        "metrics": [asdict(prune.metrics) for prune in history.prunes] if history is not None else [],
        "place": [trainer.global_rank, trainer.node_rank, trainer.local_rank],
        "difference": compare.difference,
        "digest": plan.digest,
        "widths": plan.widths,
    }


def main(root: Path, nodes: int, devices: int, names: Sequence[str]) -> None:
    """Train with callbacks or under kinds of DDP, and write what came of each as soon as it is known."""
    torch.set_num_threads(1)
    for name in names:
        L.seed_everything(0, verbose=False)
        others = {"interrupted": interrupt, "fabric": with_fabric}
        train = others.get(name, train_with if name in CALLBACKS else train_kind)
        result = train(name, nodes, devices, root / name)
        (root / f"{name}.rank{result['place'][0]}.json").write_text(json.dumps(result))
