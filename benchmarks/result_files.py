"""Read the files of results: each as figures by setting, row and column, with a value for each seed."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import stored

RESULTS = Path(__file__).parent / "results"
Values = dict[str, float]  # by seed
Figures = dict[str, dict[str, dict[str, Values]]]  # by setting, row and column
Entry = tuple[str, str, str, str, float]  # setting, row, column, seed, value


def by_key(content: Any, columns: Mapping[str, str]) -> Iterator[Entry]:
    """Read records whose keys are ``setting | row | seed``.

    Args:
        content: The records.
        columns: By the name of what a record holds, the column that it is shown in. A column that ends on ``(%)`` is
            for fractions.
    """
    for key, record in content.items():
        setting, row, seed = key.split(" | ")
        for name, column in columns.items():
            if name in record:
                yield setting, row, column, seed, record[name] * (100 if column.endswith("(%)") else 1)


def oracle_correlation(content: Any) -> Iterator[Entry]:
    for network, seeds in content.items():
        for seed, rows in seeds.items():
            for row, columns in rows.items():
                if row not in ("accuracy", "made"):
                    for column, value in columns.items():
                        yield network, row, column, seed, value


def afie_epochs(content: Any) -> Iterator[Entry]:
    for key, record in content.items():
        setting, seed = key.rsplit("; seed ", 1)
        for row, result in record.items():
            if row != "made":
                yield setting, row, "accuracy (%)", seed, 100 * result["accuracy"]
        for name, value in record.get("unpruned", {}).items():
            if name.endswith(" against last"):
                yield setting, name.removesuffix(" against last"), "order against last", seed, value


def sensitiveness_order(content: Any) -> Iterator[Entry]:
    for network, seeds in content.items():
        for seed, record in seeds.items():
            for row, result in record.items():
                if isinstance(result, dict) and "order" in result:
                    yield network, row, "order, early against last", seed, result["order"]
            for row, result in record.get("pruned", {}).items():
                yield network, row, "accuracy (%)", seed, 100 * result["accuracy"]


def agents_vs_sb3(content: Any) -> Iterator[Entry]:
    """Read what each agent reached, and ours beside that of Stable-Baselines3, seed by seed."""
    found = {(row["env"], row["steps"], row["agent"], row["seed"]): row for row in content}
    for (env, steps, agent, seed), row in found.items():
        entry = f"{env}, {steps:,} steps", agent
        yield *entry, "return", str(seed), row["return"]
        yield *entry, "steps per second", str(seed), row["steps_per_second"]
        peer = found.get((env, steps, "sb3-sac" if agent == "sac" else "sb3-ppo", seed))
        if peer and not agent.startswith("sb3"):
            ahead = 100 * (row["return"] - peer["return"]) / abs(peer["return"])
            yield *entry, "return above peer's, % of it", str(seed), ahead
            yield *entry, "steps per second / peer's", str(seed), row["steps_per_second"] / peer["steps_per_second"]


def agents_vs_random_search(content: Any) -> Iterator[Entry]:
    setting = f"ResNet-20, {content['settings']['episodes']} episodes, keep {content['settings']['keep']}"
    for key, rewards in content["rewards"].items():
        agent, seed = key.split("/")
        last = rewards[-max(1, round(len(rewards) / 5)) :]
        yield setting, agent, "best reward (%)", seed, 100 * max(rewards)
        yield setting, agent, "mean reward of the last fifth (%)", seed, 100 * statistics.fmean(last)


def compensation(content: Any) -> Iterator[Entry]:
    """Read what is left right after a prune, also against the whole network, and what the prune takes."""
    whole = {}
    for key, record in content.items():
        setting, row, seed = key.split(" | ")
        if row == "not pruned":
            whole[setting, seed] = record["accuracy"]
    for key, record in content.items():
        setting, row, seed = key.split(" | ")
        yield setting, row, "right after (%)", seed, 100 * record["accuracy"]
        yield setting, row, "FLOPs kept (%)", seed, 100 * record["flops"]
        before = whole.get((setting.partition(", keep ")[0], seed))
        if record["seconds"]:
            seconds = sum(record["seconds"].values())
            yield setting, row, "seconds of a core", seed, seconds
            yield setting, row, "seconds left of 60", seed, 60 - seconds
            if before is not None:
                yield setting, row, "against the whole network", seed, 100 * (record["accuracy"] - before)


def compensation_cost(content: Any) -> Iterator[Entry]:
    """Read what compensation takes, and how much less than 90 seconds that is."""
    for key, record in content.items():
        setting, row, seed = key.split(" | ")
        yield setting, row, "error of the logits", seed, record["error"]
        yield setting, row, "seconds of a core", seed, record["seconds"]
        yield setting, row, "seconds left of 90", seed, 90 - record["seconds"]
        yield setting, row, "MiB beyond the network", seed, record["mib"]


def latency_budget(content: Any) -> Iterator[Entry]:
    """Read as repeats, which seeds are elsewhere: networks with their batch size; rounds at half the FLOPs."""
    for key, result in content.items():
        network, batch, _ = key.split(" | ")
        if "asked" in result:
            entry, repeat = ("all networks and batch sizes", f"{result['asked']}x asked"), f"{network}, batch {batch}"
            yield *entry, "reached / asked", repeat, result["reached"] / result["asked"]
            yield *entry, "score kept / that by FLOPs", repeat, result["kept score"]
            if "kept score by ranking alone" in result:
                yield *entry, "the same by ranking alone", repeat, result["kept score by ranking alone"]
            yield *entry, "reached by FLOPs / reached", repeat, result["other speed-up"] / result["reached"]
        else:
            for number, ratio in enumerate(result.get("rounds", [result["reached"]])):  # earlier rows have the median
                yield f"half the FLOPs, batch {batch}", network, "speed-up", str(number), ratio


READERS: dict[str, Callable[[Any], Iterator[Entry]]] = {
    f"{reader.__name__}.json": reader
    for reader in (
        oracle_correlation, afie_epochs, sensitiveness_order, agents_vs_sb3, agents_vs_random_search, latency_budget,
        compensation, compensation_cost,
    )
}  # fmt: skip


def read(name: str, about: Mapping[str, Any], folder: Path = RESULTS) -> Figures:
    """Return what a file holds; nothing if it is not there.

    Args:
        name: The file.
        about: What ``claims.yaml`` says of it; with ``columns`` for `by_key`, if it has no reader of its own.
        folder: Where it lies.
    """
    content = stored.load(folder / name)
    figures: Figures = {}
    if content:
        entries = by_key(content, about["columns"]) if "columns" in about else READERS[name](content)
        for setting, row, column, seed, value in entries:
            figures.setdefault(setting, {}).setdefault(row, {}).setdefault(column, {})[seed] = value
    return figures


def hardware_of(name: str, about: Mapping[str, Any], folder: Path = RESULTS) -> str:
    """Return what a file was made on; of records that do not say so, what ``claims.yaml`` says."""
    known = sorted({made["hardware"] for made in stored.records_of(stored.load(folder / name))})
    return "; ".join([*known, *([about["hardware"]] if "hardware" in about else [])]) or "-"
