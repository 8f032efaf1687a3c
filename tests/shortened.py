"""What the ordinary suite leaves out of a list of cases, so that it takes minutes; the long run has all of it."""

from collections.abc import Iterable
from typing import Any

import pytest

WAYS = ("default", "taylor", "sensitiveness", "rl_joint")
"""Rows of the battery, one for each way of finding a plan."""


def ordinary(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Return the cases of a test, of which all but some are for the long run.

    Args:
        cases: Values of one argument, or tuples of several.
        kept: The cases that the ordinary suite has too.
    """
    found = []
    for case in cases:
        marks = () if case in kept else pytest.mark.long
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=marks))
    missing = [case for case in kept if case not in list(cases)]
    assert not missing, f"{missing} are no cases"
    return found
