"""Docstrings say "Example:", which their reader takes for prose: show it as code that was run."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the sections before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Do so for one function, class or module."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
