"""Formulas become MathML when the site is built: no script, no font and no network when it is read."""

import html
import re
from typing import Any

from latex2mathml import converter

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(text: str, **_: Any) -> str:
    """Convert what `pymdownx.arithmatex` left as TeX."""
    return FORMULA.sub(_converted, text)


def _converted(match: re.Match[str]) -> str:
    block = match[1] == "div"
    formula = converter.convert(html.unescape(match[2]).strip(), display="block" if block else "inline")
    return f'<div class="formula">{formula}</div>' if block else formula
