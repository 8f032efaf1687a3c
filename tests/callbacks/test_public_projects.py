"""Small stand-ins of what public projects do beside a plain training step; `benchmarks/projects/` has the real ones."""

import copy
import itertools
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback, TaylorRankCallback
from lightning_prune.pruning_plan import plan_in_force

EPOCHS, BATCH, KEEP = 3, 4, 0.6


def signal(number: int, length: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(2, length, generator=generator)


def encoder(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, behind in itertools.pairwise(widths):
        layers += [nn.Conv1d(before, behind, 3, padding=1), nn.BatchNorm1d(behind), nn.ReLU()]
    return nn.Sequential(*layers)


class Project(L.LightningModule):
    """What all of them have."""

    def sample(self, number: int) -> Any:
        return signal(number), number % 4

    def collate(self, samples: list[Any]) -> Any:
        return torch.utils.data.default_collate(samples)

    def loader(self) -> DataLoader:
        return DataLoader([self.sample(number) for number in range(8)], BATCH, collate_fn=self.collate)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)


class SelfDistilled(Project):
    """A student says of small views what its teacher, which follows it, says of large ones, less a running centre."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(encoder(2, 12, 16), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 8))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(8))

    def sample(self, number: int) -> Any:
        return [signal(number), signal(number + 50), signal(number + 99, 8)], number % 4, "name"

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.student(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for follower, followed in ((self.teacher, self.student), (self.teacher_head, self.head)):
            for p, q in zip(follower.parameters(), followed.parameters(), strict=True):
                p.data.mul_(0.9).add_(q.data, alpha=0.1)
        views, *_ = batch
        with torch.no_grad():
            told = torch.cat([self.teacher_head(self.teacher(view)) for view in views[:2]])
        said = torch.stack([self(view).log_softmax(-1) for view in views])
        wanted = (told - self.centre).softmax(-1).view(2, len(views[0]), -1)
        self.centre = 0.9 * self.centre + 0.1 * told.mean(0)
        return -(wanted[:, None] * said[None]).sum(-1).mean()


class Sliding(Project):
    """Trains on short pieces, and puts what it says of windows together to validate."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(encoder(2, 12, 16), nn.Conv1d(16, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0][..., :8]).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        long = torch.cat([batch[0], batch[0].flip(-1)], -1)
        together = torch.zeros(len(long), 3, long.shape[-1])
        for start in range(0, long.shape[-1] - 7, 4):
            together[..., start : start + 8] += self(long[..., start : start + 8])
        self.log("val_loss", together.pow(2).mean())


class Backcasting(Project):
    """Blocks that say a series again by a basis, in turn of what the ones before left over."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12)) for _ in range(2))
        self.register_buffer("backward_basis", torch.randn(12, 16) / 4)
        self.register_buffer("forward_basis", torch.randn(12, 4) / 4)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        left, foretold = x["encoder"].mean(1), x["scale"].new_zeros(len(x["scale"]), 4)
        for block in self.blocks:
            theta = block(left)
            left = left - theta.mm(self.backward_basis)
            foretold = foretold + theta.mm(self.forward_basis)
        return {"prediction": foretold * x["scale"], "left": left}

    def sample(self, number: int) -> Any:
        return {"encoder": signal(number), "scale": torch.ones(1), "groups": f"s{number}"}, signal(number, 4).mean(0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x)
        return F.l1_loss(out["prediction"], y) + out["left"].abs().mean()


class Compared(Project):
    """A student's features, two layers of them, are to be those of a teacher, each of length one."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.ModuleList([encoder(2, 12, 8), encoder(8, 20, 16)]).requires_grad_(False).eval()
        self.student = nn.ModuleList([encoder(2, 12, 8), encoder(8, 20, 16)])

    def features(self, network: nn.ModuleList, x: Tensor) -> list[Tensor]:
        found = []
        for stage in network:
            x = stage(x)
            found.append(F.normalize(x, dim=1))
        return found

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.features(self.teacher, x), self.features(self.student, x), strict=True)
        return torch.stack([(one - other).pow(2).sum(1) for one, other in pairs]).prod(0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            taught = self.features(self.teacher, batch[0])
        pairs = zip(taught, self.features(self.student, batch[0]), strict=True)
        return sum(0.5 * F.mse_loss(one, other) for one, other in pairs)


class Boxes(Project):
    """Lists of pictures and of targets, losses by name in training and boxes by name otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.body = encoder(2, 12, 16)
        self.scores, self.boxes = nn.Conv1d(16, 3, 1), nn.Conv1d(16, 2, 1)

    def collate(self, samples: list[Any]) -> Any:
        return [x for x, _ in samples], [{"label": torch.tensor([y % 3])} for _, y in samples]

    def forward(self, pictures: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        features = self.body(torch.stack(pictures))
        scores, boxes = self.scores(features), self.boxes(features)
        if targets is None:
            return [{"scores": score.softmax(0), "boxes": box} for score, box in zip(scores, boxes, strict=True)]
        labels = torch.cat([target["label"] for target in targets])
        return {"class": F.cross_entropy(scores.mean(-1), labels), "box": boxes.abs().mean()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(self(*batch).values())


class Gated(Project):
    """A recurrent encoder and a decoder that goes on from its state, gates, and quantiles that come out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 12)
        self.encode, self.decode = (nn.LSTM(12, 16, batch_first=True) for _ in range(2))
        self.rows = nn.Linear(2, 12)
        self.gate, self.norm, self.out = nn.Linear(16, 32), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        known = self.rows(x["rows"].transpose(1, 2)) + self.embed(x["series"])[:, None]
        _, state = self.encode(known[:, :12])
        foretold, _ = self.decode(known[:, 12:], state)
        return self.out(self.norm(F.glu(self.gate(foretold)) + foretold))

    def sample(self, number: int) -> Any:
        return {"rows": signal(number), "series": torch.tensor(number), "lengths": 12}, signal(number, 4).mean(0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        wanted, quantiles = batch[1][..., None], torch.tensor([0.1, 0.5, 0.9])
        over = wanted - self(batch[0])
        return torch.maximum(quantiles * over, (quantiles - 1) * over).mean()


PROJECTS = [SelfDistilled, Sliding, Backcasting, Compared, Boxes, Gated]
ROWS: dict[str, Any] = {
    "default": lambda: PruningCallback(keep=KEEP, round_to=1),
    "taylor": lambda: TaylorRankCallback(keep=KEEP, round_to=1),
    "magnitude": lambda: PruningCallback(keep=KEEP, round_to=1, criterion="magnitude", compensate="none"),
}


class Watch(L.Callback):
    """Note which parameters the last epoch changes."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = {name: tensor.detach().clone() for name, tensor in pl_module.named_parameters()}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = pl_module.named_parameters()
        self.same = {name for name, tensor in now if tensor.requires_grad and torch.equal(tensor, self.before[name])}


def fit(root: Path, module: Project, *callbacks: L.Callback, path: Any = None, **trainer: Any) -> ModelCheckpoint:
    saver = ModelCheckpoint(root, save_last=True)
    runner = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
        callbacks=[*callbacks, saver], **trainer,
    )  # fmt: skip
    runner.fit(module, module.loader(), module.loader(), ckpt_path=path)
    return saver


pytestmark = pytest.mark.filterwarnings("ignore:.*of the flops is kept", "ignore:Prune . of .")
KINDS = pytest.mark.parametrize("kind", PROJECTS, ids=lambda kind: kind.__name__)


@KINDS
def test_a_trial_run_prunes_to_the_budget(kind: type[Project], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = kind()
    fit(tmp_path, module, ROWS["default"](), fast_dev_run=2)
    assert plan_in_force(module).budget["achieved"] <= KEEP


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS)
@KINDS
def test_nothing_is_changed_but_the_callback(kind: type[Project], row: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback, watch = kind(), ROWS[row](), Watch()
    if kind is Gated and row == "taylor":  # which no criterion that watches layers can see into
        with pytest.raises(ValueError, match=r"cannot watch what 'encode' \(LSTM\) consumes .* add 'embed' to ignore"):
            fit(tmp_path, module, callback, watch, max_epochs=EPOCHS)
        return
    saver = fit(tmp_path, module, callback, watch, max_epochs=EPOCHS)
    plan = plan_in_force(module)
    assert plan.budget["achieved"] <= KEEP
    assert watch.same == set()
    for path in (saver.best_model_path, saver.last_model_path, callback.result_path):
        assert battery.differences(module, lp.load_pruned(kind, path)) == []
    fit(tmp_path / "on", again := kind(), ROWS[row](), path=saver.last_model_path, max_epochs=EPOCHS + 1)
    assert plan_in_force(again) == plan
