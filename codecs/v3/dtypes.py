"""The number formats a file can hold, by name, and how their bit patterns divide into words."""

import functools
import importlib
from dataclasses import dataclass

import numpy as np

from jaxquant.codecs.errors import UnsupportedError


@dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        itemsize: bytes per element.
        word: bytes per word; a complex element is two words.
        exponent_bits: of one word read as a float, 0 for everything else.
    """

    itemsize: int
    word: int
    exponent_bits: int = 0


_NUMPY = {
    "bool": Format(1, 1),
    "float16": Format(2, 2, 5),
    "float32": Format(4, 4, 8),
    "float64": Format(8, 8, 11),
    "complex64": Format(8, 4, 8),
    "complex128": Format(16, 8, 11),
} | {f"{sign}int{8 * size}": Format(size, size) for sign in ("", "u") for size in (1, 2, 4, 8)}

_ML_DTYPES = (
    {
        "bfloat16": Format(2, 2, 8),
        "float8_e3m4": Format(1, 1, 3),
        "float8_e4m3": Format(1, 1, 4),
        "float8_e4m3b11fnuz": Format(1, 1, 4),
        "float8_e4m3fn": Format(1, 1, 4),
        "float8_e4m3fnuz": Format(1, 1, 4),
        "float8_e5m2": Format(1, 1, 5),
        "float8_e5m2fnuz": Format(1, 1, 5),
    }
    | {name: Format(1, 1) for name in ("float8_e8m0fnu", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn")}
    | {f"{sign}int{bits}": Format(1, 1) for sign in ("", "u") for bits in (2, 4)}
)

FORMATS = _NUMPY | _ML_DTYPES


@functools.cache
def name_of(dtype: np.dtype) -> str:
    """Return the name under which a dtype is stored.

    Raises:
        TypeError: the dtype cannot be stored.
    """
    if dtype.name not in FORMATS or dtype.itemsize != FORMATS[dtype.name].itemsize:
        raise TypeError(f"dtype {dtype} cannot be stored; allowed: {', '.join(FORMATS)}")
    return dtype.name


def named(name: str) -> np.dtype:
    """Return the NumPy dtype of a stored name, importing ml_dtypes if the name is one of its own.

    Raises:
        UnsupportedError: the name is unknown, or ml_dtypes is missing or too old to have it.
    """
    if name in _NUMPY:
        return np.dtype(name)
    if name not in _ML_DTYPES:
        raise UnsupportedError(f"dtype {name!r} is unknown")
    try:
        return np.dtype(getattr(importlib.import_module("ml_dtypes"), name))
    except (ImportError, AttributeError):
        raise UnsupportedError(f"dtype {name!r} needs a version of ml_dtypes that has it") from None
