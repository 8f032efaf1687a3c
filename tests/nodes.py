"""What each rank runs under several kinds of DDP; started by torchrun from `test_trainer_features.py`."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import battery
import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.futures import Future
from torch.utils.data import DataLoader, DistributedSampler
from two_ranks import Compare

from lightning_prune.pruning_plan import plan_in_force


class Compressed(DDPStrategy):
    """Sends half as many bits; Lightning itself registers hooks on GPUs alone."""

    calls = 0

    def _register_ddp_hooks(self) -> None:
        self.model.register_comm_hook(None, self.compress)

    def compress(self, state: None, bucket: GradBucket) -> Future[Tensor]:
        self.calls += 1
        return bf16_compress_hook(state, bucket)


KINDS: dict[str, tuple[type[DDPStrategy], dict[str, Any], list[L.Callback]]] = {
    "plain": (DDPStrategy, {}, []),
    "find_unused": (DDPStrategy, {"find_unused_parameters": True}, []),
    "static_graph": (DDPStrategy, {"static_graph": True}, []),
    "bucket_view": (DDPStrategy, {"gradient_as_bucket_view": True}, []),
    "compressed": (Compressed, {}, []),
    "averaged": (DDPStrategy, {}, [EMAWeightAveraging(decay=0.9)]),
}


def train(root: Path, nodes: int, devices: int, kind: str) -> tuple[L.Trainer, dict[str, Any]]:
    made, settings, callbacks = KINDS[kind]
    strategy = made(process_group_backend="gloo", **settings)
    L.seed_everything(0, verbose=False)
    module, compare = battery.ResidualClassifier(), Compare()
    trainer = L.Trainer(
        max_epochs=battery.EPOCHS, accelerator="cpu", num_nodes=nodes, devices=devices, strategy=strategy, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=root,
        callbacks=[battery.make_callback("taylor"), *callbacks, compare], use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    sampler = DistributedSampler(battery.images(16 * battery.BATCHES), 2, trainer.global_rank, shuffle=False)
    trainer.fit(module, DataLoader(sampler.dataset, 8, sampler=sampler))
    weights = torch.nn.utils.parameters_to_vector(module.parameters()).detach().numpy().tobytes()
    return trainer, {
        "difference": compare.difference,
        "digest": plan_in_force(module).digest,
        "weights": hashlib.sha256(weights).hexdigest(),
        "compressed": getattr(strategy, "calls", 0),
    }


def main(root: Path, nodes: int, devices: int, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for kind in kinds:
        trainer, result[kind] = train(root, nodes, devices, kind)
    result["place"] = [trainer.global_rank, trainer.node_rank, trainer.local_rank]
    (root / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
