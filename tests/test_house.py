"""The house: rooms import from lower floors, names say one thing, functions fit a screen."""

import ast
import importlib
import io
import pkgutil
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_prune

PACKAGE = Path(lightning_prune.__file__).parent
REPOSITORY = PACKAGE.parent
# A room imports from the rooms of lower floors, and from itself.
FLOORS = (
    ("plain",),
    (
        "pruning_plan",
        "namesakes",
        "progress",
        "files",
        "importing",
        "compiled",
        "ddp",
        "soft_targets",
        "unlabelled",
        "rl",
    ),
    ("graph", "models", "datamodules"),
    ("planning", "surgery"),
    ("candidates", "checkpoint", "export"),
    ("criteria",),
    ("search", "reporting", "post_training"),
    ("callbacks",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ENTRANCES = {"__init__", "__main__"}  # which lead into all rooms
KNOW_LIGHTNING = {"models", "datamodules", "callbacks", "cli"}
CLEAR_ROOMS = (
    "graph",
    "planning",
    "surgery",
    "candidates",
    "criteria",
    "search",
    "rl",
    "reporting",
    "callbacks",
    "cli",
)


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "configs" not in path.relative_to(PACKAGE).parts]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Yield what a module imports anywhere in it: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(tree: ast.Module) -> set[str]:
    paths = [name.split(".") for name in imported_modules(tree)]
    return {path[1] for path in paths if path[0] == "lightning_prune" and len(path) > 1}


def imports(path: Path) -> list[str]:
    return list(imported_modules(ast.parse(path.read_text())))


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in sources()} - ENTRANCES
    assert rooms == set(FLOOR_OF)


@pytest.mark.parametrize("room", FLOOR_OF)
def test_a_room_imports_from_lower_floors_only(room: str) -> None:
    upward = []
    for path in sources():
        if room_of(path) != room:
            continue
        others = imported_rooms(ast.parse(path.read_text())) & FLOOR_OF.keys() - {room}
        upward += [f"{path.name} imports {other}" for other in others if FLOOR_OF[other] >= FLOOR_OF[room]]
    assert upward == []


def test_only_the_upper_rooms_and_loggers_know_lightning() -> None:
    knowing = set()
    for path in sources():
        known = [name for name in imports(path) if name.split(".")[0] in ("lightning", "pytorch_lightning")]
        if known and room_of(path) not in KNOW_LIGHTNING:
            knowing.add(str(path.relative_to(PACKAGE)))
    # What LightningCLI has written into a checkpoint is made into arguments by LightningCLI.
    assert knowing <= {"reporting/loggers.py", "checkpoint/loading.py"}


def test_the_callbacks_know_nothing_of_the_command_line() -> None:
    found = [path.name for path in sources() if room_of(path) != "cli" and "jsonargparse" in " ".join(imports(path))]
    assert found == []


def test_no_name_of_a_package_hides_a_module_of_it() -> None:
    hidden = []
    for module in pkgutil.walk_packages([str(PACKAGE)], "lightning_prune."):
        if not module.ispkg or ".configs" in module.name:
            continue
        package = importlib.import_module(module.name)
        inside = {name for _, name, _ in pkgutil.iter_modules(package.__path__)}
        hidden += [f"{module.name}.{name}" for name in inside & set(getattr(package, "__all__", ()))]
    assert hidden == []


# -- functions and lines -----------------------------------------------------------------------------------------------


def documented(node: ast.AST) -> bool:
    body = getattr(node, "body", None)
    first = body[0] if isinstance(body, list) and body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def test_functions_fit_a_screen() -> None:
    long = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if documented(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                long += [f"{path.name}: {node.name} has {lines} lines"] if lines > 40 else []
    assert long == []


def lines_of_code(source: str) -> set[int]:
    """Return the numbers of the lines that hold code: no blank ones, comments or docstrings."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if documented(node):
            docstring = node.body[0]  # type: ignore[attr-defined]
            lines.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def nodes_per_line(paths: list[Path]) -> float:
    texts = [path.read_text() for path in paths]
    nodes = sum(sum(1 for _ in ast.walk(ast.parse(text))) for text in texts)
    return nodes / sum(len(lines_of_code(text)) for text in texts)


@pytest.mark.parametrize("room", CLEAR_ROOMS)
def test_a_line_can_be_read_once(room: str) -> None:
    """Lightning's callbacks hold 7.2 syntax nodes a line, fvcore 7.8, Stable-Baselines3 8.1."""
    assert nodes_per_line([path for path in sources() if room_of(path) == room]) < 10


def test_lines_and_nodes_are_counted_as_by_hand() -> None:
    source = '"""Noun."""\n\n# reason\nx = 1\n\n\ndef f():\n    """Say."""\n    return (\n        x\n    )\n'
    assert lines_of_code(source) == {4, 7, 9, 10, 11}


# -- words -------------------------------------------------------------------------------------------------------------

# What stands for something else in the glossary of docs/architecture.md, as whole words anywhere.
WORDS = (
    "producer", "producers", "maker", "makers", "reader", "readers", "held", "inexact", "leaving", "neuron", "neurons",
    "sparsity", "heal", "repair", "visit", "visits",
)  # fmt: skip
# The same, as words within the names of functions, classes, arguments and variables.
WORDS_OF_NAMES = (*WORDS, "gone", "lost", "stays", "live", "course", "importance", "examples", "removed", "removal")
PHRASES = (
    r"channels?( \w+)? (that )?(leaves?|left|stays?|gone)\b", r"\bstays? whole\b", r"\bleaves? together\b",
    r"\blive channels?\b", r"\b(in)?exact groups?\b", r"\bremov\w+ (the )?channels?\b", r"channels? (\w+ )?removed\b",
    r"(?<!of )\bcourse\b", r"\bgone\b", r"\blost\b",
)  # fmt: skip
# Papers, what others call things, and keys of files that earlier versions have written.
QUOTED = re.compile(r"\"[A-Z][^\"]*\"|importance=\w+|Importance\w*")
OLD_KEYS = {"held"}


def names_in(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def words_of(name: str) -> list[str]:
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().split("_")


def prose_in(source: str) -> Iterator[str]:
    """Yield the comments and strings of a module, docstrings and messages among them."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in OLD_KEYS:
            yield node.value


def strange_in(text: str) -> list[str]:
    """Return the words and phrases of a text that the glossary has another word for."""
    text = re.sub(r"\s+", " ", QUOTED.sub("", text))
    patterns = [*(rf"\b{word}\b" for word in WORDS), *PHRASES]
    return [found[0] for pattern in patterns for found in re.finditer(pattern, text, re.IGNORECASE)]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_code_uses_the_words_of_the_glossary(path: Path) -> None:
    source = path.read_text()
    strange_names = {name for name in names_in(ast.parse(source)) if set(words_of(name)) & set(WORDS_OF_NAMES)}
    strange_prose = {found for text in prose_in(source) for found in strange_in(text)}
    assert (strange_names, strange_prose) == (set(), set())


PAGES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "configs/**/*.yaml")
    for path in sorted(REPOSITORY.glob(pattern))
    if path.name != "results.md"  # made from what benchmarks have written
]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_the_pages_use_the_words_of_the_glossary(path: Path) -> None:
    text = path.read_text()
    if path.name == "architecture.md":  # which lists the words that are not used
        text = text.partition("| not |")[0]
    assert strange_in(text) == []


def test_words_are_found() -> None:
    assert strange_in("The producers are held; channels that leave are gone.") != []
    assert strange_in("Of course the pruned channels are masked.") == []
    assert words_of("LiveReaders_of") == ["live", "readers", "of"]
