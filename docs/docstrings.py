"""What the generator of the documentation has to know of the docstrings of this package."""

import re
from typing import Any

import griffe

TABLE = re.compile(r"^(=+ =+\n.*\n=+ =+)$", re.DOTALL | re.MULTILINE)


class Docstrings(griffe.Extension):
    """Read a section headed "Example:" as examples, with code after ``>>>``, and show tables as they stand."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring before it is parsed."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = TABLE.sub(r"```text\n\1\n```", text)
