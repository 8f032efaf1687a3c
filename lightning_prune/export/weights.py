"""Weights format: a plain state dict, with the plan beside it that gives the original class its shape."""

import copy
import io
import json
from pathlib import Path

import torch
from torch import nn

from lightning_prune.export.inputs import Inputs, Run, flat_tensors
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.surgery import prune, reshape

__all__ = ["write_weights"]


def write_weights(model: nn.Module, example: Inputs, path: Path) -> Run:
    """Write the state dict of a model and its plan, and load them onto a copy of the model in its original shape.

    Args:
        model: The model, in evaluation mode on the CPU.
        example: Not needed here.
        path: The file for the state dict; the plan goes into one of the same name that ends in ``.json``.

    Returns:
        What runs the copy.
    """
    plan_path = path.with_suffix(".json")
    plan = plan_in_force(model) or PruningPlan()
    content = io.BytesIO()  # what torch writes to a full disk by itself is an error without a reason
    torch.save(dict(model.state_dict()), content)
    path.write_bytes(content.getbuffer())
    plan_path.write_text(json.dumps(plan.to_json()))

    loaded = copy.deepcopy(model)
    reshape(loaded, None)
    content = json.loads(plan_path.read_text())
    prune(loaded, PruningPlan.from_json(content))
    loaded.load_state_dict(torch.load(path, weights_only=True))
    return lambda inputs: flat_tensors(loaded(*inputs[0], **inputs[1]))
