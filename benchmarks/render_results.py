"""Render docs/results.md: each claim of the papers beside our figure, and the tables that the figures come from.

What is claimed, by which command it is checked and what would bear it out stands in ``claims.yaml``; every figure comes
from the files in ``results``. Nothing of the page is typed in by hand::

    python benchmarks/render_results.py [--check]

``--check`` writes nothing, and fails if the page is not what the files give.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
CLAIMS, RESULTS, PAGE = HERE / "claims.yaml", HERE / "results", HERE.parent / "docs" / "results.md"
MIN_SEEDS = 3  # with fewer, nothing is said of a claim
METHODS = {
    "taylor": "Taylor",
    "afie": "AFIE",
    "sensitiveness": "Sensitiveness",
    "rl_joint": "Joint training and pruning",
    "learn_to_prune": "Learn to prune",
    "agents": "Agents",
    "latency": "Latency budgets",
    "best": "Our best at half the FLOPs",
}
Values = dict[str, float]  # by seed
Figures = dict[str, dict[str, dict[str, Values]]]  # by setting, row and column
Entry = tuple[str, str, str, str, float]  # setting, row, column, seed, value

INTRO = f"""<!-- Written by benchmarks/render_results.py; do not edit. -->

# Results

What the papers claim, and what we measured. Each row names the command that gives its figure, and each figure is
computed from a file in `benchmarks/results`; the [tables](#tables) show those files whole. CIFAR-10 is a copy of it in
JPEG files, so that absolute accuracies are not those of the original images. Networks are small and schedules short:
a row checks the idea at that scale, and does not repeat the experiment of the paper.

A figure is a mean ± standard deviation over seeds. A lead is taken seed by seed. A part of a claim is **met** if its
mean less the standard deviation is above the goal. A claim **holds** if all its parts are met, **holds partly** if some
are, and **does not hold** if none is. With fewer than {MIN_SEEDS} seeds a part is shown and not judged.
"""


def oracle_correlation(content: Any) -> Iterator[Entry]:
    for network, seeds in content.items():
        for seed, rows in seeds.items():
            for row, columns in rows.items():
                for column, value in columns.items() if isinstance(columns, dict) else ():
                    yield network, row, column, seed, value


def criteria_finetune(content: Any) -> Iterator[Entry]:
    columns = {"accuracy": "fine-tuned (%)", "pruned": "when pruned (%)"}
    for key, result in content.items():
        network, row, seed = key.split(" | ")
        for name, column in columns.items():
            if name in result:
                yield network, row, column, seed, 100 * result[name]


def afie_epochs(content: Any) -> Iterator[Entry]:
    for key, record in content.items():
        setting, seed = key.rsplit("; seed ", 1)
        for row, result in record.items():
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
    for row in content:
        setting = f"{row['env']}, {row['steps']:,} steps"
        for name, column in {"return": "return", "steps_per_second": "steps per second"}.items():
            yield setting, row["agent"], column, str(row["seed"]), row[name]


def agents_vs_random_search(content: Any) -> Iterator[Entry]:
    setting = f"ResNet-20, {content['settings']['episodes']} episodes, keep {content['settings']['keep']}"
    for key, rewards in content["rewards"].items():
        agent, seed = key.split("/")
        last = rewards[-max(1, round(len(rewards) / 5)) :]
        yield setting, agent, "best reward (%)", seed, 100 * max(rewards)
        yield setting, agent, "mean reward of the last fifth (%)", seed, 100 * statistics.fmean(last)


def latency_budget(content: Any) -> Iterator[Entry]:
    """Read each network and batch size as one repeat, as a seed is elsewhere."""
    for key, result in content.items():
        network, batch, _ = key.split(" | ")
        if "asked" in result:
            row, repeat = f"{result['asked']}x asked", f"{network}, batch {batch}"
            yield "all networks and batch sizes", row, "reached / asked", repeat, result["reached"] / result["asked"]
            yield "all networks and batch sizes", row, "score kept / that by FLOPs", repeat, result["kept score"]


READERS: dict[str, Callable[[Any], Iterator[Entry]]] = {
    f"{reader.__name__}.json": reader
    for reader in (
        oracle_correlation, criteria_finetune, afie_epochs, sensitiveness_order, agents_vs_sb3,
        agents_vs_random_search, latency_budget,
    )
}  # fmt: skip


def read(name: str, folder: Path = RESULTS) -> Figures:
    """Return what a file holds; nothing if it is not there."""
    figures: Figures = {}
    if (folder / name).exists():
        for setting, row, column, seed, value in READERS[name](json.loads((folder / name).read_text())):
            figures.setdefault(setting, {}).setdefault(row, {}).setdefault(column, {})[seed] = value
    return figures


def spread(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


@dataclass
class Part:
    """One comparison that a claim consists of, with a value for each seed."""

    name: str
    values: list[float]
    goal: float

    @property
    def judged(self) -> bool:
        """Say whether there are enough seeds."""
        return len(self.values) >= MIN_SEEDS

    @property
    def met(self) -> bool:
        """Say whether the values are above the goal by more than their spread."""
        return statistics.fmean(self.values) - statistics.stdev(self.values) > self.goal

    def show(self, digits: int) -> str:
        """Return a line of the figure."""
        judgement = ("met" if self.met else "not met") if self.judged else "not judged"
        return f"{self.name}: {spread(self.values, digits)} ({len(self.values)}; above {self.goal:g}: {judgement})"


def parts(claim: dict[str, Any], figures: Figures) -> list[Part]:
    """Return the comparisons of a claim that there are values for: rows with a goal, or their leads over others."""
    found = []
    for setting, rows in figures.items():
        for row in claim["of"]:
            own = rows.get(row, {}).get(claim["column"], {})
            for other in claim.get("over", [None]):
                against = rows.get(other, {}).get(claim["column"], {}) if other else dict.fromkeys(own, 0.0)
                values = [value - against[seed] for seed, value in own.items() if seed in against]
                name = f"{setting}: `{row}`" + (f" over `{other}`" if other else "")
                found += [Part(name, values, claim["above"])] if values else []
    return found


def verdict(found: list[Part]) -> str:
    """Return what the comparisons say of a claim."""
    judged = [part.met for part in found if part.judged]
    if not judged:
        most = max((len(part.values) for part in found), default=0)
        return f"not run, because there are {most} of {MIN_SEEDS} seeds"
    said = "holds" if all(judged) else "holds partly" if any(judged) else "does not hold"
    return f"**{said}**" + (f" ({len(found) - len(judged)} parts not judged)" if len(judged) < len(found) else "")


def claim_row(claim: dict[str, Any], files: dict[str, Any]) -> str:
    about = files.get(claim.get("result", ""), {})
    command, data, hardware = (claim.get(name, about.get(name)) for name in ("command", "data", "hardware"))
    figure, said = "", f"not run, because {claim.get('because')}"
    if "result" in claim:
        found = parts(claim, read(claim["result"]))
        lines = [part.show(about["digits"]) for part in found]
        figure = "<br>".join([f"[{claim['column']}](#{Path(claim['result']).stem})", *lines])
        said = verdict(found)
    return f"| {claim['claim']} | {claim['source']} | `{command}` | {data}; {hardware} | {figure} | {said} |"


def tables(name: str, about: dict[str, Any]) -> list[str]:
    """Return the tables of a file, rows in the order of the first column."""
    lines = [f"### {about['title']} {{ #{Path(name).stem} }}", "", f"`{name}`: {about['caption']}", ""]
    figures = read(name)
    for setting, rows in figures.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        count = max(len(values) for row in rows.values() for values in row.values())
        lines += [f"{setting}, seeds: {count}", "", f"| | {' | '.join(columns)} | seeds |"]
        lines += ["| --- " * (len(columns) + 2) + "|"]

        def rank(item: tuple[str, dict[str, Values]], first: str = columns[0]) -> float:
            return -statistics.fmean(item[1].get(first, {"": -1e30}).values())

        for row, found in sorted(rows.items(), key=rank):
            cells = [spread(list(found[c].values()), about["digits"]) if c in found else "" for c in columns]
            lines.append(f"| {row} | {' | '.join(cells)} | {max(map(len, found.values()))} |")
        lines.append("")
    return lines if figures else [*lines, "No result is kept yet.", ""]


def render() -> str:
    """Return the page."""
    content = yaml.safe_load(CLAIMS.read_text())
    lines = [INTRO]
    for method, title in METHODS.items():
        lines += [f"## {title} {{ #{method} }}", ""]
        lines += ["| claim | source | command | run on | our figure (seeds) | verdict |", "|" + " --- |" * 6]
        lines += [claim_row(claim, content["files"]) for claim in content["claims"] if claim["method"] == method]
        lines.append("")
    lines += ["## Tables { #tables }", ""]
    for name, about in content["files"].items():
        lines += tables(name, about)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    page = render()
    if not parser.parse_args().check:
        PAGE.with_suffix(".partial").write_text(page)
        os.replace(PAGE.with_suffix(".partial"), PAGE)
    elif not PAGE.exists() or PAGE.read_text() != page:
        sys.exit("docs/results.md is not what the files give; run `python benchmarks/render_results.py`")


if __name__ == "__main__":
    main()
