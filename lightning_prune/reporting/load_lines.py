"""Lines of Python that load a checkpoint, as they can be pasted into another process."""

import ast
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from lightning_prune.checkpoint import asked_for
from lightning_prune.importing import loaded_modules_named_in

__all__ = ["load_lines"]


def load_lines(kind: type, path: str, checkpoint: Mapping[str, Any]) -> list[str]:
    """Return lines that load a checkpoint; what they cannot know, they say in a comment.

    Args:
        kind: The class of the module.
        path: The checkpoint file.
        checkpoint: What is in it, read without making objects.

    Example:
        >>> from lightning_prune.models import ImageClassifier
        >>> for line in load_lines(ImageClassifier, "/logs/last.ckpt", {"hyper_parameters": {}}):
        ...     print(line)
        from lightning_prune import load_pruned
        from lightning_prune.models.classifier import ImageClassifier
        model = load_pruned(ImageClassifier, '/logs/last.ckpt')
    """
    place = _place_of(kind)
    package = _package(place.module or kind.__module__)
    named = loaded_modules_named_in(checkpoint.get("hyper_parameters", {}), package)
    folders = [place.folder]
    for module in named:
        package = _package(module)
        folder = _folder_of(package)
        folders.append(folder)
    lines = ["from lightning_prune import load_pruned"]
    wanted = filter(None, dict.fromkeys(folders))
    lines += [f"import sys; sys.path.insert(0, {folder!r})" for folder in wanted]
    lines += [f"import {module}" for module in named]
    outermost = kind.__qualname__.partition(".")[0]
    lines.append(f"from {place.module} import {outermost}" if place.module else f"# {place.remark}")
    return [*lines, *_call(kind, path, asked_for(kind, checkpoint))]


def _call(kind: type, path: str, names: Sequence[str]) -> list[str]:
    """Return the call that loads, and what has to be given to it."""
    lines = []
    if names:
        listed = ", ".join(names)
        lines.append(f"# give what the file does not hold, as for the training: {listed}")
    is_local = "<locals>" in kind.__qualname__
    name = kind.__name__ if is_local else kind.__qualname__
    given = [f"{each}={each}" for each in names]
    called = ", ".join([name, repr(path), *given])
    lines.append(f"model = load_pruned({called})")
    return lines


class _Place(NamedTuple):
    """Where a class can be imported from.

    Attributes:
        module: The module; "" if it cannot be imported.
        folder: What has to be among the places where modules are looked for; "" if it is anyway.
        remark: Why it cannot be imported.
    """

    module: str = ""
    folder: str = ""
    remark: str = ""


def _place_of(kind: type) -> _Place:
    defined = f"where {kind.__name__} is defined"
    if "<locals>" in kind.__qualname__:
        return _Place(remark=f"{defined}: it is made in a function, from which it cannot be imported")
    module = sys.modules.get(kind.__module__)
    if kind.__module__ not in ("__main__", "__mp_main__"):
        return _Place(kind.__module__, _folder_of(_package(kind.__module__)))
    spec = getattr(module, "__spec__", None)
    if spec is not None:  # python -m package.module
        return _Place(spec.name, _folder_of(_package(spec.name)))
    return _place_of_script(module, defined)


def _place_of_script(module: ModuleType | None, defined: str) -> _Place:
    """Return where a class of a script can be imported from: where that does not run the script."""
    file = getattr(module, "__file__", None)
    if not file or not Path(file).is_file():
        return _Place(remark=f"{defined}: a notebook or an interactive session")
    script = Path(file).absolute()
    if not script.stem.isidentifier():
        return _Place(remark=f"{defined}: {script.name} is no name of a module")
    if not _is_guarded(script):
        return _Place(remark=f"{defined}: to import {script.name} would run it")
    return _Place(script.stem, str(script.parent))


def _is_guarded(script: Path) -> bool:
    """Tell whether a script asks whether it is run or imported."""
    statements = ast.parse(script.read_text()).body
    for statement in statements:
        if not isinstance(statement, ast.If):
            continue
        for node in ast.walk(statement.test):
            if isinstance(node, ast.Name) and node.id == "__name__":
                return True
    return False


def _folder_of(package: str) -> str:
    """Return the folder of a package, or "" if it is installed."""
    try:
        spec = find_spec(package)
    except ValueError:  # a module that was made, and not found
        spec = None
    origin = spec.origin if spec is not None else None
    if spec is None or not origin or not os.path.isfile(origin):
        return ""
    file = Path(origin).absolute()
    folder = file.parent
    if spec.submodule_search_locations:
        folder = folder.parent
    is_ours = package == _package(__name__)
    return "" if is_ours or _is_of_python(folder) else str(folder)


def _is_of_python(folder: Path) -> bool:
    """Tell whether Python looks for modules in a folder anyway."""
    if folder.name in ("site-packages", "dist-packages"):
        return True
    paths = sysconfig.get_paths().values()
    installed = [Path(path).absolute() for path in paths]
    return folder in installed


def _package(module: str) -> str:
    return module.partition(".")[0]
