"""Docstrings say "Example:", and commands stand alone, which their reader takes for prose: show both as code."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the sections, and indent commands, before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Do so for one function, class or module."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"(?<=\n\n)(?=python )", "    ", text)
