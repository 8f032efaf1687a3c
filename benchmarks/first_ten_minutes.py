"""Record the first ten minutes: each command is run, and docs/first_ten_minutes.md shows what it printed.

Commands run one after the other in an empty folder, as a newcomer types them behind the installation; what they print
is shown as it is, long tables cut where it says so. Pictures of the pages that they write are taken by Chromium, where
that is installed; without it those that are there stay::

    python benchmarks/first_ten_minutes.py
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stored import cpu_model, whole

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "first_ten_minutes.md"
RUN = "logs/quickstart/version_0"
CHECKPOINT = f"{RUN}/checkpoints/last.ckpt"
LINES = 34  # of what a command prints, the first half and the last
STEPS = [
    ("What is there to prune, before anything is trained?", "inspect --config quickstart"),
    ("Train, prune to half the FLOPs in four steps, train on.", "fit --config quickstart"),
    ("A page that says what it cost and what it brought.", f"report {RUN}"),
    ("The file that was named is the pruned network. Is it faster, measured once more?", f"benchmark {CHECKPOINT}"),
    (
        "How much further could it go? Right after the prune, without any training:",
        f"plan {CHECKPOINT} --keep 0.4 0.3 0.2 0.1 --method coherent_obs",
    ),
    ("One of these, as a checkpoint.", f"prune {CHECKPOINT} small.ckpt --keep 0.2"),
    ("And for deployment, checked against the network that it comes from.", "export small.ckpt small.onnx"),
]
# Pages, and windows that show them: width, height and whether it is dark.
PICTURES = {
    "report_wide.png": (f"{RUN}/report.html", 1280, 1500, False),
    "report_phone.png": (f"{RUN}/report.html", 390, 1500, True),
    "plan_wide.png": (f"{RUN}/checkpoints/last.plan.html", 1280, 1250, True),
}
NARROWEST = 500  # window that the browser has; narrower pages are framed in it
_NOISE = re.compile(r"Tip:|^(GPU|TPU|HPU) |site-packages|warnings\.warn|`Trainer\.fit` stopped|Seed set")
_PLACE = re.compile(r"^/\S+\.py:\d+: ")  # that a warning comes from


def run(command: str, folder: str) -> tuple[list[str], float]:
    """Run a command of lightning-prune in a folder; returns what it printed, and seconds."""
    began = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "lightning_prune", *command.split()],
        cwd=folder, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "110"},
    )  # fmt: skip
    if process.returncode:
        sys.exit(f"{command}\n{process.stdout}")
    printed = process.stdout.replace(folder, ".").splitlines()
    told = [_PLACE.sub("", line) for line in printed if line.strip() and not _NOISE.search(line)]
    return told, time.perf_counter() - began


def shortened(lines: list[str]) -> list[str]:
    """Leave out the middle of what is long, and say so."""
    if len(lines) <= LINES:
        return lines
    half = LINES // 2
    return [*lines[:half], f"... ({len(lines) - 2 * half} more lines)", *lines[-half:]]


def picture(page: Path, place: Path, width: int, height: int, dark: bool) -> None:
    """Take a picture of a page in a browser."""
    shown = page
    if width < NARROWEST:
        shown = page.with_name("frame.html")
        style = f"border:0;width:{width}px;height:{height}px"
        shown.write_text(f'<body style="margin:0"><iframe src="{page.name}" style="{style}"></iframe>')
    looks = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    with whole(place) as partial:
        taken = partial.with_suffix(".png")
        subprocess.run(
            [
                "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *looks,
                f"--window-size={max(width, NARROWEST)},{height}", f"--screenshot={taken}", shown.as_uri(),
            ],
            check=True, capture_output=True,
        )  # fmt: skip
        _packed(taken, width, partial)


def _packed(taken: Path, width: int, place: Path) -> None:
    """Cut a picture to its width, and keep it in few bytes."""
    from PIL import Image

    with Image.open(taken) as image:
        cut = image.crop((0, 0, width, image.height)).convert("RGB")
        cut.quantize(64).save(place, format="PNG", optimize=True)
    taken.unlink()


def page(shown: list[tuple[str, str, list[str], float]]) -> str:
    """Return the recording."""
    total = sum(seconds for *_, seconds in shown)
    lines = [
        "<!-- Written by benchmarks/first_ten_minutes.py; do not edit. -->",
        "",
        "# The first ten minutes",
        "",
        f"What a newcomer types after the installation, and what is printed: {total:.0f} seconds in all on a CPU "
        f"({cpu_model()}, one thread).",
    ]
    for words, command, printed, seconds in shown:
        lines += ["", f"## {words}", "", "```console", f"$ lightning-prune {command}", *shortened(printed), "```", ""]
        lines.append(f"{seconds:.0f} seconds.")
        verb = command.split()[0]
        lines += [f"\n![]({_at(name)})" for name in PICTURES if name.startswith(f"{verb}_")]
    return "\n".join(lines) + "\n"


def _at(name: str) -> str:
    return f"figures/{name}"


def main() -> None:
    shown = []
    with tempfile.TemporaryDirectory() as folder:
        for words, command in STEPS:
            shown.append((words, command, *run(command, folder)))
            print(f"{shown[-1][-1]:.0f} s: {command}", flush=True)
        if shutil.which("chromium"):
            for name, (source, width, height, dark) in PICTURES.items():
                picture(Path(folder, source).resolve(), DOCS / _at(name), width, height, dark)
    with whole(PAGE) as partial:
        partial.write_text(page(shown))


if __name__ == "__main__":
    main()
