"""Compile CUDA C++ to PTX with the NVRTC that comes with JAX's CUDA plugin, and launch it from a jitted function.

XLA launches it as it launches its own kernels, CUDA graphs included: the custom call `__gpu$xla.gpu.ptx` has the driver
assemble PTX and passes the addresses of operands and results, and nothing else: integers are written into the PTX. The
call is XLA's own, not a public interface; jaxlib has it in this form from 0.10.2 on.
"""

import ctypes
import ctypes.util
import functools
import glob
import importlib.util
import os
import re
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
        sizes = {"grid_x": grid[0], "grid_y": grid[1], "grid_z": 1, "block_x": self.threads, "block_y": 1}
        sizes |= {"block_z": 1, "shared_mem_bytes": self.shared}
        numbers = ", ".join(f"{name} = {value} : i32" for name, value in sizes.items())
        run = jax.ffi.ffi_call(
            "__gpu$xla.gpu.ptx",
            list(results),
            vmap_method=None,
            input_output_aliases=aliases or {},
            custom_call_api_version=2,
            legacy_backend_config=(
                f'{{name = "{self.name}", kernel_type = "ptx", kernel_data = "{_escaped(self._with(integers))}", {numbers}}}'
            ),
        )
        return list(run(*operands))

    def _with(self, integers: Sequence[int]) -> str:
        """Give the PTX without its last parameters, which become constants."""
        ptx = self.ptx
        first = len(re.findall(rf"\.param \S+ {self.name}_param_\d+,?\n", ptx)) - len(integers)
        for i, value in enumerate(integers):
            name = f"{self.name}_param_{first + i}"
            ptx = re.sub(rf",?\s*\.param \.u32 {name}(?=[,\s])", "", ptx, count=1)
            ptx = re.sub(rf"ld\.param\.u32(\s+%r\d+), \[{name}\];", rf"mov.u32\1, {value};", ptx)
            assert name not in ptx, name
        return ptx


def _escaped(text: str) -> str:
    """Write text as the inside of a string of MLIR."""
    return re.sub(r'[^ !#-\[\]-~]', lambda found: f"\\{ord(found[0]):02X}", text)


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
        ptx = _text(nvrtc, program, "PTX")
        return _for_older_drivers(ptx) if capability < (10, 0) else ptx
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _for_older_drivers(ptx: str) -> str:
    """Lower the version of PTX, since a driver assembles none newer than itself, and leave out hints of newer ones."""
    return re.sub(r"\.version \S+|\.pragma \"used_bytes_mask [^\n]*", _lowered, ptx)


def _lowered(found: re.Match[str]) -> str:
    return ".version 7.8" if found[0].startswith(".version") else ""


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
