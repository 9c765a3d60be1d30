"""Run the CUDA kernels on a CPU: g++ compiles them together with `warp.h`, where a warp's lanes are fibres.

Where JAX has an NVIDIA GPU they run there, and what is emulated elsewhere is tested on it.
"""

import contextlib
import ctypes
import functools
import hashlib
import pathlib
import re
import subprocess
import tempfile
import threading
from typing import Any
from unittest import mock

import jax
import numpy as np

from jaxquant import _attention, _cache
from jaxquant._kernels import cuda, cuda_blocks, cuda_encode, cuda_trellis, nvrtc

_HEADER = pathlib.Path(__file__).with_name("warp.h")


_COMPILE = ("g++", "-std=c++17", "-O1", "-w", "-fPIC")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """Make a folder with `warp.h`, precompiled since that takes longer than a kernel."""
    folder = tempfile.TemporaryDirectory(prefix="jaxquant-emulated-")
    header = pathlib.Path(folder.name) / _HEADER.name
    header.write_text(_HEADER.read_text())
    subprocess.run([*_COMPILE, "-x", "c++-header", header], check=True)
    return folder


@functools.cache
def _library(name: str, source: str) -> ctypes.CDLL:
    body = f'#include "{_HEADER.name}"\n' + source.split("// end of intrinsics.cuh\n", 1)[1]
    signature = re.search(rf"\b{name}\((.*?)\) {{", body, re.DOTALL)
    assert signature
    arguments, pointers, integers = [], 0, 0
    for argument in signature[1].split(","):
        if "*" in argument:
            arguments.append(f"Any{{p[{pointers}]}}")
            pointers += 1
        else:
            arguments.append(f"s[{integers}]")
            integers += 1
    body += (
        'extern "C" void run(void** p, int* s, int x, int y, int threads) '
        f"{{ launch(x, y, threads, [&] {{ {name}({', '.join(arguments)}); }}); }}\n"
    )
    stem = pathlib.Path(_folder().name) / hashlib.sha256(body.encode()).hexdigest()[:16]
    stem.with_suffix(".cpp").write_text(body)
    command = [*_COMPILE, "-shared", "-o", f"{stem}.so", f"{stem}.cpp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[:4000]
    return ctypes.CDLL(f"{stem}.so")


_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def installed(*, cores: int = 132, replace: tuple[str, str] | None = None, swap: dict[int, int] | None = None):
    """Let "cuda" run here.

    Args:
        cores: multiprocessors to pretend.
        replace: a mistake to plant: text of the sources, and what stands there instead.
        swap: another: operands of `decode` that others are passed for.
    """
    original, found = nvrtc.source, []

    def source(*parts: str) -> str:
        text = original(*parts)
        if replace:
            found.append(replace[0] in text)
            text = text.replace(*replace)
        return text

    def forget() -> None:
        for made in (cuda.kernels, cuda_encode.kernel, cuda_trellis.kernel):
            made.cache_clear()
        traced: Any = (_attention.decode, _cache.append)
        for function in traced:
            function.clear_cache()

    kernel: Any = nvrtc.Kernel if nvrtc.available() else Kernel
    if swap:
        kernel = functools.partial(_swapped(kernel), swap)
    forget()
    try:
        with (
            mock.patch.object(nvrtc, "Kernel", kernel),
            mock.patch.object(nvrtc, "source", source),
            mock.patch.object(cuda_blocks, "cores", return_value=cores),
        ):
            yield
    finally:
        forget()
    assert not replace or any(found), f"no source has {replace[0]}"


class Kernel(nvrtc.Kernel):
    """Stands in for `nvrtc.Kernel`."""

    def __init__(self, name, source, *, threads, capability, shared=0):
        self.name, self.source, self.threads = name, source, threads

    def __call__(self, operands, integers, results, *, grid, aliases=None):
        aliases = aliases or {}

        def run(*arrays):
            made = [_poisoned(result) for result in results]
            held = [np.array(array, order="C") for array in arrays]  # aligned copies
            for operand, result in aliases.items():
                made[result] = held[operand]
            addresses = [array.ctypes.data for array in (*held, *made)]
            with _ONE_AT_A_TIME:  # shared memory is static there
                _library(self.name, self.source).run(
                    (ctypes.c_void_p * len(addresses))(*addresses),
                    (ctypes.c_int * len(integers))(*integers),
                    *grid,
                    self.threads,
                )
            return made

        return jax.pure_callback(run, list(results), *operands)


def _swapped(base: type[nvrtc.Kernel]) -> type[nvrtc.Kernel]:
    class Swapped(base):
        def __init__(self, swap, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.swap = swap

        def __call__(self, operands, *args, **kwargs):
            if self.name == "decode":
                operands = [operands[self.swap.get(i, i)] for i in range(len(operands))]
            return super().__call__(operands, *args, **kwargs)

    return Swapped


def _poisoned(result: jax.ShapeDtypeStruct) -> np.ndarray:
    made = np.empty(result.shape, result.dtype)
    made.view(np.uint8)[...] = 0xFF
    return made
