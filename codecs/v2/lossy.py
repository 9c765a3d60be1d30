"""QATQ's four-bit comparison modes, and the predictor of exact strategy 0 which shares their arithmetic.

They are lossy and were never meant for storage; a compatible reader needs them. All arithmetic is IEEE single
precision in the order written here, because strategy 0 is exact only if every rounding is the same.
"""

import numpy as np

SEED = 0x51415451C0DE0001
_GOLDEN = 0x9E3779B97F4A7C15
_LANES = 1 << 14
_NORM = 1.2533141  # sqrt(pi / 2), the mean of |x| of a unit normal inverted


def finite(values: np.ndarray) -> np.ndarray:
    """Return the values with 0 in place of every NaN and infinity."""
    return np.where(np.isfinite(values), values, np.float32(0))


def quantize(values: np.ndarray) -> tuple[np.float32, np.ndarray]:
    """Return the scale, a seventh of the largest finite magnitude, and the codes 1 to 15 of every value.

    Raises:
        ValueError: The largest magnitude is so small that the scale underflows to zero.
    """
    largest = np.max(np.abs(finite(values)), initial=np.float32(0))
    scale = largest / np.float32(7) if largest > 0 else np.float32(1)
    if scale == 0:
        raise ValueError(f"values: largest magnitude {largest} is too small for a four-bit scale")
    with np.errstate(over="ignore"):
        ratio = finite(values) / scale
    whole = np.trunc(ratio)
    whole += np.copysign(np.abs(ratio - whole) >= 0.5, ratio).astype(np.float32)
    return scale, (np.clip(whole, -7, 7) + 8).astype(np.uint8)


def dequantize(codes: np.ndarray, scale: np.float32) -> np.ndarray:
    """Return `(code - 8) * scale`."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (codes.astype(np.float32) - np.float32(8)) * scale


def pack(codes: np.ndarray) -> bytes:
    """Return two codes per byte, the first in the high half."""
    even = np.append(codes, np.zeros(codes.size % 2, np.uint8))
    return (even[0::2] << 4 | even[1::2]).tobytes()


def unpack(packed: np.ndarray, size: int) -> np.ndarray:
    """Return the first `size` codes of bytes written by `pack`."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:size]


def predict(codes: np.ndarray, signs: np.ndarray, scale: np.float32, residual: np.float32, seed: int) -> np.ndarray:
    """Rebuild values from rotated four-bit codes: mode 3, and the prediction of strategy 0.

    Args:
        codes: Codes of the rotated values, a multiple of four.
        signs: One byte per code, 1 where the residual is not negative.
        scale: Of the codes.
        residual: Mean magnitude of what the codes miss.
        seed: Of the rotations.

    Returns:
        As many values as codes.
    """
    values = np.empty(codes.size, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, codes.size, 4 * _LANES):
            part = slice(first, first + 4 * _LANES)
            rotated = dequantize(codes[part], scale) + np.where(signs[part], residual, -residual)
            lanes = rotated.reshape(-1, 4).T
            unit = _quaternions(seed, first // 4, lanes.shape[1])
            back = _product(_product(_conjugate(unit), lanes), unit)
            values[part] = np.stack(back, axis=1).reshape(-1)
    return values


def analyse(values: np.ndarray, seed: int) -> tuple[np.float32, np.ndarray, np.float32, np.ndarray]:
    """Rotate, quantise and measure what is missed: scale, codes, residual and signs for `predict`."""
    padded = np.zeros(-(-values.size // 4) * 4, np.float32)
    padded[: values.size] = finite(values)
    lanes = padded.reshape(-1, 4).T
    with np.errstate(over="ignore", invalid="ignore"):
        unit = _quaternions(seed, 0, lanes.shape[1])
        rotated = np.stack(_product(_product(unit, lanes), _conjugate(unit)), axis=1).reshape(-1)
        scale, codes = quantize(rotated)
        missed = rotated - dequantize(codes, scale)
        total = np.add.accumulate(np.abs(missed), dtype=np.float32)[-1] if missed.size else np.float32(0)
    residual = total / np.float32(missed.size) if missed.size else np.float32(0)
    if not np.isfinite(residual):
        raise ValueError(f"values: largest magnitude {np.max(np.abs(padded))} overflows the four-bit modes")
    return scale, codes, residual, (missed >= 0).astype(np.uint8)


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's output function."""
    value = value + np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _quaternions(seed: int, first: int, count: int) -> list[np.ndarray]:
    """Unit quaternions of lanes `first` to `first + count`."""
    lane = np.arange(first, first + count, dtype=np.uint64)
    state = np.uint64(seed) ^ lane * np.uint64(_GOLDEN) ^ np.uint64(0xA0761D6478BD642F)
    parts, norm = [], np.zeros(count, np.float32)
    for _ in range(4):
        state = _mix(state)
        part = (state >> np.uint64(40)).astype(np.float32) / np.float32(16777215) * np.float32(2) - np.float32(1)
        norm += part * part
        parts.append(part)
    tiny = norm <= np.float32(2**-23)
    root = np.sqrt(np.where(tiny, np.float32(1), norm))
    return [np.where(tiny, np.float32(axis == 0), part / root) for axis, part in enumerate(parts)]


def _conjugate(q) -> list[np.ndarray]:
    return [q[0], -q[1], -q[2], -q[3]]


def _product(a, b) -> list[np.ndarray]:
    """Hamilton product, every sum from left to right."""
    return [
        a[0] * b[0] - a[1] * b[1] - a[2] * b[2] - a[3] * b[3],
        a[0] * b[1] + a[1] * b[0] + a[2] * b[3] - a[3] * b[2],
        a[0] * b[2] - a[1] * b[3] + a[2] * b[0] + a[3] * b[1],
        a[0] * b[3] + a[1] * b[2] - a[2] * b[1] + a[3] * b[0],
    ]


def hadamard(values: np.ndarray, seed: int, *, inverse: bool = False) -> np.ndarray:
    """Flip signs, transform, scale by `1 / sqrt(size)`, flip signs again; size is a power of two."""
    streams = (0x54514657445F0002, 0x54514657445F0001) if inverse else (0x54514657445F0001, 0x54514657445F0002)
    out = values.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        _flip(out, seed ^ streams[0])
        width = 1
        while width < out.size:
            pairs = out.reshape(-1, 2, width)
            left = pairs[:, 0] + pairs[:, 1]
            np.subtract(pairs[:, 0], pairs[:, 1], out=pairs[:, 1])
            pairs[:, 0] = left
            width *= 2
        out *= np.float32(1) / np.sqrt(np.float32(max(out.size, 1)))
        _flip(out, seed ^ streams[1])
    return out


def _flip(values: np.ndarray, seed: int) -> None:
    """Negate in place where the seeded stream says so."""
    for first in range(0, values.size, _LANES):
        part = values[first : first + _LANES]
        index = np.arange(first, first + part.size, dtype=np.uint64)
        odd = _mix(np.uint64(seed) ^ index * np.uint64(_GOLDEN)) & np.uint64(1)
        np.negative(part, out=part, where=odd.astype(bool))


def sketch(values: np.ndarray, seed: int) -> tuple[np.float32, np.ndarray, np.float32, np.ndarray]:
    """Transform, quantise and sketch what is missed: scale, codes, norm and signs of mode 5."""
    padded = np.zeros(sketch_size(values.size), np.float32)
    padded[: values.size] = finite(values)
    scale, codes = quantize(hadamard(padded, seed))
    with np.errstate(over="ignore", invalid="ignore"):
        missed = padded - hadamard(dequantize(codes, scale), seed, inverse=True)
        total = np.add.accumulate(missed * missed, dtype=np.float32)[-1] if missed.size else np.float32(-0.0)
        norm = np.sqrt(total)
    if not np.isfinite(norm):
        raise ValueError(f"values: largest magnitude {np.max(np.abs(padded))} overflows the four-bit modes")
    signs = hadamard(missed, seed ^ 0x514A4C5F53524854)[:256] >= 0
    return scale, codes, norm, (signs | (norm == 0)).astype(np.uint8)


def unsketch(codes: np.ndarray, signs: np.ndarray, scale: np.float32, norm: np.float32, seed: int) -> np.ndarray:
    """Rebuild the padded values of mode 5."""
    values = hadamard(dequantize(codes, scale), seed, inverse=True)
    if norm > 0 and codes.size:
        wide = np.zeros(codes.size, np.float32)
        wide[: signs.size] = np.where(signs, np.float32(1), np.float32(-1))
        wide = hadamard(wide, seed ^ 0x514A4C5F53524854, inverse=True)
        with np.errstate(over="ignore", invalid="ignore"):
            values += np.float32(_NORM) / np.float32(signs.size) * norm * wide
    return values


def sketch_size(values: int) -> int:
    """Return the padded size of mode 5: the next power of two."""
    return values if values <= 1 else 1 << (values - 1).bit_length()
