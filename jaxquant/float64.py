"""Find what is computed or stored in float64 (or complex128): twice the memory, and a fraction of the speed.

With `jax_enable_x64` one NumPy scalar is enough to widen everything after it. `leaves` looks at data, `operations` at
the program that JAX traces, and `hlo` at what the compiler made of it.
"""

import collections
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import PyTree

_JAX = str(Path(jax.__file__).parent)
WIDE = (np.dtype("float64"), np.dtype("complex128"))


class Operation(NamedTuple):
    """An operation of a traced program that gives float64.

    Attributes:
        name: of the primitive.
        shapes: of its wide results.
        where: line and function outside JAX, as far as it is known.
        widens: none of its array inputs is wide: here float64 enters.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    where: str
    widens: bool


def leaves(tree: PyTree[Any]) -> dict[str, tuple[int, ...]]:
    """Give the shapes of a tree's float64 leaves by their paths.

    Example:
        >>> leaves({"a": np.zeros(3), "b": np.zeros(3, np.float32)})
        {"['a']": (3,)}
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if _is_wide(leaf):
            found[jax.tree_util.keystr(path)] = tuple(np.shape(leaf))
    return found


def narrow(tree: PyTree[Any]) -> PyTree[Any]:
    """Cast float64 leaves to float32 and complex128 to complex64; leave the others.

    Example:
        >>> leaves(narrow({"a": np.zeros(3)}))
        {}
    """

    def cast(leaf: Any) -> Any:
        if not _is_wide(leaf):
            return leaf
        return jnp.asarray(leaf, jnp.complex64 if leaf.dtype == WIDE[1] else jnp.float32)

    return jax.tree.map(cast, tree)


def operations(f: Callable[..., Any], *args: Any) -> list[Operation]:
    """List the operations of a function that give float64, in program order, with loops and branches opened.

    Args:
        f: a function of arrays.
        args: arrays, or `jax.ShapeDtypeStruct`s.

    Example:
        >>> with jax.enable_x64(True):
        ...     found = operations(lambda x: x * np.float64(2), jnp.ones(3, jnp.float32))
        >>> [operation.name for operation in found], found[0].widens
        (['convert_element_type', 'mul'], True)
    """
    return list(_operations(jax.make_jaxpr(f)(*args).jaxpr))


def hlo(f: Callable[..., Any], *args: Any) -> dict[str, int]:
    """Count the float64 instructions of the compiled program by opcode, constants and parameters included.

    Args:
        f: a function of arrays.
        args: arrays, or `jax.ShapeDtypeStruct`s.

    Example:
        >>> hlo(lambda x: x * 2, jnp.ones(3))
        {}
    """
    text = jax.jit(f).lower(*args).compile().as_text() or ""
    return dict(collections.Counter(re.findall(r"= (?:f64|c128)\[[\d,]*\](?:\{[^}]*\})? ([\w-]+)\(", text)))


def _operations(jaxpr: core.Jaxpr) -> Iterator[Operation]:
    for equation in jaxpr.eqns:
        inner = [part for value in equation.params.values() for part in _jaxprs(value)]
        for part in inner:
            yield from _operations(part)
        wide = [tuple(getattr(out.aval, "shape", ())) for out in equation.outvars if _is_wide(out.aval)]
        if wide and not inner:
            entered = any(_is_wide(x.aval) for x in equation.invars)
            yield Operation(equation.primitive.name, tuple(wide), _where(equation), not entered)


def _where(equation: core.JaxprEqn) -> str:
    """Give the innermost line outside JAX."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not frame.file_name.startswith(_JAX):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return ""


def _jaxprs(value: Any) -> Iterator[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _jaxprs(part)


def _is_wide(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and dtype in WIDE  # NumPy takes None for float64
