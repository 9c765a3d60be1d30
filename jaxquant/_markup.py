"""HTML and SVG as nested calls: text is escaped unless it was made here, so nothing that a file says becomes markup."""

import html


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Make an element.

    Args:
        name: of the element.
        children: elements, or text that is escaped.
        attributes: a trailing underscore is dropped, others become hyphens; None leaves an attribute out.

    Example:
        >>> tag("p", "a < b", tag("b", "!"), class_="note", aria_label='"')
        '<p class="note" aria-label="&quot;">a &lt; b<b>!</b></p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(child if isinstance(child, Markup) else html.escape(str(child)) for child in children)
    return Markup(f"<{name}{given}>{inside}" + ("" if name in _EMPTY else f"</{name}>"))


def join(*parts: Markup) -> Markup:
    """Put elements one after another."""
    return Markup("".join(parts))


_EMPTY = {"meta"}
