"""Generation through the cache, and the sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import write_folder

from jaxquant import models
from jaxquant.cache import KVCache
from jaxquant.methods import turboquant
from jaxquant.models import generation
from jaxquant.models.loading import Model
from jaxquant.quantizers import Exact

CAPACITY = 64
PROMPTS = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9], [3, 23, 8]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return models.load(write_folder(tmp_path_factory.mktemp("llama"), "llama"), dtype=jnp.float32)


def exact(model: Model, *, batch: int = 1, capacity: int = CAPACITY) -> KVCache:
    whole = Exact(dim=model.architecture.dim, dtype="float32")
    return model.decoder.init_cache(whole, whole, batch=batch, capacity=capacity, dtype=jnp.float32)


def greedy_without_cache(model: Model, prompt: list[int], count: int) -> list[int]:
    forward = jax.jit(lambda ids: jnp.argmax(model.decoder(ids)[0][0], axis=-1))
    ids = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, len(prompt) + count), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(forward(padded)[len(ids) - 1]))
    return ids[len(prompt) :]


def test_greedy_generation_is_the_repeated_arg_max(model: Model) -> None:
    result = models.generate(None, model.decoder, exact(model), PROMPTS[:1], max_tokens=16, chunk=8)
    expected = greedy_without_cache(model, PROMPTS[0], 16)
    assert result.tokens == [expected]
    assert result.cache.length[0].tolist() == [len(PROMPTS[0]) + 15]
    shorter = models.generate(None, model.decoder, exact(model), [PROMPTS[0][:-1]], max_tokens=16, chunk=8)
    assert shorter.tokens != [expected]


def test_rows_of_different_length_do_not_disturb_each_other(model: Model) -> None:
    together = models.generate(None, model.decoder, exact(model, batch=2), PROMPTS, max_tokens=12, chunk=8)
    for prompt, tokens in zip(PROMPTS, together.tokens, strict=True):
        alone = models.generate(None, model.decoder, exact(model), [prompt], max_tokens=12, chunk=8)
        assert alone.tokens == [tokens]


def test_a_conversation_goes_on_in_the_returned_cache(model: Model) -> None:
    whole = models.generate(None, model.decoder, exact(model), PROMPTS[:1], max_tokens=4, chunk=8)
    head = models.generate(None, model.decoder, exact(model), [PROMPTS[0][:5]], max_tokens=1, chunk=8)
    tail = models.generate(None, model.decoder, head.cache, [PROMPTS[0][5:]], max_tokens=4, chunk=8)
    assert tail.tokens == whole.tokens


def test_an_end_token_ends_its_row_alone(model: Model) -> None:
    free = models.generate(None, model.decoder, exact(model, batch=2), PROMPTS, max_tokens=8, chunk=8)
    end = free.tokens[0][3]
    seen: list[tuple[int, int]] = []
    result = models.generate(
        None, model.decoder, exact(model, batch=2), PROMPTS, max_tokens=8, chunk=8, end_ids=(end,),
        on_token=lambda row, token: seen.append((row, token)),
    )  # fmt: skip
    assert result.tokens[0] == free.tokens[0][: free.tokens[0].index(end)]
    expected = free.tokens[1][: free.tokens[1].index(end)] if end in free.tokens[1] else free.tokens[1]
    assert result.tokens[1] == expected
    assert [token for row, token in seen if row == 1] == expected


def test_sampling_depends_on_the_key_alone(model: Model) -> None:
    def run(seed: int) -> list[list[int]]:
        return models.generate(
            jax.random.key(seed), model.decoder, exact(model, batch=2), PROMPTS[:1] * 2,
            max_tokens=12, temperature=1.0, top_p=0.95, top_k=30, chunk=8,
        ).tokens  # fmt: skip

    first = run(0)
    assert run(0) == first
    assert run(1) != first
    assert first[0] != first[1]


def compiled() -> tuple[int, int]:
    prefill, decode = generation._prefill, generation._decode
    return prefill._cache_size(), decode._cache_size()  # pyright: ignore[reportAttributeAccessIssue]


def test_steps_compile_once_for_all_prompts_and_settings(model: Model) -> None:
    prompt = PROMPTS[0] * 2
    models.generate(None, model.decoder, exact(model), [prompt[:3]], max_tokens=2, chunk=8)
    before = compiled()
    for length in (1, 8, 9, 17):
        models.generate(None, model.decoder, exact(model), [prompt[:length]], max_tokens=length, chunk=8)
    key = jax.random.key(0)
    for temperature in (0.5, 1.5):
        models.generate(key, model.decoder, exact(model), [prompt], max_tokens=3, temperature=temperature, chunk=8)
    assert compiled() == before
    models.generate(None, model.decoder, exact(model), [prompt[:3]], max_tokens=2, chunk=16)
    assert compiled() == (before[0] + 1, before[1])


def test_the_cache_is_donated_and_timings_are_reported(model: Model) -> None:
    keys, values = turboquant.kv(jax.random.key(0), dim=16, bits_k=4, bits_v=2)
    cache = model.decoder.init_cache(keys, values, batch=1, capacity=CAPACITY)
    result = models.generate(None, model.decoder, cache, PROMPTS[:1], max_tokens=5, chunk=8)
    assert cache.length.is_deleted()
    assert result.cache.nbytes < exact(model).nbytes / 4
    assert result.decode_tokens == 4
    assert 0 < result.tokens_per_second < np.inf
    assert result.prefill_seconds > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[]]}, r"prompts\[0\] is empty"),
        ({"prompts": [[1, 5000]]}, r"prompts\[0\] holds an id outside 0\.\.39"),
        ({"prompts": [[-1]]}, "holds an id outside"),
        ({"prompts": [[1], [2]]}, "cache has 1 rows for 2 prompts"),
        ({"prompts": [[1] * 60]}, "60 tokens held and prompted, with max_tokens=6, exceed the cache's 64"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": 1.0}, "key is needed where temperature=1.0"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1 must not be negative"),
        ({"chunk": 1}, "chunk=1 must be at least 2"),
    ],
)
def test_wrong_arguments_are_named(model: Model, change: dict, message: str) -> None:
    arguments = {"prompts": [[1, 2]], "max_tokens": 6, **change}
    with pytest.raises(ValueError, match=message):
        models.generate(None, model.decoder, exact(model), **arguments)


def test_the_longest_prompt_that_fits(model: Model) -> None:
    result = models.generate(None, model.decoder, exact(model), [[1] * 59], max_tokens=6, chunk=8)
    assert len(result.tokens[0]) == 6
    assert int(result.cache.length.max()) == 64


LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def draws(**settings: float) -> np.ndarray:
    keys = jax.random.split(jax.random.key(7), 4000)
    ids = jax.vmap(lambda key: models.sample(key, jnp.asarray(LOGITS), **settings))(keys)
    return np.bincount(np.asarray(ids), minlength=4) / 4000


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.85}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 1e-3}, [0, 1, 0, 0]),
    ],
)
def test_sampling_frequencies(settings: dict[str, float], expected: list[float]) -> None:
    # Five standard deviations of a share of 4,000 draws.
    np.testing.assert_allclose(draws(**settings), expected, rtol=0, atol=5 * (0.25 / 4000) ** 0.5)


def test_wrong_frequencies_are_noticed() -> None:
    assert np.abs(draws(temperature=0.5) - np.exp(LOGITS)).max() > 5 * (0.25 / 4000) ** 0.5
