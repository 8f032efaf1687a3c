"""The page of results says what the files of results say, and each claim can be run."""

import json
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "render_results.py"
CONTENT = yaml.safe_load((ROOT / "benchmarks" / "claims.yaml").read_text())
CLAIMS, FILES = CONTENT["claims"], CONTENT["files"]
METHOD_PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
EXAMPLES: dict[str, tuple[Any, list[tuple[str, str, str, str, float]]]] = {  # a file of each kind, and what it says
    "oracle_correlation.json": (
        {"vgg": {"0": {"l1": {"per layer": 0.1, "all layers": 0.2, "all layers, L2": 0.3}, "accuracy": 0.7}}},
        [
            ("vgg", "l1", "per layer", "0", 0.1),
            ("vgg", "l1", "all layers", "0", 0.2),
            ("vgg", "l1", "all layers, L2", "0", 0.3),
        ],
    ),
    "criteria_finetune.json": (
        {"vgg | L1 | 2": {"flops": 0.5, "pruned": 0.25, "accuracy": 0.5}, "vgg | not pruned | 2": {"accuracy": 0.75}},
        [
            ("vgg", "L1", "fine-tuned (%)", "2", 50.0),
            ("vgg", "L1", "when pruned (%)", "2", 25.0),
            ("vgg", "not pruned", "fine-tuned (%)", "2", 75.0),
        ],
    ),
    "afie_epochs.json": (
        {"vgg; 3 epochs; seed 1": {"unpruned": {"accuracy": 0.5, "first against last": 0.9}}},
        [
            ("vgg; 3 epochs", "unpruned", "accuracy (%)", "1", 50.0),
            ("vgg; 3 epochs", "first", "order against last", "1", 0.9),
        ],
    ),
    "sensitiveness_order.json": (
        {"conv4": {"0": {"accuracy": 0.9, "noise": {"order": 0.8}, "pruned": {"uniform": {"accuracy": 0.5}}}}},
        [
            ("conv4", "noise", "order, early against last", "0", 0.8),
            ("conv4", "uniform", "accuracy (%)", "0", 50.0),
        ],
    ),
    "agents_vs_sb3.json": (
        [{"env": "Pendulum-v1", "agent": "sac", "seed": 4, "steps": 1000, "return": -1.5, "steps_per_second": 9.0}],
        [
            ("Pendulum-v1, 1,000 steps", "sac", "return", "4", -1.5),
            ("Pendulum-v1, 1,000 steps", "sac", "steps per second", "4", 9.0),
        ],
    ),
    "agents_vs_random_search.json": (
        {"settings": {"episodes": 10, "keep": 0.5}, "rewards": {"sac/3": [0.75, *[0.0] * 7, 0.25, 0.5]}},
        [
            ("ResNet-20, 10 episodes, keep 0.5", "sac", "best reward (%)", "3", 75.0),
            ("ResNet-20, 10 episodes, keep 0.5", "sac", "mean reward of the last fifth (%)", "3", 37.5),
        ],
    ),
    "latency_budget.json": (
        {
            "resnet18 | 8 | 2.0": {"asked": 2.0, "reached": 1.5, "kept score": 1.1},
            "resnet18 | 8 | half": {"reached": 1},
        },
        [
            ("all networks and batch sizes", "2.0x asked", "reached / asked", "resnet18, batch 8", 0.75),
            ("all networks and batch sizes", "2.0x asked", "score kept / that by FLOPs", "resnet18, batch 8", 1.1),
        ],
    ),
}


def load() -> Any:
    spec = spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load()


def test_the_page_is_what_the_script_renders():
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_page_that_was_changed_by_hand_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(script, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(sys, "argv", [SCRIPT.name])
    script.main()
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--check"])
    script.main()
    (tmp_path / "results.md").write_text(script.PAGE.read_text().replace("not run", "holds", 1))
    with pytest.raises(SystemExit, match="not what the files give"):
        script.main()


@pytest.mark.parametrize("about", [*CLAIMS, *FILES.values()], ids=lambda about: str(about.get("claim", "file")))
def test_every_command_can_be_run(about: dict[str, Any]):
    command = about["command"] if "command" in about else FILES[about["result"]]["command"]
    program, target = re.fullmatch(r"(python|lightning-prune fit --config) (\S+\.\w+).*", command).groups()
    assert target.endswith(".py" if program == "python" else ".yaml")
    assert (ROOT / target).is_file()
    for option in re.findall(r" (--[\w-]+)", command.partition(target)[2]):
        assert f'"{option}"' in (ROOT / target).read_text()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim["claim"])
def test_every_claim_can_be_judged_or_says_why_not(claim: dict[str, Any]):
    assert claim["method"] in script.METHODS
    assert claim["source"]
    assert ("result" in claim) != ("because" in claim)
    if "result" in claim:
        _, entries = EXAMPLES[claim["result"]]
        assert claim["column"] in {column for _, _, column, _, _ in entries}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_their_scripts_write_them(name: str, tmp_path: Path):
    content, entries = EXAMPLES[name]
    assert script.read(name, tmp_path) == {}
    (tmp_path / name).write_text(json.dumps(content))
    found = script.read(name, tmp_path)
    for setting, row, column, seed, value in entries:
        assert found[setting][row][column].pop(seed) == pytest.approx(value)
    assert [values for rows in found.values() for row in rows.values() for values in row.values() if values] == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([[1.0, 2.0, 3.0], [9.0, 9.0, 9.0]], "**holds**"),  # 2 less 1 is above 0.5
        ([[1.0, 2.0, 3.0], [0.0, 1.0, 2.0]], "**holds partly**"),  # 1 less 1 is not
        ([[0.5, 0.5, 0.5], [-1.0, -1.0, -1.0]], "**does not hold**"),  # to reach the goal is not to pass it
        ([[1.0, 2.0, 3.0], [9.0, 9.0]], "**holds** (1 parts not judged)"),
        ([[9.0, 9.0], [9.0]], "not run, because there are 2 of 3 seeds"),
        ([], "not run, because there are 0 of 3 seeds"),
    ],
)
def test_verdicts(values: list[list[float]], said: str):
    assert script.verdict([script.Part("", each, 0.5) for each in values]) == said


def test_leads_are_taken_seed_by_seed():
    claim = {"column": "x", "of": ["ours"], "over": ["theirs", "not there"], "above": 0.0}
    figures = {"net": {"ours": {"x": {"0": 1.0, "1": 5.0, "2": 7.0}}, "theirs": {"x": {"2": 4.0, "1": 3.0}}}}
    (part,) = script.parts(claim, figures)
    assert part.values == [2.0, 3.0]
    assert part.show(1) == "net: `ours` over `theirs`: 2.5 ± 0.7 (2; above 0: not judged)"
    (alone,) = script.parts({**claim, "over": [None]}, figures)
    assert alone.values == [1.0, 5.0, 7.0]


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)
def test_every_method_links_its_rows(page: Path):
    anchors = re.findall(r"\]\(\.\./results\.md#(\w+)\)", page.read_text())
    assert anchors
    assert set(anchors) <= set(re.findall(r"\{ #(\w+) \}", (ROOT / "docs" / "results.md").read_text()))
