"""Pytree dataclasses as plain JSON values and named arrays, and back without running anything a file names.

A node is `{"array": name}`, `{"value": plain}`, `{"items": [nodes]}` or `{"class": "module:Name", "fields": {...}}`,
where static fields are plain values and the others nodes.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxquant.codecs.errors import CorruptError, UnsupportedError

_HOMES = re.compile(r"jaxquant\.(quantizers|mixed|rotations|codebooks|sketch|trellis|methods\.\w+)")
_PLAIN = bool | int | float | str


def name_of(kind: type) -> str:
    """Return the name under which a class is stored."""
    return f"{kind.__module__}:{kind.__qualname__}"


def describe(node: Any, name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Describe a node and put its arrays into `arrays`, under names that begin with `name`.

    Raises:
        TypeError: there is something in it that is neither an array, a plain value, a tuple nor a pytree dataclass.
    """
    if node is None or isinstance(node, _PLAIN):
        return {"value": node}
    if isinstance(node, jax.Array | np.ndarray | np.generic):
        arrays[name] = np.asarray(node)
        return {"array": name}
    if type(node) is tuple:
        return {"items": [describe(item, f"{name}/{i}", arrays) for i, item in enumerate(node)]}
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        raise TypeError(f"{name} is a {type(node).__name__}, which a file cannot hold")
    fields = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if not field.metadata.get("static"):
            fields[field.name] = describe(value, f"{name}/{field.name}", arrays)
        elif _frozen(_thawed(value)) == value:
            fields[field.name] = _thawed(value)
        else:
            raise TypeError(f"{name}/{field.name} is static and a {type(value).__name__}, which a file cannot hold")
    return {"class": name_of(type(node)), "fields": fields}


def rebuild(node: Any, array: Callable[[str], Array], classes: dict[str, type]) -> Any:
    """Invert `describe`.

    Args:
        node: what `describe` returned, or anything else that JSON can hold.
        array: gives the array of a name.
        classes: by name, those from outside of jaxquant's own quantizers, rotations, codebooks, sketches, trellises
            and methods.

    Raises:
        UnsupportedError: it names a class that is not allowed, or whose fields are others here.
        CorruptError: it is no description.
    """
    match node:
        case {"array": str(name)}:
            return array(name)
        case {"value": value} if value is None or isinstance(value, _PLAIN):
            return value
        case {"items": list(items)}:
            return tuple([rebuild(item, array, classes) for item in items])
        case {"class": str(name), "fields": dict(fields)}:
            kind = _resolved(name, classes)
            declared = {field.name: field.metadata.get("static") for field in dataclasses.fields(kind)}
            if fields.keys() != declared.keys():
                raise UnsupportedError(f"{name} has the fields {list(declared)} here, but {list(fields)} in the file")
            made = {}
            for field, value in fields.items():
                made[field] = _frozen(value) if declared[field] else rebuild(value, array, classes)
            return kind(**made)
        case _:
            raise CorruptError(f"{str(node)[:80]!r} describes no array, value or object")


def _resolved(name: str, classes: dict[str, type]) -> Any:
    if name in classes:
        return classes[name]
    module, _, attribute = name.partition(":")
    if not _HOMES.fullmatch(module):
        raise UnsupportedError(f"the file names the class {name!r}, which only a caller can allow, by classes=")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        found = None
    if not isinstance(found, type) or not dataclasses.is_dataclass(found) or name_of(found) != name:
        raise UnsupportedError(f"the file names the class {name!r}, which this version of jaxquant does not have")
    return found


def _thawed(value: Any) -> Any:
    """Turn tuples into the lists that JSON makes of them."""
    return [_thawed(item) for item in value] if type(value) is tuple else value


def _frozen(value: Any) -> Any:
    """Invert `_thawed`; None for what no static field holds."""
    if isinstance(value, list):
        return tuple([_frozen(item) for item in value])
    return value if isinstance(value, _PLAIN) else None
