"""Latency tables: packed here, timed without the network's code or Lightning, and used for a budget here."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import battery
import numpy as np
import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune import planning
from lightning_prune.callbacks import PruningCallback
from lightning_prune.export.entry import export
from lightning_prune.export.latency_pack import write_pack
from lightning_prune.export.latency_table import _module_of
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning.tables import TABLE, table_of
from lightning_prune.pruning_plan import plan_in_force

SAMPLES = 2


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return lp.trace(battery.ResidualClassifier().eval(), torch.zeros(1, 1, 8, 8))


def made_up(graph: ChannelGraph, samples: int = 32) -> dict[str, Any]:
    """Return a table of a machine on which `first` takes 1 µs for each product of widths, and the norm 10 a channel."""
    tried = planning.profiling.random_widths(graph, samples)
    times = [
        {"stem": 0.001, "first": each["stem"] * each["first"] / 1000, "relu": 0.0, "norm": each["first"] / 100}
        for each in tried
    ]
    groups = {name: group.size for name, group in graph.groups.items()}
    return {"version": 1, "runtime": "none", "machine": [], "groups": groups, "samples": tried, "times": times}


@pytest.mark.long
def test_a_pack_is_timed_by_a_process_that_has_neither_the_code_nor_lightning(
    graph: ChannelGraph, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    pack = tmp_path / "pack.zip"
    write_pack(graph, pack, SAMPLES)
    assert pack.stat().st_size < 200_000
    with zipfile.ZipFile(pack) as files:
        assert sorted(files.namelist()) == ["0.onnx", "1.onnx", "2.onnx", "pack.json"]
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] in ('lightning', 'pytorch_lightning', 'battery', 'jsonargparse'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from lightning_prune.cli.entry import main\n"
        "main(['profile', 'pack.zip', '--runs', '2'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(lp.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "table.json").write_text(done.stdout)
    table = planning.read_table(tmp_path / "table.json")
    assert table.runtime.startswith("onnxruntime ")
    assert len(table.times) == SAMPLES + 1
    assert all({"stem", "first", "second", "head"} <= times.keys() for times in table.times)
    planning.use_table(graph, table)
    assert planning.CostModel(graph, TABLE).original == pytest.approx(sum(table.times[0].values()), rel=0.5)


def test_a_pack_holds_what_is_shipped(tmp_path: Path) -> None:
    """Activations that the exporter spells out would be timed as they are written, at twice the time of the network."""
    onnx = pytest.importorskip("onnx")
    model = nn.Sequential()
    for name, channels in (("first", 1), ("second", 8)):
        model.add_module(name, nn.Conv2d(channels, 8, 3))
        model.add_module(f"norm of {name}", nn.BatchNorm2d(8))
        model.add_module(f"act of {name}", nn.ReLU6())
    graph = lp.trace(model.eval(), torch.zeros(1, 1, 8, 8))
    write_pack(graph, tmp_path / "pack.zip", samples=0)
    export(model, torch.zeros(2, 1, 8, 8), tmp_path / "shipped.onnx")
    with zipfile.ZipFile(tmp_path / "pack.zip") as files:
        packed = onnx.load_from_string(files.read("0.onnx"))
        modules = json.loads(files.read("pack.json"))["modules"]
    shipped = onnx.load(tmp_path / "shipped.onnx")
    kinds = [node.op_type for node in packed.graph.node]
    assert kinds == [node.op_type for node in shipped.graph.node] == ["Conv", "Clip", "Conv", "Clip"]
    for known in ([node.name for node in packed.graph.node], [node.output[0] for node in packed.graph.node]):
        assert [modules[name] for name in known] == ["first", "first", "second", "second"]


def test_times_are_fitted_and_budgets_go_by_them(graph: ChannelGraph) -> None:
    planning.use_table(graph, table_of(made_up(graph)))
    cost = planning.CostModel(graph, TABLE)
    generator = np.random.default_rng(1)
    for _ in range(20):
        stem, first = int(generator.integers(2, 13)), int(generator.integers(2, 25))
        expected = 0.001 + stem * first / 1000 + first / 100
        assert cost({"stem": stem, "first": first}) == pytest.approx(expected, rel=1e-6)
    plan = lp.plan(graph, lp.criteria.l1(graph), keep=0.5, metric=TABLE, round_to=2)
    whole = 0.001 + 12 * 24 / 1000 + 24 / 100
    taken = 0.001 + plan.widths["stem"] * plan.widths["first"] / 1000 + plan.widths["first"] / 100
    assert 0.4 < taken / whole <= 0.5
    assert plan.budget["achieved"] == pytest.approx(taken / whole, rel=1e-6)


def test_a_callback_prunes_to_the_time_of_another_machine(graph: ChannelGraph, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(made_up(graph)))
    callback = PruningCallback(
        metric="latency", runtime=str(path), keep=0.5, round_to=2, criterion="l1", compensate="none"
    )
    module, _ = battery.train(tmp_path, callback, max_epochs=2)
    widths = plan_in_force(module).widths
    taken = 0.001 + widths["stem"] * widths["first"] / 1000 + widths["first"] / 100
    assert taken <= 0.5 * (0.001 + 12 * 24 / 1000 + 24 / 100)


def test_wrong_tables_are_refused(graph: ChannelGraph, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runtime must be 'torch', 'onnxruntime', or the path of a table"):
        PruningCallback(metric="latency", runtime="tensorrt")
    with pytest.raises(ValueError, match="is about metric='latency'; got metric='flops'"):
        PruningCallback(runtime="onnxruntime")
    with pytest.raises(FileNotFoundError, match="There is no latency table at"):
        planning.read_table(tmp_path / "table.json")
    for content in ("hello", "{}", json.dumps({**made_up(graph, 1), "times": []})):
        (tmp_path / "table.json").write_text(content)
        with pytest.raises(ValueError, match="is no latency table, as `lightning-prune profile` prints it"):
            planning.read_table(tmp_path / "table.json")
    other = lp.trace(battery.ResidualClassifier(16).eval(), torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"about another network than ResidualClassifier: its groups are .*\(12\)"):
        planning.use_table(other, table_of(made_up(graph, 1)))
    bare = lp.trace(battery.ResidualClassifier().eval(), torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="A budget by a latency table needs one"):
        lp.plan(bare, lp.criteria.l1(bare), keep=0.5, metric=TABLE)


def test_what_is_fused_is_found_under_the_name_that_it_has() -> None:
    modules = {"node_conv2d": "stem", "conv2d": "stem", "relu": "stem", "node_conv2d_1": "first", "relu_1": "first"}
    assert _module_of("fused node_conv2d_1_kernel_time", modules, "") == "first"
    assert _module_of("relu_nchwc_kernel_time", modules, "") == "stem"
    assert _module_of("relu_1_nchwc_kernel_time", modules, "") == "first"
    assert _module_of("ReorderOutput_kernel_time", modules, "first") == "first"
