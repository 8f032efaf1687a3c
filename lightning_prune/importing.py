"""Things that a setting names by their import path, and files that may name nothing that is not there already."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from typing import Any

from torch.utils._pytree import tree_leaves

__all__ = ["imported", "loaded_modules_named_in", "may_be_imported", "nothing_imported_for"]


def imported(path: str) -> Any:
    """Return what an import path names.

    Args:
        path: Module and attribute, such as ``"torch.nn.Linear"``.

    Raises:
        ImportError: If there is no such module, it cannot be imported, or it has no such attribute.

    Example:
        >>> imported("math.pi")
        3.141592653589793
    """
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (AttributeError, ValueError, TypeError) as error:  # no attribute, or no path at all
        raise ImportError(str(error)) from error


def may_be_imported(path: str, package: str = "lightning_prune.models") -> bool:
    """Tell whether a file may have something imported: its module is loaded already, or one of an expected package.

    A checkpoint comes from anywhere, and to import a module is to run it.

    Args:
        path: Module and attribute.
        package: The package that is expected.

    Example:
        >>> may_be_imported("lightning_prune.models.ImageClassifier"), may_be_imported("antigravity.fly")
        (True, False)
    """
    module, _, _ = path.rpartition(".")
    return module in sys.modules or _lies_in(module, package)


def _lies_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


class _Refusing(MetaPathFinder):
    """Refuse to find some modules.

    Args:
        names: Their dotted names.
        package: The package whose modules are found all the same.

    Attributes:
        refused: The module that was asked for and refused.
    """

    def __init__(self, names: set[str], package: str) -> None:
        self.names = names
        self.package = package
        self.refused = ""

    def find_spec(self, name: str, *_: Any) -> None:
        """Raise an ImportError for one of the names, and leave all others to those who find modules."""
        if name in self.names and not _lies_in(name, self.package):
            self.refused = self.refused or name
            raise ImportError(f"{name!r} is not imported on the word of a file.")


@contextmanager
def nothing_imported_for(content: Any, package: str) -> Iterator[None]:
    """Let no module be loaded that plain values name, unless it lies in a package.

    Args:
        content: Plain values from a file, such as hyper-parameters; texts in them may be import paths.
        package: The package that is expected: that of the class that is made from them.

    Raises:
        ValueError: If one was to be loaded; it has not been.
    """
    finder = _Refusing(_prefixes(content), package)
    sys.meta_path.insert(0, finder)
    try:
        yield
    except BaseException as raised:
        if not finder.refused:
            raise
        raise _refusal(finder.refused) from raised
    finally:
        sys.meta_path.remove(finder)
    if finder.refused:  # by somebody who goes on without it
        raise _refusal(finder.refused)


def loaded_modules_named_in(content: Any, package: str) -> list[str]:
    """Return what has to be imported before `nothing_imported_for` lets values be used that are in use here.

    Args:
        content: Plain values; texts in them may be import paths.
        package: The package that is expected.

    Example:
        >>> import json.decoder
        >>> loaded_modules_named_in({"decoder": "json.decoder.JSONDecoder", "activation": "torch.nn.ReLU"}, "mine")
        ['json.decoder']
    """
    usual = ("torch", package)
    loaded = {name for name in _prefixes(content) & sys.modules.keys() if not any(_lies_in(name, one) for one in usual)}
    return sorted(name for name in loaded if not any(other.startswith(f"{name}.") for other in loaded))


def _refusal(module: str) -> ValueError:
    return ValueError(
        f"The hyper-parameters in the checkpoint name the module {module!r}, which is not imported on the word of a "
        f"file; if you trust it, import it first (--import {module} on the command line), or pass an instance."
    )


def _prefixes(content: Any) -> set[str]:
    """Return the names of all modules that texts in nested values may stand for."""
    names: set[str] = set()
    for leaf in tree_leaves(content):
        if isinstance(leaf, str) and "." in leaf and len(leaf) < 1000:
            pieces = leaf.split(".")
            names.update(".".join(pieces[:end]) for end in range(1, len(pieces) + 1))
    return names
