"""Continuous batching: whoever comes and goes, each request is answered as if it were alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from model_folders import write_folder

from jaxquant import attention, cache, models, paged_cache, quantizers, serving
from jaxquant.methods import turboquant
from jaxquant.page_pool import OutOfPages, PagePool

VOCABULARY = 40


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    loaded = models.load(write_folder(tmp_path_factory.mktemp("llama"), "llama"), dtype="float32").decoder
    loaded.architecture = dataclasses.replace(loaded.architecture, max_positions=512)
    return loaded


@pytest.fixture(scope="module")
def pair():
    return turboquant.kv(jax.random.key(0), dim=16, bits_k=4, bits_v=4)


def batcher(decoder, pair, **sizes):
    return serving.Batcher(decoder, *pair, **{"rows": 3, "pages": 6, "row_pages": 4, "chunk": 64} | sizes)


@pytest.fixture(scope="module")
def alone(decoder, pair):
    """Answers of one request at a time, over a dense cache."""
    known = {}

    def answer(prompt, max_tokens):
        key = tuple(prompt), max_tokens
        if key not in known:
            held = decoder.init_cache(*pair, batch=1, capacity=256, dtype="float32")
            known[key] = models.generate(None, decoder, held, [prompt], max_tokens=max_tokens, chunk=64).tokens[0]
        return known[key]

    return answer


def prompts(rng, count):
    """Prompts of 1 to 150 tokens, some of which begin alike."""
    common = rng.integers(VOCABULARY, size=130).tolist()
    out = []
    for _ in range(count):
        own = rng.integers(VOCABULARY, size=int(rng.integers(1, 40))).tolist()
        out.append(common[: int(rng.choice([0, 64, 100, 130]))] + own)
    return out


@settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    seed=st.integers(0, 1000), count=st.integers(1, 6), arrivals=st.integers(1, 4), pages=st.sampled_from([4, 6, 12])
)
def test_every_request_is_answered_as_if_alone(decoder, pair, alone, seed, count, arrivals, pages):
    rng = np.random.default_rng(seed)
    served = batcher(decoder, pair, pages=pages)
    asked = [(prompt, int(rng.integers(1, 80))) for prompt in prompts(rng, count)]
    answers, numbers, cancelled = {}, {}, set()
    while len(numbers) < count or served.busy:
        for prompt, max_tokens in asked[len(numbers) : len(numbers) + arrivals]:
            numbers[served.submit(prompt, max_tokens=max_tokens)] = (prompt, max_tokens)
        if rng.random() < 0.02 and numbers:
            cancelled.add(int(rng.choice(list(numbers))))
            served.cancel(max(cancelled))
        for number, token in served.step():
            answers.setdefault(number, []).append(token)
    assert served.free_pages == pages
    for number, (prompt, max_tokens) in numbers.items():
        want = alone(prompt, max_tokens)
        got = answers.get(number, [])
        assert got == (want[: len(got)] if number in cancelled else want)


def test_a_prefix_is_computed_once_and_gives_the_same_answer(decoder, pair, alone):
    rng = np.random.default_rng(3)
    common = rng.integers(VOCABULARY, size=128).tolist()
    first, second = [*common, 1, 2, 3], [*common, 4, 5]
    served = batcher(decoder, pair, pages=8)
    numbers = [served.submit(first, max_tokens=3)]
    answers = served.run()
    numbers.append(served.submit(second, max_tokens=3))
    answers |= served.run()
    assert served.counts.shared == 128
    assert served.counts.prefilled == len(first) + len(second) - 128
    assert [answers[n] for n in numbers] == [alone(first, 3), alone(second, 3)]


def test_two_rows_own_one_page_while_both_are_served(decoder, pair):
    common = list(range(40)) + list(range(24))
    served = batcher(decoder, pair, rows=2, pages=3, row_pages=2)
    served.submit([*common, 1], max_tokens=20)
    served.step()
    served.submit([*common, 2], max_tokens=20)
    served.step()
    assert served.free_pages == 0  # one page for both, and one each
    assert max(served._pool.owners(n) for n in range(3)) == 2
    served.run()
    assert served.counts.evicted == 0


def test_who_came_last_waits_when_the_pages_run_out(decoder, pair, alone):
    rng = np.random.default_rng(5)
    first, second = (rng.integers(VOCABULARY, size=60).tolist() for _ in range(2))
    served = batcher(decoder, pair, rows=2, pages=3, row_pages=3)
    numbers = [served.submit(prompt, max_tokens=70) for prompt in (first, second)]
    answers = served.run()
    assert served.counts.evicted >= 1
    assert [answers[n] for n in numbers] == [alone(first, 70), alone(second, 70)]


def test_an_end_token_ends_an_answer_and_frees_its_pages(decoder, pair, alone):
    prompt = list(range(30))
    want = alone(prompt, 20)
    end = want[4]
    served = batcher(decoder, pair, end_ids=[end])
    number = served.submit(prompt, max_tokens=20)
    assert served.run()[number] == want[: want.index(end)]
    assert served.free_pages == 6


def test_the_steps_are_compiled_once(decoder, pair):
    served = batcher(decoder, pair)
    serving._step.clear_cache()
    for prompt in prompts(np.random.default_rng(0), 4):
        served.submit(prompt, max_tokens=5)
    served.run()
    assert serving._step._cache_size() == 2


def test_the_cache_holds_codes_and_a_table_alone(decoder, pair):
    served = batcher(decoder, pair, pages=10)
    codes = 10 * 64 * 2 * 2 * 2 * (8 + 2)  # pages, tokens, layers, kv heads, halves, bytes of a vector
    assert served.cache.bytes_per_token == 20
    rotations = sum(x.nbytes for x in jax.tree.leaves((served.cache.keys, served.cache.values)))
    assert served.cache.nbytes == codes + rotations + 3 * 4 * 4 + 2 * 3 * 4


@pytest.mark.parametrize("how", [{}, {"sliding_window": 40}, {"soft_cap": 3.0, "scale": 0.2}])
def test_chunks_over_pages_equal_chunks_over_a_dense_cache(how):
    rng = np.random.default_rng(0)
    keys, values = turboquant.kv(jax.random.key(0), dim=16, bits_k=4, bits_v=2)
    held = paged_cache.init(keys, values, layers=1, batch=2, kv_heads=2, pages=6, row_pages=3)
    held = held.at(np.array([[5, 0, 2], [1, 4, -1]]), np.zeros(2, np.int32))
    dense = cache.init(keys, values, layers=1, batch=2, kv_heads=2, capacity=192, dtype="float32")
    for new in (70, 1, 30):
        q, k, v = (jnp.asarray(rng.normal(size=(2, new, heads, 16)), jnp.float32) for heads in (4, 2, 2))
        mask = jnp.arange(new) < jnp.array([[new], [max(1, new - 9)]])
        got, lse, held = held.attend(q, k, v, 0, mask=mask, **how)
        want, dense_lse, dense = attention.prefill_attention(q, k, v, dense, 0, mask=mask, **how)
        np.testing.assert_allclose(got, want, atol=2e-6)
        np.testing.assert_allclose(np.asarray(lse)[mask], np.asarray(dense_lse)[mask], atol=2e-6)
        assert held.length.tolist() == dense.length.tolist()
    other, _, _ = held.at(np.array([[0, 5, 2], [1, 4, -1]]), np.array([101, 83])).attend(q, k, v, 0, **how)
    assert np.abs(np.asarray(other)[0] - np.asarray(want)[0]).max() > 1e-2  # pages in another order


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_pages_have_as_many_owners_as_rows_hold_them(data):
    pool, held = PagePool(8, page=2), []
    for _ in range(data.draw(st.integers(1, 40))):
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=9))
        if held and data.draw(st.booleans()):
            pool.give_back(held.pop(data.draw(st.integers(0, len(held) - 1)))[1])
        else:
            shared = pool.find(tokens)
            assert len(shared) * 2 < len(tokens)
            need = -(-len(tokens) // 2) - len(shared)
            free = pool.free
            try:
                pages = shared + pool.take(need)
            except OutOfPages:
                assert need > free
                pool.give_back(shared)
                continue
            for i, number in enumerate(shared):  # whoever holds a shared page holds it for the same tokens
                assert all(other[: 2 * i + 2] == tokens[: 2 * i + 2] for other, mine in held if number in mine)
            pool.remember(tokens, pages)
            held.append((tokens, pages))
        counts = [sum(number in pages for _, pages in held) for number in range(8)]
        assert [pool.owners(number) for number in range(8)] == counts
        assert pool.free == counts.count(0)


def test_the_page_that_was_left_longest_ago_goes_first():
    pool = PagePool(3, page=1)
    for token in (7, 8):
        pages = pool.take(1)
        pool.remember([token], pages)
        pool.give_back(pages)
    pool.take(2)  # the empty one and that of 7
    assert pool.find([7, 0]) == []
    assert len(pool.find([8, 0])) == 1


def test_errors_name_the_argument(decoder, pair):
    served = batcher(decoder, pair)
    for call, message in (
        (lambda: served.submit([], max_tokens=1), "at least one token"),
        (lambda: served.submit([VOCABULARY], max_tokens=1), f"from 0 to {VOCABULARY - 1}"),
        (lambda: served.submit([1], max_tokens=0), "max_tokens must be at least 1, got 0"),
        (lambda: served.submit([1] * 200, max_tokens=100), "exceed the 256 tokens of a row"),
        (lambda: batcher(decoder, pair, rows=0), "batch must be at least 1"),
        (lambda: batcher(decoder, pair, chunk=1), "chunk must be at least 2"),
        (lambda: PagePool(0, page=2), "at least 1"),
        (lambda: PagePool(1, page=2).give_back([0]), "page 0 has no owner"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_an_exact_cache_is_served_alike(decoder):
    exact = quantizers.Exact(dim=16, dtype="float32")
    served = batcher(decoder, (exact, exact))
    prompt = list(range(20))
    number = served.submit(prompt, max_tokens=5)
    held = decoder.init_cache(exact, exact, batch=1, capacity=64, dtype="float32")
    assert served.run()[number] == models.generate(None, decoder, held, [prompt], max_tokens=5).tokens[0]
