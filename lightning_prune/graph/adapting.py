"""Adapting: the numbers that modules compute shapes with are brought in step with what is kept of groups."""

from collections.abc import Mapping

from torch import nn

from lightning_prune.graph.caches import empty_caches
from lightning_prune.graph.resized import leave, resize
from lightning_prune.graph.sizes import sync_attributes
from lightning_prune.pruning_plan import Adaptation, Count, PruningPlan, Shares

__all__ = ["adapt", "adapt_to"]


def adapt(model: nn.Module, plan: PruningPlan, earlier: PruningPlan | None = None, module: str = "") -> None:
    """Bring the numbers that modules of a model compute shapes with in step with a plan, and empty what they cache.

    Args:
        model: The model, or a twin of it.
        plan: What is kept of the original model.
        earlier: What was in force before, to go back from where the plan says nothing.
        module: Dotted name of a submodule, of which ``model`` is a twin.
    """
    adaptations = dict(plan.adaptations)
    if earlier is not None:
        adaptations = {**earlier.adaptations, **adaptations}
    if module:
        inside = {name: one for name, one in adaptations.items() if f"{name}.".startswith(f"{module}.")}
        adaptations = {name[len(module) + 1 :]: one for name, one in inside.items()}
    if adaptations:
        adapt_to(model, adaptations, plan.shares)
    empty_caches(model)


def adapt_to(model: nn.Module, adaptations: Mapping[str, Adaptation], shares: Shares) -> None:
    """Bring numbers in step with the shares of channels that are kept.

    Args:
        model: The model, or a twin of it.
        adaptations: What follows the channels, by name of the module.
        shares: How much of the channels of each group is kept.
    """
    for name, adaptation in adaptations.items():
        module = model.get_submodule(name)
        for attribute, count in adaptation.numbers:
            _set(module, attribute, count, shares)
        absence = adaptation.absence
        if absence is not None and not shares.get(absence.block, 1):
            leave(module, absence, shares)
            continue
        resize(module, adaptation.sites, shares)
        sync_attributes(module)


def _set(module: nn.Module, attribute: str, count: Count, shares: Shares) -> None:
    """Set an attribute, or one entry of a list or tuple."""
    name, _, entry = attribute.partition(".")
    number = count.now(shares)
    if not entry:
        setattr(module, name, number)
        return
    entries = getattr(module, name)
    changed = [*entries]
    changed[int(entry)] = number
    setattr(module, name, type(entries)(changed))
