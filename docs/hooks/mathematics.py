"""Formulas become MathML when the site is built: no script, no font and no network when it is read."""

import html
import re
from typing import Any

from latex2mathml import converter

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>([,.;:)]?)', re.DOTALL)


def on_page_content(text: str, **_: Any) -> str:
    """Convert what `pymdownx.arithmatex` left as TeX."""
    return FORMULA.sub(_converted, text)


def _converted(match: re.Match[str]) -> str:
    """Convert one formula; a mark behind it stays on its line.

    Raises:
        ValueError: TeX that `latex2mathml` does not know.
    """
    source, block, after = html.unescape(match[2]).strip(), match[1] == "div", match[3]
    formula = converter.convert(source, display="block" if block else "inline")
    if "\\" in formula:
        raise ValueError(f"no MathML for {source}")
    if block:
        return f'<div class="formula">{formula}</div>{after}'
    return f'<span style="white-space: nowrap">{formula}{after}</span>' if after else formula
