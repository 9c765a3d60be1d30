"""Compile CUDA C++ to PTX with the NVRTC that comes with JAX's CUDA plugin, and launch it from a jitted function.

The launcher is the one that jaxlib brings along for Triton kernels: it takes any PTX, assembles it once a device,
passes the operands' and results' addresses and then the 32-bit integers, and works in CUDA graphs.
"""

import ctypes
import ctypes.util
import functools
import glob
import importlib.resources
import importlib.util
import os
import zlib
from collections.abc import Sequence

import jax


class Kernel:
    """One compiled kernel: its name, PTX, threads a block, and bytes of dynamic shared memory."""

    def __init__(self, name: str, source: str, *, threads: int, capability: tuple[int, int], shared: int = 0):
        self.name, self.threads, self.capability, self.shared = name, threads, capability, shared
        self.ptx = compile_ptx(source, capability)

    def __call__(
        self,
        operands: Sequence[jax.Array],
        integers: Sequence[int],
        results: Sequence[jax.ShapeDtypeStruct],
        *,
        grid: tuple[int, int],
        aliases: dict[int, int] | None = None,
    ) -> list[jax.Array]:
        """Run it over `grid` blocks; `aliases` maps operands to the results that share their buffers."""
        from jaxlib import gpu_triton  # only there with a GPU plugin

        major, minor = self.capability
        kernel = gpu_triton.TritonKernel(
            self.name, self.threads // 32, 1, self.shared, self.ptx, "", 10 * major + minor
        )
        parameters = [gpu_triton.create_array_parameter(0, 16) for _ in (*operands, *results)]
        parameters += [gpu_triton.create_scalar_parameter(int(value), "i32") for value in integers]
        call = gpu_triton.TritonKernelCall(kernel, *grid, 1, parameters)
        opaque = zlib.compress(call.to_proto(self.name, b""))
        run = jax.ffi.ffi_call(
            "triton_kernel_call_ffi", list(results), vmap_method=None, input_output_aliases=aliases or {}
        )
        return list(run(*operands, opaque=opaque))


def capability() -> tuple[int, int] | None:
    """Give the lowest compute capability among the NVIDIA GPUs that JAX sees, or None where there are none."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return None
    return min(tuple(int(part) for part in device.compute_capability.split(".")) for device in devices)  # pyright: ignore


def available() -> bool:
    """Say whether JAX sees NVIDIA GPUs and the kernels run on all of them: they need compute capability 8.0."""
    lowest = capability()
    return lowest is not None and lowest >= (8, 0)


def source(*parts: str) -> str:
    """Put a source together: files of `sources/` after the ones all need, and text that is no file's name."""
    folder = importlib.resources.files("jaxquant._kernels") / "sources"
    files = ("intrinsics.cuh", "rotate.cuh", *parts)
    return "\n".join((folder / part).read_text() if part.endswith((".cu", ".cuh")) else part for part in files)


def constants(values: dict[str, int]) -> str:
    """Give the text that defines constants of these names.

    Example:
        >>> constants({"D": 128})
        'constexpr int D = 128;'
    """
    return "\n".join(f"constexpr int {name} = {value};" for name, value in values.items())


@functools.cache
def compile_ptx(source: str, capability: tuple[int, int]) -> str:
    """Compile CUDA C++ for a compute capability.

    Raises:
        RuntimeError: NVRTC is not there, or does not accept the source; its log is in the message.
    """
    nvrtc = _library()
    program = ctypes.c_void_p()
    options = [f"--gpu-architecture=compute_{capability[0]}{capability[1]}".encode(), b"--std=c++17"]
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"jaxquant.cu", 0, None, None))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if status:
            raise RuntimeError(f"NVRTC refused a kernel: {_text(nvrtc, program, 'ProgramLog')}")
        return _text(nvrtc, program, "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.value.decode()


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(status).decode()}")


@functools.cache
def _library() -> ctypes.CDLL:
    """Load NVRTC from the `nvidia-cuda-nvrtc` wheel, or from the system."""
    candidates = []
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations or []) if nvidia else []:
        candidates += sorted(glob.glob(os.path.join(folder, "*", "lib", "libnvrtc.so.*")), reverse=True)
    found = ctypes.util.find_library("nvrtc")
    candidates += [found] if found else []
    for candidate in candidates:
        folder = os.path.dirname(candidate)
        try:
            # A wheel's NVRTC looks for its built-ins by name alone, and finds them if they are loaded.
            for builtins in glob.glob(os.path.join(folder, "libnvrtc-builtins.so.*")) if folder else []:
                ctypes.CDLL(builtins)
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise RuntimeError(
        "the CUDA kernels need NVRTC, which pip installs with jax[cuda12] or jax[cuda13]: no libnvrtc found"
    )
