"""The CUDA kernels compile without a GPU, and need no more registers, stack or instructions than they did."""

import importlib.util
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from jaxquant._kernels import cuda, cuda_encode, cuda_trellis, nvrtc

RELEASE = "13.0"  # of both compilers, that the numbers here are of; `pyproject.toml` pins it
H200, A100 = (9, 0), (8, 0)
BOOKS = {2: "UNIFORM", 3: "ANY", 4: "SIGNED", 8: "TABLE"}

# Registers and instructions on 2026-11-29, by bits of keys and values, query heads of a kv head, tiles, and capability.
DECODE = {
    (4, 4, 4, "wide", H200): (134, 2584),
    (4, 2, 4, "wide", H200): (138, 2336),
    (2, 2, 4, "wide", H200): (116, 2120),
    (3, 3, 4, "wide", H200): (128, 2496),
    (4, 4, 8, "wide", H200): (164, 2696),
    (4, 2, 8, "wide", H200): (168, 2448),
    (2, 2, 8, "wide", H200): (138, 2192),
    (3, 3, 8, "wide", H200): (148, 2672),
    (4, 4, 4, "narrow", H200): (117, 2056),
    (4, 2, 4, "narrow", H200): (114, 1936),
    (2, 2, 4, "narrow", H200): (101, 1824),
    (3, 3, 8, "narrow", H200): (128, 2128),
    (4, 4, 16, "narrow", H200): (168, 3136),
    (2, 2, 4, "wide", A100): (110, 2064),
    (4, 4, 4, "narrow", A100): (114, 2000),
    (4, 4, 8, "narrow", A100): (128, 2024),
    (3, 3, 8, "narrow", A100): (127, 2056),
}
ENCODE: dict[tuple, tuple[int, int]] = {  # by bits, capability and, where they are not 128 and bfloat16, dim and dtype
    (4, H200): (168, 3376),
    (2, H200): (168, 2920),
    (3, H200): (168, 3488),
    (4, A100): (168, 2976),
    (4, H200, 256): (254, 5656),
    (2, H200, 256): (246, 5152),
    (3, H200, 256): (255, 5872),
    (4, H200, 128, "float32"): (168, 2760),
    (4, H200, 256, "float32"): (255, 4424),
}
# Of trellis codes on 2026-11-29: attention by states of keys and values of 2 bits and query heads of a kv head, the
# search by bits and states.
DECODE_TRELLIS = {
    (64, 64, 4, H200): (127, 2168),
    (64, 64, 8, H200): (166, 2384),
    (64, 64, 16, H200): (248, 2984),
    (16, 32, 4, H200): (127, 2168),
}
ENCODE_TRELLIS = {
    (2, 16, H200): (116, 4344),
    (2, 64, H200): (80, 2248),
    (2, 128, H200): (80, 2072),
    (2, 256, H200): (96, 2640),
    (1, 256, H200): (80, 2232),
    (3, 64, H200): (168, 2992),
    (3, 256, H200): (168, 1856),
    (2, 128, A100): (79, 2584),
}
# Bytes stored and loaded; nothing elsewhere.
SPILLED = {
    (4, 4, 16, "narrow", H200): 100,
    (4, 4, 8, "narrow", A100): 20,
    (4, H200, 128, "float32"): 52,
    (4, H200, 256, "float32"): 476,
}


def assembler() -> str | None:
    """Find ptxas, in the wheel that goes with the wheel of NVRTC or on the PATH."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = (nvidia.submodule_search_locations or []) if nvidia else []
    wheels = [str(path) for folder in folders for path in Path(folder).glob("*/bin/ptxas")]
    return wheels[0] if wheels else shutil.which("ptxas")


def obstacle() -> str | None:
    path = assembler()
    if path is None:
        return "there is no ptxas"
    try:
        versions = {"NVRTC": nvrtc.compile_ptx("", H200)}
    except RuntimeError as error:
        return str(error)
    versions["ptxas"] = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    for name, text in versions.items():
        found = re.search(r"release (\d+\.\d+)", text)
        if not found or found[1] != RELEASE:
            return f"{name} is of release {found and found[1]}, not {RELEASE}"
    return None


@pytest.fixture(scope="module")
def ptxas() -> str:
    reason = obstacle()
    if reason:
        pytest.skip(reason)
    path = assembler()
    assert path
    return path


def measure(kernel: nvrtc.Kernel, ptxas: str, folder: Path) -> tuple[int, int, int]:
    """Assemble a kernel: registers, instructions, and bytes spilled, stores and loads together."""
    major, minor = kernel.capability
    source, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(kernel.ptx)
    command = [ptxas, "-v", f"-arch=sm_{major}{minor}", source, "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    used = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert used, done.stderr
    assert spilled, done.stderr
    return int(used[1]), instructions(cubin.read_bytes(), kernel.name), int(spilled[1]) + int(spilled[2])


def instructions(elf: bytes, name: str) -> int:
    """Count the instructions, of 16 bytes, of a kernel in an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    wanted, start = f".text.{name}\0".encode(), sections[names][4]
    (length,) = (section[5] for section in sections if elf[start + section[0] :].startswith(wanted))
    return length // 16


def decode(
    keys: int,
    values: int,
    group: int,
    tiles: str,
    capability: tuple[int, int],
    *,
    dim: int = 128,
    whole: bool = False,
) -> tuple[nvrtc.Kernel, nvrtc.Kernel]:
    return cuda.kernels(
        dim=dim,
        heads=group,
        bits=(keys, values),
        books=(BOOKS[keys], BOOKS[values]),
        scales=("float16", "float16"),
        queries="bfloat16",
        rounds=(1, 1),
        soft_cap=False,
        sliding=False,
        even=True,
        wide=tiles == "wide",
        whole=whole,
        capability=capability,
    )


def encode(bits: int, capability: tuple[int, int], dim: int = 128, given: str = "bfloat16") -> nvrtc.Kernel:
    return cuda_encode.kernel(
        dim=dim,
        bits=bits,
        book=BOOKS[bits],
        scales="float16",
        given=given,
        rounds=1,
        rule="preserve",
        capability=capability,
    )


def check(measured: tuple[int, int, int], usual: tuple[int, int], spill: int = 0) -> None:
    registers, count, spilled = measured
    assert spilled <= spill, "registers spill"
    assert registers <= 1.05 * usual[0], "more registers"
    assert count <= 1.05 * usual[1], "more instructions"


@pytest.mark.parametrize("config", DECODE, ids=str)
def test_decode_keeps_its_size(config, ptxas, tmp_path):
    check(measure(decode(*config)[0], ptxas, tmp_path), DECODE[config], SPILLED.get(config, 0))


@pytest.mark.parametrize("config", ENCODE, ids=str)
def test_encode_keeps_its_size(config, ptxas, tmp_path):
    check(measure(encode(*config), ptxas, tmp_path), ENCODE[config], SPILLED.get(config, 0))


def decode_trellis(keys: int, values: int, group: int, capability: tuple[int, int]) -> nvrtc.Kernel:
    return cuda.kernels(
        dim=128,
        heads=group,
        bits=(2, 2),
        books=("TRELLIS", "TRELLIS"),
        scales=("float16", "float16"),
        queries="bfloat16",
        rounds=(1, 1),
        soft_cap=False,
        sliding=False,
        even=True,
        wide=True,
        windows=(keys.bit_length() + 3, values.bit_length() + 3),
        capability=capability,
    )[0]


def encode_trellis(bits: int, states: int, capability: tuple[int, int]) -> nvrtc.Kernel:
    return cuda_trellis.kernel(
        dim=128,
        bits=bits,
        states=states,
        scales="float16",
        given="bfloat16",
        rounds=1,
        rule="preserve",
        capability=capability,
    )


def test_writing_whole_rows_keeps_its_size(ptxas, tmp_path):
    check(measure(decode(4, 4, 4, "wide", H200, whole=True)[0], ptxas, tmp_path), (149, 3088))


@pytest.mark.parametrize("config", DECODE_TRELLIS, ids=str)
def test_decode_of_trellis_codes_keeps_its_size(config, ptxas, tmp_path):
    kernel = decode_trellis(*config)
    check(measure(kernel, ptxas, tmp_path), DECODE_TRELLIS[config])
    assert kernel.shared <= 218 * 1024, "more shared memory than a multiprocessor has"


@pytest.mark.parametrize("config", ENCODE_TRELLIS, ids=str)
def test_search_keeps_its_size(config, ptxas, tmp_path):
    bits, states, _ = config
    kernel, shape = encode_trellis(*config), cuda_trellis.shape(128, bits, states)
    check(measure(kernel, ptxas, tmp_path), ENCODE_TRELLIS[config])
    assert shape.blocks * (kernel.shared + 1024) <= 227 * 1024, "blocks do not fit"


@pytest.mark.parametrize("capability", [H200, A100])
def test_combine_keeps_its_size(capability, ptxas, tmp_path):
    check(measure(decode(4, 4, 4, "narrow", capability)[1], ptxas, tmp_path), (60, 768))


def test_what_grew_is_seen(ptxas, tmp_path, monkeypatch):
    large = 4, 2, 8, "wide", H200
    registers, count, spilled = measure(decode(*large)[0], ptxas, tmp_path)
    fewer, shorter, _ = measure(decode(*large)[1], ptxas, tmp_path)
    with pytest.raises(AssertionError, match="more registers"):
        check((registers, count, spilled), (fewer, count))
    with pytest.raises(AssertionError, match="more instructions"):
        check((registers, count, spilled), (registers, shorter))
    original = nvrtc.source
    tight = "constexpr int BLOCKS = 1;", "constexpr int BLOCKS = 2;"
    monkeypatch.setattr(nvrtc, "source", lambda *parts: original(*parts).replace(*tight))
    cuda.kernels.cache_clear()
    measured = measure(decode(*large)[0], ptxas, tmp_path)
    cuda.kernels.cache_clear()
    with pytest.raises(AssertionError, match="registers spill"):
        check(measured, DECODE[large])


def test_nvrtc_says_what_it_refuses(ptxas):
    with pytest.raises(RuntimeError, match=r'NVRTC refused a kernel: .*identifier "nonsense" is undefined'):
        nvrtc.compile_ptx("__device__ int x = nonsense;", H200)
