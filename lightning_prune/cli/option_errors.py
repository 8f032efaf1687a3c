"""Errors in options, in one sentence that names the option and the nearest names."""

import argparse
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from typing_extensions import override

__all__ = ["CommandParser", "OptionError", "command_error", "nearest", "reworded", "settings_of_class"]

_UNKNOWN = re.compile(r"^Option '(?P<option>[^']+)' is not accepted")
_UNKNOWN_KEY = re.compile(r"^Subcommand .* does not accept option '(?P<option>.+)'")
_SURPLUS = re.compile(r"^unrecognized arguments: (?P<option>\S+)")
_OF_KEY = re.compile(r'^Parser key "(?P<key>[^"]+)":\s*(?P<problem>.*)', re.DOTALL)
_GIVEN = re.compile(r"(?:Given value: |Got value: )(?P<value>.*)", re.DOTALL)
_NO_FILE = re.compile(r"^File does not exist: '(?P<file>.*)'")
_NEEDED = re.compile(r"^the following arguments are required: (?P<names>.*)")
_EXPECTED = re.compile(r"Expected a <class '(?P<kind>[\w.]+)'>")
_BULLET = re.compile(r"^\s*- (?P<problem>.+)$", re.MULTILINE)
_RESTRICTED = re.compile(r"does not conform to restriction v(?P<rule>\S+)")


class OptionError(Exception):
    """An option that cannot be; the message is one sentence."""


class CommandParser(argparse.ArgumentParser):
    """A parser that raises an `OptionError` in place of ending the process."""

    @override
    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        raise OptionError(reworded(message, known))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the names nearest to one, in words; empty if none is near.

    Example:
        >>> nearest("--kep", ["--keep", "--metric"])
        '; did you mean --keep?'
    """
    names = list(known)
    found = get_close_matches(name, names, 3, 0.8) or get_close_matches(name, names, 1, 0.6)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def command_error(command: str, commands: Sequence[str]) -> OptionError:
    """Return what is said of a command that there is not."""
    told = f"There is no command {command!r}{nearest(command, commands)}" if command else "Name a command"
    end = "" if told.endswith("?") else "."
    return OptionError(f"{told}{end} The commands are {', '.join(commands)}.")


# -- the parser's words ------------------------------------------------------------------------------------------------


def reworded(message: str, known: Sequence[str], typed: Sequence[str] = (), names: Sequence[str] = ()) -> str:
    """Return what a parser says in one sentence that names the option and what is nearest.

    Args:
        message: What it says.
        known: The options, with their dashes.
        typed: The command line.
        names: Classes that may be named without their path.
    """
    for pattern in (_UNKNOWN, _UNKNOWN_KEY, _SURPLUS):
        unknown = pattern.match(message)
        if unknown:
            return _no_such_option(unknown["option"], known, typed)
    needed = _NEEDED.match(message)
    if needed:
        return f"What is needed is not given: {_as_options(needed['names'])}; a --config may name it."
    of_key = _OF_KEY.match(message)
    if of_key:
        return _wrong_value(_full(of_key["key"], typed), of_key["problem"], names)
    return _one_line(message)


def _no_such_option(option: str, known: Sequence[str], typed: Sequence[str]) -> str:
    option = _full(option.partition("=")[0], typed)
    last = _last(option)
    told = f"There is no option {option}"
    named_alike = [one for one in known if _last(one) == last]
    if named_alike:
        return f"{told}; did you mean {' or '.join(named_alike[:3])}?"
    section = option.rpartition(".")[0]
    beside = [one for one in known if section and one.startswith(f"{section}.")]
    if not section:  # in a config, where the section is known that it stands in
        beside = [
            one for one in known if "." in one and _last(one) in get_close_matches(last, map(_last, known), 3, 0.8)
        ]
        if beside:
            return f"{told}; did you mean {' or '.join(beside)}?"
    hint = nearest(option, beside) or nearest(option, known)
    if hint:
        return f"{told}{hint}"
    return f"{told}: there are {', '.join(beside)}." if beside else f"{told}."


def _last(option: str) -> str:
    return option.rpartition(".")[2].lstrip("-")


def _full(key: str, typed: Sequence[str]) -> str:
    """Return an option as it was typed, from the end of its name; otherwise as it could be."""
    name = key.lstrip("-")
    for argument in typed:
        option = argument.partition("=")[0]
        if option.startswith("--") and (option[2:] == name or option.endswith(f".{name}")):
            return option
    return f"--{name}"


def _wrong_value(option: str, problem: str, names: Sequence[str]) -> str:
    no_file = _NO_FILE.match(problem)
    if no_file:
        return _no_config(option, no_file["file"].rpartition("/")[2])
    given = _GIVEN.search(problem)
    value = _one_line(given["value"]) if given else ""
    if "Expected a dot import path string" in problem:
        hint = nearest(value, names)
        remedy = "give the import path of the class, such as mypackage.MyClass"
        return f"{option} names {value!r}, which is no class that is known{hint or f': {remedy}.'}"
    rules = [f"a number {found['rule']}" for found in _RESTRICTED.finditer(problem)]
    kinds = [_kind(found["kind"]) for found in _EXPECTED.finditer(problem)]
    expected = list(dict.fromkeys([*rules, *kinds]))
    reasons = list(_reasons(problem))
    if reasons:
        said_already = reasons[0].startswith(("There is no option", "--"))  # of a class in this place
        return reasons[0] if said_already else f"{option}: {reasons[0]}"
    if expected and given:
        return f"{option} takes {' or '.join(expected)}; got {value!r}."
    return f"{option}: {_one_line(problem)}"


def _no_config(option: str, path: str) -> str:
    from lightning_prune.cli.shipped_configs import FOLDER

    shipped = [file.stem for file in FOLDER.glob("*.yaml")]
    hint = nearest(path.removesuffix(".yaml"), shipped)
    return f"{option} names {path!r}, which is neither a file nor a config that ships{hint or '.'}"


def _reasons(problem: str) -> Iterator[str]:
    """Yield the reasons of those possibilities that are about the value, and not about its type."""
    for bullet in _BULLET.finditer(problem):
        text = bullet["problem"]
        if not text.startswith(("Expected a", "Does not validate", "Not of type")):
            yield _one_line(text)


def _kind(name: str) -> str:
    known = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "NoneType": "null"}
    return known.get(name, f"a {name.rpartition('.')[2]}")


def _as_options(names: str) -> str:
    options = [f"--{name.strip().rpartition('.')[2]}" for name in names.split(",")]
    return " and ".join(options)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


# -- what options there are --------------------------------------------------------------------------------------------


def settings_of_class(kind: Any) -> list[str]:
    """Return the names of the arguments of a class, and of those that it hands on to its bases.

    Example:
        >>> class Base:
        ...     def __init__(self, width: int = 3): ...
        >>> class Derived(Base):
        ...     def __init__(self, depth: int = 2, **settings): ...
        >>> settings_of_class(Derived)
        ['depth', 'width']
    """
    names: dict[str, None] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        for one in parameters:
            if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
                names[one.name] = None
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    names.pop("self", None)
    return list(names)
