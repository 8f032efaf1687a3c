"""The rows of `criteria_finetune.py`: what each does to a network that is to be pruned."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

import lightning_prune as lp
from lightning_prune import criteria
from lightning_prune.models.cifar_resnet import PadShortcut
from lightning_prune.planning.by_layer import plan_by_layer
from lightning_prune.planning.by_time import by_score_per_cost
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.limits import Limits
from lightning_prune.planning.scores import checked_scores
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.search.policy_search import PolicySearch
from lightning_prune.search.pruning_problem import PruningProblem, accuracy_of
from lightning_prune.surgery import recalibrate

EXAMPLE = torch.zeros(1, 3, 32, 32)
COMPENSATED_BY = 4  # batches of images that rows at equal cost look at
STEPS = 8  # of the rows that prune in several
EPISODES, ROUND = 200, 10  # of the rows that search, and how many of them an agent learns from at once
NEAR = 0.1  # of the FLOPs: so close to the budget, Torch-Pruning is watched after each layer
Batches = list[tuple[Tensor, Tensor]]
Graph = lp.graph.ChannelGraph
Planned = Callable[[Graph, Batches, float], PruningPlan]
Prune = Callable[[float, list[Optimizer]], dict[str, Any]]  # to a fraction of the FLOPs; returns FLOPs and widths


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Ours:
    """Prune by a plan of this package, in one step or several; all layers, or those alone that Torch-Pruning prunes."""

    def __init__(self, planned: Planned, times: int = 1, inside_blocks: bool = False, compensate: str = "none") -> None:
        self.planned, self.times, self.inside_blocks = planned, times, inside_blocks
        self.compensate = compensate

    def begin(self, model: nn.Module, batches: Batches) -> Prune:
        """Return what prunes the model, further at each call."""
        graph = lp.trace(model.eval(), example_for(model), ignore=padded_stream(model) if self.inside_blocks else ())
        inputs = [images for images, _ in batches]  # labels are not needed

        def prune(keep: float, optimizers: list[Optimizer]) -> dict[str, Any]:
            model.eval()
            plan = self.planned(graph, batches, keep)
            lp.prune(model, plan, optimizers, self.compensate, inputs)
            return {"flops": plan.budget["achieved"], "widths": plan.widths}

        return prune


class TorchPruning:
    """Prune by the group norm of Torch-Pruning, a little at a time until the FLOPs are within the budget."""

    times, inside_blocks = 1, False

    def __init__(self, over_all_layers: bool) -> None:
        self.over_all_layers = over_all_layers

    def begin(self, model: nn.Module, batches: Batches) -> Prune:
        """Return what prunes the model, once."""
        try:
            import torch_pruning
        except ImportError:
            raise SystemExit("This row needs Torch-Pruning: pip install 'lightning-prune[benchmark]'.") from None
        norm = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        stream = [model.get_submodule(name) for name in padded_stream(model)]
        whole = [*(module for module in model.modules() if isinstance(module, nn.Linear)), *stream]
        pruner = torch_pruning.pruner.GroupNormPruner(
            model.eval(), example_for(model), norm, global_pruning=self.over_all_layers, iterative_steps=200,
            pruning_ratio=1.0, ignored_layers=whole,
        )  # fmt: skip
        original = _flops(model)

        def prune(keep: float, optimizers: list[Optimizer]) -> dict[str, Any]:
            while (left := _flops(model) / original) > keep:
                for group in pruner.step(interactive=True):
                    group.prune()
                    # A channel of every layer is a coarse step where layers are narrow.
                    if left < keep + NEAR and _flops(model) <= keep * original:
                        break
            widths = {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
            return {"flops": _flops(model) / original, "widths": widths}

        return prune


class Recalibrated:
    """Prune by another row, and estimate the statistics of batch normalisation anew."""

    inside_blocks = False

    def __init__(self, row: TorchPruning) -> None:
        self.row, self.times = row, row.times

    def begin(self, model: nn.Module, batches: Batches) -> Prune:
        """Return what prunes the model, as the row does."""
        prune = self.row.begin(model, batches)

        def with_statistics(keep: float, optimizers: list[Optimizer]) -> dict[str, Any]:
            found = prune(keep, optimizers)
            recalibrate(model, [images for images, _ in batches])
            return found

        return with_statistics


class AtEqualCost:
    """Prune by another row, once; the seconds of that, and those of a teacher, are paid for by fewer steps of training.

    Args:
        row: What prunes; it looks at few of the images.
        distilled: Whether training goes on with the whole network as the teacher.
    """

    times = 1

    def __init__(self, row: "Ours | Recalibrated", distilled: bool = False) -> None:
        self.row, self.distilled, self.inside_blocks = row, distilled, row.inside_blocks

    def begin(self, model: nn.Module, batches: Batches) -> Prune:
        """Return what prunes the model, as the row does."""
        return self.row.begin(model, batches[:COMPENSATED_BY])


@torch.no_grad()
def _flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(example_for(model))
    return counter.get_total_flops()


def example_for(model: nn.Module) -> Tensor:
    return EXAMPLE.to(next(model.parameters()).device)


def padded_stream(model: nn.Module) -> list[str]:
    """Return the layers that make the residual stream, if shortcuts pad it with zeros; else none.

    Torch-Pruning 1.6.1 removes channels of such a stream, and the network then fails.
    """
    padded = any(isinstance(module, PadShortcut) for module in model.modules())
    return [name for name, _ in model.named_modules() if name == "conv1" or name.endswith(".conv2")] if padded else []


def by_score(criterion: Any, graph: Graph, batches: Batches, keep: float) -> PruningPlan:
    return lp.plan(graph, criteria.score(graph, criterion, batches, loss_of), keep, round_to=1)


def per_flop(criterion: Any, graph: Graph, batches: Batches, keep: float) -> PruningPlan:
    """Rank by the score for each FLOP that a channel costs, as budgets of time rank by that for each millisecond."""
    scores = checked_scores(graph, criteria.score(graph, criterion, batches, loss_of))
    limits = Limits(graph, scores, round_to=1, min_channels=1)
    return by_score_per_cost(graph, scores, keep, CostModel(graph, "flops"), limits)


def at_random(graph: Graph, batches: Batches, keep: float) -> PruningPlan:
    """Draw anew for each seed of the run."""
    return by_score({"name": "random", "seed": torch.initial_seed()}, graph, batches, keep)


def searched(agent: str, graph: Graph, batches: Batches, keep: float) -> PruningPlan:
    """Take the widths that earned most in all episodes of a search; the L1 norm says which channels stay.

    Rewards are accuracies on half of the batches, with statistics of batch normalisation that follow the other half.
    """
    problem = PruningProblem(graph, keep=keep)
    search = PolicySearch(agent, steps=len(problem), episodes=ROUND, seed=torch.initial_seed())
    half = len(batches) // 2
    measure = accuracy_of(graph, batches[:half], compensate="statistics", compensate_batches=batches[half:])
    tried: list[tuple[float, PruningPlan]] = []
    for _ in range(EPISODES // ROUND):
        plans = [problem.plan(widths) for widths in search.explore(problem)]
        earned = measure(plans)
        search.learn(earned)
        tried += zip(earned.tolist(), plans, strict=True)
    return max(tried, key=lambda each: each[0])[1]


def with_a_quarter(criterion: Any, graph: Graph, batches: Batches, keep: float) -> PruningPlan:
    """Rank over all layers, with the best quarter of each layer before all others, so that none gets too narrow."""
    scores = criteria.score(graph, criterion, batches, loss_of)
    live = torch.cat([each[each.isfinite()] for each in scores.values()])
    for each in scores.values():
        each[each.topk(max(1, len(each) // 4)).indices] += 2 * (live.max() - live.min())
    return lp.plan(graph, scores, keep, round_to=1)


def by_layer(
    importance: Callable[..., dict[str, float]], criterion: Any, graph: Graph, batches: Batches, keep: float
) -> PruningPlan:
    scores = criteria.score(graph, criterion, batches, loss_of)
    return plan_by_layer(graph, importance(graph, batches), scores, keep, round_to=1)


def uniform(graph: Graph, batches: Batches) -> dict[str, float]:
    return dict.fromkeys(graph.groups, 1.0)


def entropy(graph: Graph, batches: Batches) -> dict[str, float]:
    return criteria.afie(graph)


def shapes(graph: Graph, batches: Batches) -> dict[str, float]:
    return criteria.afie_of_shapes(graph)


def sensitiveness(graph: Graph, batches: Batches) -> dict[str, float]:
    return criteria.layer_scores(criteria.sensitiveness(graph, batches))


def taylor(variant: str, **more: Any) -> dict[str, Any]:
    return {"name": "taylor", "variant": variant, **more}


A, GATE = taylor("a"), taylor("gate")
REFITTED = Ours(partial(by_score, "coherent_obs"), compensate="refit")
RIVAL, UNIFORM_RIVAL = TorchPruning(over_all_layers=True), TorchPruning(over_all_layers=False)
ROWS: dict[str, Ours | TorchPruning | Recalibrated | AtEqualCost] = {
    "random channels": Ours(at_random),
    "uniform, L1": Ours(partial(by_layer, uniform, "l1")),
    "AFIE, L1": Ours(partial(by_layer, entropy, "l1")),
    "AFIE's control (shapes alone), L1": Ours(partial(by_layer, shapes, "l1")),
    "sensitiveness, L1": Ours(partial(by_layer, sensitiveness, "l1")),
    "L1": Ours(partial(by_score, "l1")),
    "L2": Ours(partial(by_score, "l2")),
    "BatchNorm scale": Ours(partial(by_score, "batch_norm_scale")),
    "FPGM": Ours(partial(by_score, "fpgm")),
    "LAMP": Ours(partial(by_score, "lamp")),
    "group magnitude": Ours(partial(by_score, "group_magnitude")),
    "group magnitude, inside blocks": Ours(partial(by_score, "group_magnitude"), inside_blocks=True),
    "group magnitude, a quarter of each layer stays": Ours(partial(with_a_quarter, "group_magnitude")),
    "mean activation": Ours(partial(by_score, "mean_activation")),
    "APoZ": Ours(partial(by_score, "apoz")),
    "Taylor A": Ours(partial(by_score, A)),
    "Taylor A, FLOPs term 0.1": Ours(partial(by_score, taylor("a", flops_penalty=0.1))),
    "Taylor A, FLOPs term 1": Ours(partial(by_score, taylor("a", flops_penalty=1.0))),
    "Taylor B": Ours(partial(by_score, taylor("b"))),
    "Taylor C": Ours(partial(by_score, taylor("c"))),
    "Taylor gate (2019)": Ours(partial(by_score, GATE)),
    "Taylor weights, sum then square (2019)": Ours(partial(by_score, taylor("sum_then_square"))),
    "Taylor weights, square then sum (2019)": Ours(partial(by_score, taylor("square_then_sum"))),
    "oracle, absolute": Ours(partial(by_score, "oracle")),
    "Torch-Pruning, group norm": RIVAL,
    "Torch-Pruning, group norm, uniform": UNIFORM_RIVAL,
    "uniform, FPGM": Ours(partial(by_layer, uniform, "fpgm")),
    "uniform, Taylor gate": Ours(partial(by_layer, uniform, GATE)),
    "AFIE, Taylor A": Ours(partial(by_layer, entropy, A)),
    "sensitiveness, Taylor gate": Ours(partial(by_layer, sensitiveness, GATE)),
    "Taylor gate, a quarter of each layer stays": Ours(partial(with_a_quarter, GATE)),
    f"Taylor A, {STEPS} steps": Ours(partial(by_score, A), STEPS),
    f"Taylor gate, {STEPS} steps": Ours(partial(by_score, GATE), STEPS),
    f"Taylor gate, a quarter of each layer stays, {STEPS} steps": Ours(partial(with_a_quarter, GATE), STEPS),
    f"AFIE, Taylor A, {STEPS} steps": Ours(partial(by_layer, entropy, A), STEPS),
    "uniform, L1, inside blocks": Ours(partial(by_layer, uniform, "l1"), inside_blocks=True),
    "L1, inside blocks": Ours(partial(by_score, "l1"), inside_blocks=True),
    "FPGM, inside blocks": Ours(partial(by_score, "fpgm"), inside_blocks=True),
    "sensitiveness, L1, inside blocks": Ours(partial(by_layer, sensitiveness, "l1"), inside_blocks=True),
    "LAMP, inside blocks": Ours(partial(by_score, "lamp"), inside_blocks=True),
    "Taylor gate, inside blocks": Ours(partial(by_score, GATE), inside_blocks=True),
    "random search, L1": Ours(partial(searched, "random")),
    "random search, L1, inside blocks": Ours(partial(searched, "random"), inside_blocks=True),
    "PPO-CIM agent, L1": Ours(partial(searched, "ppo-cim")),
    "PPO-CIM agent, L1, inside blocks": Ours(partial(searched, "ppo-cim"), inside_blocks=True),
    "Taylor gate for each FLOP": Ours(partial(per_flop, GATE)),
    "Taylor gate for each FLOP, inside blocks": Ours(partial(per_flop, GATE), inside_blocks=True),
    "coherent OBS": Ours(partial(by_score, "coherent_obs")),
    f"Taylor gate, inside blocks, {STEPS} steps": Ours(partial(by_score, GATE), STEPS, inside_blocks=True),
    "Taylor A, refit": AtEqualCost(Ours(partial(by_score, A), compensate="refit")),
    "AFIE, L1, refit": AtEqualCost(Ours(partial(by_layer, entropy, "l1"), compensate="refit")),
    "sensitiveness, L1, refit": AtEqualCost(Ours(partial(by_layer, sensitiveness, "l1"), compensate="refit")),
    "coherent OBS, refit": AtEqualCost(REFITTED),
    "coherent OBS, refit, distilled": AtEqualCost(REFITTED, distilled=True),
    "Torch-Pruning, statistics, distilled": AtEqualCost(Recalibrated(RIVAL), distilled=True),
    "Torch-Pruning, uniform, statistics, distilled": AtEqualCost(Recalibrated(UNIFORM_RIVAL), distilled=True),
}
