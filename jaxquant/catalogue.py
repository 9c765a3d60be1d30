"""What there is in `jaxquant.methods`: for every file, its source, how to build it, and what it costs.

A file offers one of three functions, each of which takes a key first: `kv(key, *, dim, bits_k, bits_v)` returns the
quantizers of keys and of values; `pipeline`, with the same arguments, a whole `Pipeline`; and
`fit(key, *, bits_k, bits_v, ...)` returns a quantizer for every layer's keys and values, from statistics of a model:
its other required arguments are the names of attributes of `calibrate.statistics.Statistics`. More settings worth a row
of their own are in the dictionary `VARIANTS`.
"""

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import cache as caches
from jaxquant import methods, pipeline
from jaxquant.pipeline import Pipeline

FUNCTIONS = ("kv", "pipeline", "fit")
_HEAD = """# Methods

Every file of `jaxquant/methods`, as `jaxquant methods --markdown` prints this page. A file says what it does, where it
comes from and where it differs from it.

Bytes are those of a key and a value of 128 coordinates in a cache, for one kv head, with everything that is held;
pipelines are counted at a capacity of 1,024 tokens. Encoding and decoding are floating-point operations for each
coordinate, as XLA counts them before it optimizes; sines and logarithms, which PolarQuant needs, are not among them,
nor is what is paid once a query, and of loops one step: what the search of [trellis](trellis.md) takes is told there.
Methods are [measured side by side](methods-compared.md), too.

A method with `kv` or `pipeline` builds for any model, one with `fit` from statistics of the model:
`jaxquant eval --method NAME` does either. The others are for streams and guidance, which are no caches.
"""
_DIM, _CAPACITY, _TOKENS = 128, 1024, 64


class Method(NamedTuple):
    """One file.

    Attributes:
        name: of the file.
        summary: its first line.
        source: authors, title and arXiv id.
        differs: from the source.
        builders: for each setting, "" for the usual one, a function that builds it.
    """

    name: str
    summary: str
    source: str
    differs: str
    builders: dict[str, Callable[..., Any]]


class Cost(NamedTuple):
    """What a method costs.

    Attributes:
        bits: a coordinate, of keys and of values.
        bytes_per_token: of key and value, for one kv head, everything included.
        encode: floating-point operations that XLA counts, for each coordinate of a key and a value.
        decode: likewise, to look codes up and scale them; rotations are paid once a query, not here.
    """

    bits: int
    bytes_per_token: float
    encode: float
    decode: float


def names() -> list[str]:
    """List the files, without importing them.

    Example:
        >>> "turboquant" in names()
        True
    """
    return [module.name for module in pkgutil.iter_modules(methods.__path__)]


def entries() -> dict[str, Method]:
    """Read the files, in the order of their names.

    Example:
        >>> "2504.19874" in entries()["turboquant"].source
        True
    """
    return {name: read(name, importlib.import_module(f"{methods.__name__}.{name}")) for name in names()}


def find(method: str, *functions: str) -> Any:
    """Turn the name of a file, or `package.module:Object`, into what it names.

    Args:
        method: as users write it.
        functions: the first of these that a file has; those of `FUNCTIONS` by default.

    Raises:
        ValueError: there is no such file or object.

    Example:
        >>> find("turboquant").__name__
        'kv'
    """
    module, _, name = method.partition(":")
    if name:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"--method {method!r}: {error}") from None
    files = {entry: importlib.import_module(f"{methods.__name__}.{entry}") for entry in names()}
    available = {
        entry: getattr(file, function)
        for function in reversed(functions or FUNCTIONS)
        for entry, file in files.items()
        if hasattr(file, function)
    }
    if module not in available:
        raise ValueError(
            f"--method must be one of {', '.join(sorted(available))}, or package.module:Object, got {method!r}"
        )
    return available[module]


def wanted(builder: Callable[..., Any]) -> list[str]:
    """Name the statistics of a model that a builder asks for.

    Example:
        >>> from jaxquant.methods import oscar
        >>> wanted(oscar.fit)
        ['query_moments', 'weighted_values']
    """
    usual = {"dim", "bits_k", "bits_v"}
    parameters = inspect.signature(builder).parameters.values()
    asked = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    return [p.name for p in asked if p.name not in usual]


@functools.cache
def cost(builder: Callable[..., Any], *, dim: int = _DIM, bits: int = 4) -> Cost:
    """Count what a builder's result costs, without running it.

    Where `builder` only takes 8 bits, those are counted. Eviction is counted at a capacity of 1,024 tokens.

    Args:
        builder: one of a `Method`.
        dim: of the vectors.
        bits: a coordinate, of keys and of values.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> cost(turboquant.kv).bytes_per_token
        132.0
    """
    try:
        built = _build(builder, dim, bits)
    except ValueError:
        bits = 8
        built = _build(builder, dim, bits)
    shape: dict[str, Any] = {"layers": 1, "batch": 1, "kv_heads": 1, "capacity": _CAPACITY}
    if isinstance(built, Pipeline):
        held = pipeline.init(built, **shape).bytes_per_token
        pair = built.keys, built.values
    else:
        pair = tuple(half[0] if isinstance(half, tuple) else half for half in built)
        held = caches.init(*pair, **shape).bytes_per_token
    x = jax.ShapeDtypeStruct((1, 1, _TOKENS, dim), jnp.float32)
    counts = np.zeros(2)
    for quantizer in pair:
        code = jax.eval_shape(quantizer.quantize, x)
        counts += [_operations(quantizer.quantize, x), _operations(quantizer.expand, code)]
    encode, decode = counts / (2 * _TOKENS * dim)
    return Cost(bits=bits, bytes_per_token=held, encode=float(encode), decode=float(decode))


def page() -> str:
    """Write a page about every file, in Markdown; `jaxquant methods --markdown` prints it.

    Example:
        >>> page().splitlines()[0]
        '# Methods'
    """
    table = [
        "| method | what it does | bytes per token | encode | decode | built by |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries().values():
        link = f"[{entry.name}](../jaxquant/methods/{entry.name}.py)"
        if not entry.builders:
            table.append(f"| {link} | {entry.summary} | | | | |")
        for variant, builder in entry.builders.items():
            counted = cost(builder)
            name, summary = (f"{link}, {variant}", "") if variant else (link, entry.summary)
            size = f"{counted.bytes_per_token:.1f} at {counted.bits} bits"
            operations = f"{counted.encode:.0f} | {counted.decode:.0f}"
            table.append(f"| {name} | {summary} | {size} | {operations} | `{builder.__name__}` |")
    return "\n".join([_HEAD, *table]) + "\n"


def read(name: str, module: ModuleType) -> Method:
    """Read one file, of `jaxquant.methods` or from elsewhere."""
    text = inspect.getdoc(module) or ""
    usual = [getattr(module, function) for function in FUNCTIONS if hasattr(module, function)]
    return Method(
        name=name,
        summary=text.partition("\n")[0],
        source=_section(text, "References:"),
        differs=_section(text, "Differs from the paper"),
        builders=dict(zip(("",), usual, strict=False)) | getattr(module, "VARIANTS", {}),
    )


def _section(text: str, title: str) -> str:
    return " ".join(re.split(r"\n\n", text.partition(title)[2].strip())[0].split())


def _build(builder: Callable[..., Any], dim: int, bits: int) -> Any:
    random = np.random.default_rng(0)
    made: dict[str, Any] = {"dim": dim} if "dim" in inspect.signature(builder).parameters else {}
    for name in wanted(builder):
        x = random.normal(size=(1, 1, 4 * dim, dim))
        made[name] = np.einsum("lhsd,lhse->lhde", x, x) if "samples" not in name else x
    return builder(jax.random.key(0), bits_k=bits, bits_v=bits, **made)


def _operations(function: Callable[..., Any], *arguments: Any) -> float:
    found = jax.jit(function).lower(*arguments).cost_analysis()
    return float((found or {}).get("flops", 0.0))
