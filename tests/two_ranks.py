"""What each of two ranks runs; started by `torch.distributed.run` from `test_battery.py`."""

import json
import sys
from pathlib import Path

import battery
import lightning as L
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune.pruning_plan import plan_in_force


class Compare(L.Callback):
    """Compare the weights of the ranks at the end of training."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        flat = torch.nn.utils.parameters_to_vector(pl_module.parameters()).detach()
        both = trainer.strategy.all_gather(flat)
        self.difference = float((both[0] - both[1]).abs().max())


def main(name: str, root: Path) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    module, compare = battery.ResidualClassifier(norm=False), Compare()
    trainer = L.Trainer(
        max_epochs=battery.EPOCHS, accelerator="cpu", devices=2, strategy="ddp", logger=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=root,
        callbacks=[battery.make_callback(name), compare], use_distributed_sampler=False, precision="64-true",
    )  # fmt: skip
    # Each step the ranks share the 16 images that one process would take; Lightning's own sampler would shuffle.
    sampler = DistributedSampler(battery.images(16 * battery.BATCHES), 2, trainer.global_rank, shuffle=False)
    trainer.fit(module, DataLoader(sampler.dataset, 8, sampler=sampler), battery.loaders()[1])
    plan = plan_in_force(module)
    result = {"difference": compare.difference, "digest": plan.digest, "widths": plan.widths}
    (root / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
