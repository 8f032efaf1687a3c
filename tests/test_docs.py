"""The documentation says what is so: links, code, settings and names."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml

from lightning_prune import callbacks, criteria, datamodules, models
from lightning_prune.cli.entry import COMMANDS
from lightning_prune.criteria import CRITERIA
from lightning_prune.graph import sizes
from lightning_prune.graph.rules import RULES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
METHODS = sorted((ROOT / "docs" / "methods").glob("*.md"))
MARK = "<!-- runnable -->\n"  # before a block of Python
SUBCOMMANDS = {"fit", "validate", "test", "predict", *COMMANDS}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[tuple[str, bool]]:
    """Return the code blocks of a page in a language, and whether each is marked as runnable."""
    found = re.findall(rf"^({MARK})?```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [(code, bool(mark)) for mark, code in found]


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def classes_in(content: Any) -> Iterator[dict[str, Any]]:
    """Yield the mappings with a class of this package in the content of a YAML block."""
    if isinstance(content, dict):
        if str(content.get("class_path", "")).startswith("lightning_prune."):
            yield content
        content = list(content.values())
    for each in content if isinstance(content, list) else []:
        yield from classes_in(each)


@pytest.fixture
def _as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, and forget what is registered meanwhile."""
    monkeypatch.chdir(tmp_path)
    tables: list[dict[str, Any]] = [CRITERIA, RULES, sizes._SYNC_BY_CLASS_NAME]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@every_page
def test_relative_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    relative = [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")]
    assert [target for target in relative if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if MARK in page.read_text()], ids=lambda page: page.stem)
@pytest.mark.usefixtures("_as_it_was")
def test_marked_code_runs(page: Path):
    names: dict[str, Any] = {}
    runnable = [code for code, marked in blocks(page, "python") if marked]
    assert len(runnable) == page.read_text().count(MARK), "a mark stands before something else than Python"
    for number, code in enumerate(runnable, 1):
        exec(compile(code, f"block {number} of {page.name}", "exec"), names)


@every_page
def test_other_code_can_be_read(page: Path):
    for number, (code, _) in enumerate(blocks(page, "python"), 1):
        compile(code, f"block {number} of {page.name}", "exec")


@every_page
def test_settings_in_yaml_exist(page: Path):
    for code, _ in blocks(page, "yaml"):
        for content in classes_in(yaml.safe_load(code)):
            module, _, name = content["class_path"].rpartition(".")
            kind = getattr(import_module(module), name)
            parser = jsonargparse.ArgumentParser(exit_on_error=False)
            parser.add_subclass_arguments(kind, "it")
            parser.parse_object({"it": content})  # raises where a setting is unknown or of another type
            kind(**content.get("init_args", {}))


@pytest.mark.parametrize("package", [callbacks, criteria, datamodules, models], ids=lambda package: package.__name__)
def test_every_public_name_is_mentioned(package: Any):
    words = set(re.findall(r"\w+", " ".join(page.read_text() for page in PAGES)))
    assert set(package.__all__) <= words


@pytest.mark.parametrize("name", callbacks.__all__)
def test_every_setting_of_a_callback_is_explained(name: str):
    pages = [
        page.read_text() for page in METHODS if f"class_path: lightning_prune.callbacks.{name}" in page.read_text()
    ]
    assert pages, "no page of a method shows how to use it"
    shared = (ROOT / "docs" / "add_it_to_your_project.md").read_text()
    own = [n for n, p in inspect.signature(getattr(callbacks, name)).parameters.items() if p.kind is not p.VAR_KEYWORD]
    rows = re.findall(r"^\| (`[^|]*) \|", "\n".join([*pages, shared]), re.MULTILINE)
    assert set(own) <= {setting for row in rows for setting in re.findall(r"`(\w+)`", row)}


def test_every_command_exists():
    text = "\n".join(code for page in PAGES for code, _ in blocks(page, "bash"))
    named = re.findall(r"^(?:.*\s)?lightning-prune (\w+)", text, re.MULTILINE)
    assert set(named) >= {"fit", "report", "export", "benchmark", "compare"}
    assert set(named) <= SUBCOMMANDS


def test_every_benchmark_that_is_named_exists():
    listed = re.findall(r"^\| `(\w+\.py)", (ROOT / "docs" / "benchmarks.md").read_text(), re.MULTILINE)
    named = {*listed, *(name for page in PAGES for name in re.findall(r"benchmarks/(\w+\.py)", page.read_text()))}
    assert len(listed) > 5
    assert [name for name in sorted(named) if not (ROOT / "benchmarks" / name).is_file()] == []


@pytest.mark.long
@pytest.mark.usefixtures("_as_it_was")
def test_the_notebook_runs_from_top_to_bottom():
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
    names: dict[str, Any] = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in cells if cell["outputs"] or cell["execution_count"]] == [], "clear the outputs"
    for number, cell in enumerate(cells, 1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["plan"].budget["achieved"] <= 0.5
    assert names["after"]["parameters"] < names["before"]["parameters"]
    assert names["trained_on"]["accuracy"] > names["after"]["accuracy"]


@pytest.mark.skipif(find_spec("mkdocs") is None or find_spec("mkdocstrings") is None, reason="needs the `docs` extra")
def test_the_documentation_builds_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "index.html").is_file()
