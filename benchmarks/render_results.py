"""Render docs/results.md: each claim of the papers beside our figure, and the tables that the figures come from.

The picture and the table of the README are made from the same files.

What is claimed, by which command it is checked and what would bear it out stands in ``claims.yaml``; every figure comes
from the files in ``results``. Nothing of the page is typed in by hand::

    python benchmarks/render_results.py [--check]

``--check`` writes nothing, and fails if the page or a figure is not what the files give. Drawing needs Matplotlib, the
check does not.
"""

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import first_page
import yaml
from result_files import Figures, Values, hardware_of, read
from result_plots import FINETUNED, LOOKS, Plot, draw, plots
from scipy import stats
from stored import spread, whole

HERE = Path(__file__).parent
CLAIMS, PAGE = HERE / "claims.yaml", HERE.parent / "docs" / "results.md"
FOLDER = "figures"  # beside the page
MIN_SEEDS = 3  # with fewer, nothing is said of a claim
METHODS = {
    "taylor": "Taylor",
    "afie": "AFIE",
    "sensitiveness": "Sensitiveness",
    "rl_joint": "Joint training and pruning",
    "learn_to_prune": "Learn to prune",
    "agents": "Agents",
    "latency": "Latency budgets",
    "compensation": "Compensation",
    "best": "Our best at half the FLOPs",
}

INTRO = f"""<!-- Written by benchmarks/render_results.py; do not edit. -->

# Results

What the papers claim, and what we measured. Each row names the command that gives its figure. Each figure, and what it
was run on, comes from a file in `benchmarks/results`; the [tables](#tables) show those files whole. CIFAR-10 is a copy
of it in JPEG files, so that absolute accuracies are not those of the original images. Networks are small and schedules
short: a row checks the idea at that scale, and does not repeat the experiment of the paper.

A figure is a mean ± standard deviation over seeds. A lead is taken seed by seed. A part of a claim is **met** if its
mean is above the goal with 95 % confidence (one-sided, t-distribution), or, where a goal is for every case, if each is
above it. A claim **holds** if all its parts are met, **holds partly** if some are, and **does not hold** if none is.
With fewer than {MIN_SEEDS} seeds a part is shown and not judged.
"""


@dataclass
class Part:
    """One comparison that a claim consists of, with a value for each seed."""

    name: str
    values: list[float]
    goal: float
    every: bool = False  # value has to be above the goal, and not their mean

    @property
    def judged(self) -> bool:
        """Say whether there are enough seeds."""
        return len(self.values) >= MIN_SEEDS

    @property
    def met(self) -> bool:
        """Say whether the values are above the goal: each of them, or their mean with 95 % confidence."""
        if self.every:
            return min(self.values) > self.goal
        count = len(self.values)
        margin = float(stats.t.ppf(0.95, count - 1)) * statistics.stdev(self.values) / math.sqrt(count)
        return statistics.fmean(self.values) - margin > self.goal

    def show(self, digits: int) -> str:
        """Return a line of the figure."""
        if not self.values:
            return f"{self.name}: not run"
        judgement = ("met" if self.met else "not met") if self.judged else "not judged"
        return f"{self.name}: {spread(self.values, digits)} ({len(self.values)}; above {self.goal:g}: {judgement})"


def parts(claim: dict[str, Any], figures: Figures) -> list[Part]:
    """Return the comparisons of a claim: rows with a goal, or their leads over others, those that are missing too."""
    found = []
    for setting in claim.get("in", figures):
        rows = figures.get(setting, {})
        for row in chosen(claim, rows) or ["best"]:
            own = rows.get(row, {}).get(claim["column"], {})
            for other in claim.get("over", [None]):
                against = rows.get(other, {}).get(claim["column"], {}) if other else dict.fromkeys(own, 0.0)
                values = [value - against[seed] for seed, value in own.items() if seed in against]
                name = f"{setting}: `{row}`" + (f" over `{other}`" if other else "")
                if own or "in" in claim:  # else another setting is that of the row
                    found.append(Part(name, values, claim["above"], claim.get("every", False)))
    return found


def chosen(claim: dict[str, Any], rows: dict[str, dict[str, Values]]) -> list[str]:
    """Return the rows that a claim is of: all that it names, or the one of them that is best `by` another column."""
    if "by" not in claim:
        return claim["of"]
    known = {row: values for row in claim["of"] if (values := rows.get(row, {}).get(claim["by"]))}
    most = max(map(len, known.values()), default=0)
    compared = {row: values for row, values in known.items() if len(values) == most}  # on the same seeds alone
    return [max(compared, key=lambda row: statistics.fmean(compared[row].values()))] if compared else []


def verdict(found: list[Part]) -> str:
    """Return what the comparisons say of a claim."""
    judged = [part.met for part in found if part.judged]
    if not judged:
        most = max((len(part.values) for part in found), default=0)
        return f"not {'judged' if most else 'run'}, because there are {most} of {MIN_SEEDS} seeds"
    said = "holds" if all(judged) else "holds partly" if any(judged) else "does not hold"
    return f"**{said}**" + (f" ({len(found) - len(judged)} parts not judged)" if len(judged) < len(found) else "")


def claim_row(claim: dict[str, Any], files: dict[str, Any]) -> str:
    about = files.get(claim.get("result", ""), {})
    command, data = (claim.get(name, about.get(name)) for name in ("command", "data"))
    figure, said, hardware = "", f"not run, because {claim.get('because')}", claim.get("hardware")
    if "result" in claim:
        hardware = hardware_of(claim["result"], about)
        found = parts(claim, read(claim["result"], about))
        lines = [part.show(about["digits"]) for part in found]
        figure = "<br>".join([f"[{claim['column']}](#{anchor(claim['result'])})", *lines])
        said = verdict(found)
    return f"| {claim['claim']} | {claim['source']} | `{command}` | {data}; {hardware} | {figure} | {said} |"


def anchor(name: str) -> str:
    """Return the anchor of the tables of a file; those of the methods have the names of methods alone."""
    return f"table_{Path(name).stem}"


def tables(name: str, about: dict[str, Any]) -> list[str]:
    """Return the tables of a file, rows in the order of the first column."""
    lines = [f"### {about['title']} {{ #{anchor(name)} }}", "", f"`{name}`: {about['caption']}", ""]
    lines += [f"Run on: {hardware_of(name, about)}.", ""]
    figures = read(name, about)
    lines += [f"![Accuracy of {plot.network}]({FOLDER}/{plot.file})\n" for plot in drawn(name, about)]
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


def drawn(name: str, about: dict[str, Any]) -> list[Plot]:
    """Return what is to be drawn of a file."""
    return plots(read(name, about), about.get("plot", []), LOOKS.get(name, FINETUNED))


def all_plots() -> list[Plot]:
    """Return what is to be drawn of all files."""
    files = yaml.safe_load(CLAIMS.read_text())["files"]
    return [plot for name, about in files.items() for plot in drawn(name, about)]


def of_first_page() -> tuple[first_page.Picture, str]:
    """Return the picture and the whole text of the README."""
    content = yaml.safe_load(CLAIMS.read_text())
    after, finetuned = (read(name, content["files"][name]) for name in ("compensation.json", "criteria_finetune.json"))
    lines = first_page.table(after, finetuned, content["first_page"])
    return first_page.picture(finetuned), first_page.with_table(first_page.README.read_text(), lines)


def outdated() -> list[str]:
    """Return the names of the files that are not what the results give."""
    found = [] if PAGE.exists() and PAGE.read_text() == render() else [PAGE.name]
    picture, readme = of_first_page()
    found += [] if first_page.README.read_text() == readme else [first_page.README.name]
    for plot in (*all_plots(), picture):
        file = PAGE.parent / FOLDER / plot.file
        found += [] if file.exists() and plot.digest in file.read_text() else [plot.file]
    return found


def write(path: Path, content: bytes) -> None:
    with whole(path) as partial:
        partial.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is not up to date")
    if parser.parse_args().check:
        if names := outdated():
            sys.exit(f"not what the files give: {', '.join(names)}; run `python benchmarks/render_results.py`")
        return
    for plot in all_plots():
        write(PAGE.parent / FOLDER / plot.file, draw(plot))
    write(PAGE, render().encode())
    picture, readme = of_first_page()
    write(PAGE.parent / FOLDER / picture.file, picture.draw())
    write(first_page.README, readme.encode())


if __name__ == "__main__":
    main()
