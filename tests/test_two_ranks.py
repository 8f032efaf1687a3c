"""Two ranks of one training: every callback, every kind of DDP, and two nodes."""

from dataclasses import asdict
from pathlib import Path

import battery
import pytest
from processes import of_both_ranks, srun, torchrun
from two_ranks import CALLBACKS, KINDS, main

from lightning_prune.pruning_plan import plan_in_force

pytestmark = pytest.mark.filterwarnings("ignore:Prune . of .")  # prunes nothing, in steps of two channels


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what two ranks, started once, have written about every callback and every kind of DDP."""
    root = tmp_path_factory.mktemp("two_ranks")
    try:
        torchrun(main, root, 1, *KINDS, *CALLBACKS, "interrupted", "fabric")
    except AssertionError as error:  # what was written before that is still of use
        (root / "error.txt").write_text(str(error))
    return root


@pytest.mark.parametrize("name", CALLBACKS)
def test_two_ranks_agree_to_the_last_bit(name: str, two_ranks: Path, tmp_path: Path) -> None:
    ranks = of_both_ranks(two_ranks, name)
    assert ranks[0]["difference"] == ranks[1]["difference"] == 0.0
    assert ranks[0]["digest"] == ranks[1]["digest"]
    # The same data in one process, in float64: without batch normalisation it sums the same gradients.
    plain, callback = battery.network_of(name)(norm=False), CALLBACKS[name]()
    alone, _ = battery.train(tmp_path / "alone", callback, module=plain, precision="64-true")
    assert ranks[0]["widths"] == plan_in_force(alone).widths
    assert ranks[0]["digest"] == plan_in_force(alone).digest
    assert ranks[0]["metrics"] == [asdict(prune.metrics) for prune in callback.history.prunes]


def test_every_kind_of_ddp_agrees(two_ranks: Path) -> None:
    """Those kinds that sum the same numbers end in the same bits."""
    same, others = ("plain", "find_unused", "static_graph", "bucket_view"), ("compressed", "averaged")
    ranks = {kind: of_both_ranks(two_ranks, kind) for kind in (*same, *others)}
    first, second = ({kind: results[rank] for kind, results in ranks.items()} for rank in range(2))
    assert all(len(result.pop("metrics")) == 3 for result in first.values())  # the first rank has the history
    assert all(result.pop("metrics") == [] for result in second.values())
    assert {tuple(result.pop("place")) for result in first.values()} == {(0, 0, 0)}  # global rank, node, local rank
    assert {tuple(result.pop("place")) for result in second.values()} == {(1, 0, 1)}
    assert first == second
    assert {result["difference"] for result in first.values()} == {0.0}
    assert all(result["result"] == ["pruned.ckpt", []] for result in first.values())
    assert all(first[kind] == first["plain"] for kind in same)
    assert len({first[kind]["weights"] for kind in ("plain", *others)}) == 3
    assert first["compressed"]["compressed"] >= battery.EPOCHS * battery.BATCHES  # after each prune too


def test_the_first_rank_saves_what_an_interrupted_run_has_come_to(two_ranks: Path) -> None:
    first, second = of_both_ranks(two_ranks, "interrupted")
    assert first["result"] == ["pruned.ckpt", []]
    assert second["result"][0] == ""


def test_a_loop_of_fabric(two_ranks: Path) -> None:
    first, second = of_both_ranks(two_ranks, "fabric")
    assert first["difference"] == second["difference"] == 0.0
    assert first["widths"] == second["widths"]
    for rank in (first, second):
        assert rank["refused"].startswith(
            "'_forward_module' of _FabricModule is a DistributedDataParallel, which knows"
        )
        assert rank["saved"] == []


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_nodes_equal_one_node_with_two_ranks(launcher: str, two_ranks: Path, tmp_path: Path) -> None:
    if launcher == "torchrun":
        torchrun(main, tmp_path, 2, "plain")
    else:
        srun(main, tmp_path, "plain")
    nodes, one = of_both_ranks(tmp_path, "plain"), of_both_ranks(two_ranks, "plain")
    assert [rank.pop("place") for rank in nodes] == [[0, 0, 0], [1, 1, 0]]
    assert [rank.pop("place") for rank in one] == [[0, 0, 0], [1, 0, 1]]
    assert nodes == one
