"""Twins of a model that share tensors, and the state that they run in."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lightning_prune.compiled import as_written
from lightning_prune.graph.adapting import adapt
from lightning_prune.graph.attention import free
from lightning_prune.graph.neutral import preserving_random_state, unfused_attention
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.graph.twin import Twin, set_mode
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["bring_in_step", "shared_twin", "stand_ins", "undisturbed"]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run twins of a model without gradients, as written and in plain operators; give the random state back.

    Args:
        model: The model.
    """
    with ExitStack() as stack:
        for state in (torch.inference_mode(False), torch.no_grad(), preserving_random_state(model), as_written()):
            stack.enter_context(state)
        stack.enter_context(unfused_attention())
        yield


def shared_twin(model: nn.Module, tensors: Mapping[str, Tensor], plan: PruningPlan | None = None) -> nn.Module:
    """Return a twin of a model in evaluation mode that works with given tensors.

    Args:
        model: The model.
        tensors: What the twin has in place of each parameter and buffer, by name; these are not copied.
        plan: What is kept of the original model, if the tensors are those of the pruned one.
    """
    replaced = {id(tensor): tensors[name] for name, tensor in named_tensors(model).items()}
    twin = Twin(model, replaced).model
    bring_in_step(twin, plan)
    set_mode(twin, training=False)
    return twin


def bring_in_step(twin: nn.Module, plan: PruningPlan | None) -> None:
    """Let a twin run with the tensors of a plan, and show its layers.

    Multi-head attention runs its projections one by one then, so that they are seen as the linear layers that they are.

    Args:
        twin: The twin.
        plan: What is kept of the original model; None if its tensors are those of the model that it is a twin of.
    """
    if plan is not None:
        adapt(twin, plan)
    for module in twin.modules():
        free(module)


def stand_ins(model: nn.Module, smaller: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a pruned model that can be written to, by name.

    Args:
        model: The model.
        smaller: The tensors that are not those of the model.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        made[name] = smaller[name] if name in smaller else tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            made[name] = nn.Parameter(made[name], requires_grad=False)
    return made
