"""Packs for latency tables: one network at random widths, as files that another machine times without its code.

A pack is a zip of ONNX files, without the values of weights, and a JSON that says what widths they have and which
module each of their nodes comes from.
"""

import ast
import copy
import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.export.inputs import flat_tensors, reason
from lightning_prune.export.onnx import check_installed
from lightning_prune.files import written_whole
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.entry import as_call
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.planning.profiling import random_widths
from lightning_prune.planning.tables import VERSION
from lightning_prune.progress import progress
from lightning_prune.surgery import reshape

__all__ = ["write_pack"]

_FILL = 0.01
_COSTLY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")
_SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes the modules that a node comes from


def write_pack(graph: ChannelGraph, path: str | Path, samples: int = 32) -> None:
    """Write a network at random widths into a pack.

    Args:
        graph: The traced model, of which the traced part is packed with the example inputs it was traced for.
        path: The file to write.
        samples: Number of networks of random widths, besides the original one.

    Raises:
        ValueError: If the model cannot be exported, or has nothing to prune.
        ImportError: If a package for ONNX is missing.
    """
    check_installed()
    if not graph.groups:
        raise ValueError(
            f"{type(graph.model).__name__} has no channels to prune, so that its time depends on no width."
        )
    tried = random_widths(graph, samples)
    modules: dict[str, str] = {}
    with written_whole(Path(path)) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as pack:
        with progress(f"Exporting {type(graph.model).__name__} at random widths", len(tried)) as work:
            for number, widths in enumerate(tried):
                program = _exported(graph, widths)
                modules.update(_modules_of(program.model_proto))
                program.optimize()  # as what is shipped is; it forgets which module is whose
                network = program.model_proto
                modules.update(_renamed(network, modules))
                pack.writestr(f"{number}.onnx", _without_values(network))
                work.advance()
        pack.writestr("pack.json", json.dumps(_description(graph, tried, modules)))


def _description(graph: ChannelGraph, tried: list[dict[str, int]], modules: Mapping[str, str]) -> dict[str, Any]:
    tensors = flat_tensors(as_call(graph.example_inputs))
    return {
        "version": VERSION,
        "groups": {name: group.size for name, group in graph.groups.items()},
        "samples": tried,
        "modules": dict(modules),
        "inputs": [[list(tensor.shape), str(tensor.numpy().dtype)] for tensor in tensors],
    }


@torch.no_grad()
def _exported(graph: ChannelGraph, widths: Mapping[str, int]) -> Any:
    """Return the network at some widths as it is written, in the format of ONNX; the values are without meaning."""
    trainer = getattr(graph.model, "_trainer", None)  # of a LightningModule after training; it is not copied along
    model = copy.deepcopy(graph.model, {id(trainer): None}).cpu().eval()
    reshape(model, graph.plan({name: torch.arange(width) for name, width in widths.items()}))
    for tensor in named_tensors(model).values():
        if tensor.is_floating_point():
            tensor.fill_(_FILL)
    network: nn.Module = model.get_submodule(graph.module)
    args, kwargs = as_call(graph.example_inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the insides of the exporter
        try:
            program = torch.onnx.export(network, args, kwargs=kwargs, dynamo=True, optimize=False, verbose=False)
        except torch.onnx.OnnxExporterError as raised:
            raise ValueError(f"{type(network).__name__} cannot be exported to ONNX: {reason(raised)}") from raised
    assert program is not None
    return program


def _modules_of(network: Any) -> dict[str, str]:
    """Return the module that nodes and values come from, by name.

    What is not worked out by weights (normalisation, activations, sums) counts with what it comes after: runtimes fuse
    the two, under the name of either.
    """
    modules: dict[str, str] = {}
    for node in network.graph.node:
        noted = {entry.key: entry.value for entry in node.metadata_props}
        scopes = ast.literal_eval(noted.get(_SCOPES, "['', '']"))
        module = str(scopes[-2]) if len(scopes) > 1 else ""
        if node.op_type not in _COSTLY:
            places = {name: place for place, name in enumerate(modules)}
            known = [name for name in node.input if modules.get(name)]  # constants come from none
            module = modules[max(known, key=places.__getitem__)] if known else ""
        modules.update(dict.fromkeys([node.name, *node.output], module))
    return modules


def _renamed(network: Any, modules: Mapping[str, str]) -> dict[str, str]:
    """Return the module of each node of an optimised network, whose values have the names that they had before."""
    return {node.name: modules[node.output[0]] for node in network.graph.node if node.output[0] in modules}


def _without_values(network: Any) -> bytes:
    """Return a network with the shapes of its weights alone, as bytes."""
    for tensor in network.graph.initializer:
        if tensor.data_type == 1 and len(tensor.raw_data) > 64:  # 32 bit numbers; sizes are integers
            tensor.ClearField("raw_data")
    return bytes(network.SerializeToString())
