"""The public fixtures and synthetic sets of QATQ, from their formulas, and harder ones of our own."""

import numpy as np


def _lcg(state: int) -> int:
    return (state * 1664525 + 1013904223) & 0xFFFFFFFF


def _truncated(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 words, to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def ramp() -> np.ndarray:
    state, states = 0x51415451, []
    for _ in range(8192):
        state = _lcg(state)
        states.append(state)
    index = np.arange(8192)
    base = (np.array(states) >> 16).astype(np.float32) / np.float32(65535) * np.float32(2) - np.float32(1)
    trend = ((index % 257).astype(np.float32) - np.float32(128)) / np.float32(512)
    return _truncated(base * np.float32(0.75) + trend)


def wave() -> np.ndarray:
    x = np.arange(16384, dtype=np.float32)
    sine = np.sin((x / np.float32(37)).astype(np.float64)).astype(np.float32)
    cosine = np.cos((x / np.float32(211)).astype(np.float64)).astype(np.float32)
    return _truncated(sine * np.float32(0.5) + cosine * np.float32(0.125))


def noisy() -> np.ndarray:
    state, words = 0x9E3779B9, []
    for index in range(12288):
        state = _lcg(state ^ index)
        words.append((state >> 31) << 31 | (124 + state % 6) << 23 | (state & 0x7FFFFF))
    return np.array(words, np.uint32).view(np.float32)


def stress() -> np.ndarray:
    index = np.arange(4096, dtype=np.uint32)
    special = [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0x7FA12345, 0x3F800000, 0xBF800000]
    return (np.array(special, np.uint32)[index % 8] ^ (index & 255)).view(np.float32)


PUBLIC = {"ramp": (ramp, 12509), "wave": (wave, 7554), "noisy": (noisy, 32108), "stress": (stress, 199)}


def synthetic() -> dict[str, np.ndarray]:
    """Return QATQ's synthetic f32 benchmark sets."""
    x = np.arange(16384, dtype=np.float64)
    row, column = x // 128, x % 128
    kv = (np.sin(column * 0.113) * 0.9 + np.cos(column * 0.017 + row * 0.003) * 0.4 + np.sin(row * 0.071) * 0.2) / (
        1 + row * 0.0009
    )
    spikes = np.where(x % 251 == 0, 7, np.where(x % 113 == 0, -5.5, 0))
    delta = np.full(16384, 0x01020304, np.uint32)
    delta[0] = 0x3F000001
    return {
        "smooth-sine": (np.sin(x * 0.03125) * 2.5 + np.cos(x * 0.0078125) * 0.75).astype(np.float32),
        "kv-like": kv.astype(np.float32),
        "spiky": (np.sin(x * 0.041) * 0.8 + spikes).astype(np.float32),
        "bit-delta": np.bitwise_xor.accumulate(delta).view(np.float32),
    }


def native() -> dict[str, np.ndarray]:
    """Return QATQ's native bf16 experiments and its weak points, as bf16 words."""
    rng = np.random.default_rng(20)
    x = np.arange(65536)
    token, channel = x // 128, x % 128
    values = rng.standard_normal(65536)
    masked = np.zeros(65536, np.float32)
    masked[rng.random(65536) < 0.5] = -np.inf
    return {
        "smooth-wave": bf16(np.sin(x / 97) * 0.5 + np.cos(x / 997) * 0.125),
        "slow-ramp": bf16(-1 + 2 * x / 65536),
        "piecewise": bf16(np.sin(channel / 19) * 0.375 + np.cos(token / 113) * 0.0625),
        "random": rng.integers(0, 65536, 65536).astype(np.uint16),
        "repeated-rows": (0x3D00 + channel * 101).astype(np.uint16),
        "drifting-rows": (0x3D00 + channel * 101 + token // 32).astype(np.uint16),
        "adjacent-smooth": (0x3D00 + x // 4).astype(np.uint16),
        "normal": bf16(values),
        "sparse-70": bf16(np.where(rng.random(65536) < 0.7, 0, values)),
        "sparse-60": bf16(np.where(rng.random(65536) < 0.6, 0, values)),
        "mask": bf16(masked),
        "padded": bf16(np.where(token < 384, values, 0)),
        "constant": bf16(np.ones(65536)),
        "constant-high": (0x3F00 + rng.integers(0, 256, 65536)).astype(np.uint16),
        "geometric-high": (
            (0x3C - np.minimum(rng.geometric(0.5, 65536), 8)) * 256 + rng.integers(0, 256, 65536)
        ).astype(np.uint16),
        "int8-like": bf16(rng.integers(-127, 128, 65536) * 0.0123),
        "zero": np.zeros(65536, np.uint16),
    }


def channels(tokens: int, width: int = 1024, seed: int = 1) -> np.ndarray:
    """Return KV-like bf16 words: log-normal scales and offsets per channel, tokens correlated by 0.9."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal(width) * 0.7).astype(np.float32)
    offset = (rng.standard_normal(width) * 0.5).astype(np.float32)
    state = rng.standard_normal(width, np.float32)
    out = np.empty((tokens, width), np.uint16)
    for token in range(tokens):
        state = np.float32(0.9) * state + np.float32(0.43589) * rng.standard_normal(width, np.float32)
        out[token] = bf16(state * scale + offset)
    return out
