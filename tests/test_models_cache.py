"""A decoder over a cache: however the input is cut or padded, an exact float32 cache gives the logits of no cache."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_folders import CONFIGS, TOKENS, tokens, write_folder

from jaxquant import models
from jaxquant.cache import KVCache
from jaxquant.methods import turboquant
from jaxquant.models.architecture import FAMILIES
from jaxquant.models.decoder import Decoder
from jaxquant.quantizers import Exact


def tolerance(expected: np.ndarray) -> float:
    return 100 * float(np.finfo(np.float32).eps) * float(np.abs(expected).max())


@pytest.fixture(scope="module", params=["mistral", "gemma3_text"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = write_folder(tmp_path_factory.mktemp(request.param), request.param)
    return models.load(folder, dtype=jnp.float32).decoder


@pytest.fixture(scope="module")
def plain(decoder: Decoder) -> np.ndarray:
    return np.asarray(jax.jit(lambda t: decoder(t)[0])(tokens()))


@pytest.fixture(scope="module")
def step(decoder: Decoder) -> Callable:
    graph, state = nnx.split(decoder)
    compiled = jax.jit(lambda cache, ids, mask: nnx.merge(graph, state)(ids, cache, mask=mask))
    return lambda cache, ids, mask=None: compiled(cache, jnp.asarray(ids), None if mask is None else jnp.asarray(mask))


def exact(decoder: Decoder, *, batch: int = 2, sinks: int = 0, window: int = 0) -> KVCache:
    whole = Exact(dim=decoder.architecture.dim, dtype="float32")
    return decoder.init_cache(
        whole, whole, batch=batch, capacity=TOKENS + 3, sinks=sinks, window=window, dtype=jnp.float32
    )


@pytest.mark.parametrize("chunks", [(TOKENS,), (8, 8, 8), (8, 1, 8, *[1] * 7)])
def test_chunks_equal_the_forward_pass_without_a_cache(
    decoder: Decoder, plain: np.ndarray, step: Callable, chunks: tuple[int, ...]
) -> None:
    cache, parts, first = exact(decoder), [], 0
    for size in chunks:
        logits, cache = step(cache, tokens()[:, first : first + size])
        parts.append(logits)
        first += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), plain, rtol=0, atol=tolerance(plain))
    assert cache.length.tolist() == [[TOKENS, TOKENS]] * decoder.architecture.layers


def test_sinks_and_window_of_an_exact_cache_change_nothing(decoder: Decoder, plain: np.ndarray, step: Callable) -> None:
    if decoder.architecture.family != "gemma3_text":
        pytest.skip("one family compiles for long enough; its layers have both kinds of window")
    cache = exact(decoder, sinks=2, window=5)
    first, cache = step(cache, tokens()[:, :16])
    second, cache = step(cache, tokens()[:, 16:])
    np.testing.assert_allclose(np.concatenate((first, second), axis=1), plain, rtol=0, atol=tolerance(plain))


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_padded_row_equals_the_row_without_padding(
    decoder: Decoder, plain: np.ndarray, step: Callable, side: str, cached: bool
) -> None:
    short = TOKENS - 5
    mask = np.ones((2, TOKENS), bool)
    mask[1, {"left": slice(None, 5), "right": slice(short, None), "inside": slice(4, 9)}[side]] = False
    ids = tokens()
    ids[1, ~mask[1]] = 7
    ids[1, mask[1]] = tokens()[1, :short]
    logits, cache = step(exact(decoder) if cached else None, ids, mask)
    np.testing.assert_allclose(logits[0], plain[0], rtol=0, atol=tolerance(plain))
    np.testing.assert_allclose(np.asarray(logits)[1, mask[1]], plain[1, :short], rtol=0, atol=tolerance(plain))
    if cached:
        assert cache.length[0].tolist() == [TOKENS, short]
        # Row 0 sits the next step out.
        following, cache = step(cache, tokens()[:, short : short + 1], np.array([[False], [True]]))
        np.testing.assert_allclose(following[1, 0], plain[1, short], rtol=0, atol=tolerance(plain))
        assert cache.length[0].tolist() == [TOKENS, short + 1]
    if side != "right":  # padding on the right is seen by nobody before it
        wrong, _ = step(exact(decoder) if cached else None, ids)
        assert np.abs(np.asarray(wrong)[1, mask[1]][4:] - plain[1, 4:short]).max() > 10 * tolerance(plain)


def test_a_forgotten_chunk_and_a_compressed_cache_are_noticed(
    decoder: Decoder, plain: np.ndarray, step: Callable
) -> None:
    forgotten, _ = step(exact(decoder), tokens()[:, 16:])
    assert np.abs(forgotten - plain[:, 16:]).max() > 10 * tolerance(plain)
    keys, values = turboquant.kv(jax.random.key(0), dim=decoder.architecture.dim, bits_k=4, bits_v=4)
    packed = decoder.init_cache(keys, values, batch=2, capacity=TOKENS)
    coded, packed = step(packed, tokens())
    assert packed.nbytes < exact(decoder).nbytes
    assert np.abs(coded - plain).max() > 10 * tolerance(plain)
    assert np.corrcoef(np.asarray(coded).ravel(), plain.ravel())[0, 1] > 0.9


def test_the_cache_takes_its_shape_from_the_decoder(decoder: Decoder) -> None:
    cache = exact(decoder, batch=3)
    a = decoder.architecture
    assert (cache.layers, cache.batch, cache.kv_heads, cache.dim) == (a.layers, 3, a.kv_heads, a.dim)


def test_bfloat16_activations_stay_bfloat16(tmp_path: Path) -> None:
    decoder = models.load(write_folder(tmp_path, "qwen3"), dtype=jnp.bfloat16).decoder
    hidden = jax.eval_shape(lambda ids: decoder.hidden(ids)[0], tokens())
    assert hidden.dtype == jnp.bfloat16
    assert jax.eval_shape(decoder.logits, hidden).dtype == jnp.float32


def test_every_family_has_its_golden_config() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} | {"gemma3"} == set(FAMILIES)
