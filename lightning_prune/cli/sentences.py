"""Errors as one sentence: what this package refuses needs no traceback, what a project does wrong does."""

import re
import traceback
from pathlib import Path

__all__ = ["is_refusal", "sentence"]

_PACKAGE = str(Path(__file__).parents[1])
_REFUSALS = (ValueError, TypeError, OSError, ImportError)
_OF_PARSER = "Does not validate against any of the Union subtypes"  # what a constructor has refused
_UNWRITTEN = re.compile("PytorchStreamWriter failed|unexpected pos .* vs")  # what torch says of a full disk
_OF_LIGHTNING = "MisconfigurationException"  # by name: Lightning may not have been imported


def is_refusal(error: BaseException, runs_projects: bool) -> bool:
    """Tell whether an error says by itself what is wrong, so that nobody needs to see where it was raised.

    Args:
        error: What was raised.
        runs_projects: Whether code of a project has run, whose own errors are to be found by their traceback.
    """
    if type(error).__name__ == _OF_LIGHTNING:
        return True
    if isinstance(error, RuntimeError) and _UNWRITTEN.search(str(error)):
        return True
    if not isinstance(error, _REFUSALS):
        return False
    if str(error).startswith(_OF_PARSER):
        return True
    if isinstance(error, OSError) and not runs_projects:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].filename.startswith(_PACKAGE):
        return False
    return (frames[-1].line or "").startswith("raise")  # which a mistake in the package is not


def sentence(error: BaseException) -> str:
    r"""Return what an error says, in one line.

    Example:
        >>> sentence(ValueError("keep is 2:  it must be\n at most 1."))
        'keep is 2: it must be at most 1.'
    """
    text = str(error) or type(error).__name__
    if _UNWRITTEN.search(text):
        return "A file could not be written: no space is left on its device, or it is not to be written to."
    if text.startswith(_OF_PARSER):
        reasons = re.findall(r"^\s*- (?!Expected a <class)(.+(?:\n(?!\s*- |Given value).*)*)", text, re.MULTILINE)
        text = reasons[0] if reasons else text
    return re.sub(r"\s+", " ", text).strip()
