"""Pages against the dense cache: the same codes, the same attention, whatever pages the rows own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jaxquant import attention, cache, paged, quantizers
from jaxquant._kernels import pallas, xla
from jaxquant.methods import turboquant

BATCH, KV_HEADS, LENGTHS = 3, 2, (150, 1, 0)
CASES = {  # bits of keys, bits of values, dim, queries a kv head, page, how
    "4-2": (4, 2, 64, 4, 64, {}),
    "3-4 sliding": (3, 4, 80, 1, 128, {"sliding_window": 40}),
    "8-3 capped": (8, 3, 96, 16, 64, {"soft_cap": 3.0, "scale": 0.2}),
}


def both(bits_k, bits_v, dim, page):
    """Append the same tokens, in two chunks, to a dense cache and to pages in a wild order."""
    keys, values = turboquant.kv(jax.random.key(0), dim=dim, bits_k=bits_k, bits_v=bits_v)
    rng = np.random.default_rng(0)
    each = -(-192 // page)
    table = jnp.asarray(rng.permutation(BATCH * each + 2)[: BATCH * each].reshape(BATCH, each), jnp.int32)
    dense = cache.init(keys, values, layers=1, batch=BATCH, kv_heads=KV_HEADS, capacity=each * page)
    pages = paged.init(keys, values, pages=BATCH * each + 2, kv_heads=KV_HEADS, page=page)
    length = jnp.zeros(BATCH, jnp.int32)
    k, v = rng.normal(size=(2, BATCH, max(LENGTHS), KV_HEADS, dim)).astype(np.float32)
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    for part in (slice(0, 75), slice(75, 150)):
        tokens = jnp.asarray(k[:, part]), jnp.asarray(v[:, part] + 0.3)
        dense = cache.append(dense, 0, *tokens, mask=jnp.asarray(mask[:, part]))
        pages, length = paged.append(pages, table, length, *tokens, mask=jnp.asarray(mask[:, part]))
    return dense, pages, table, length


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def filled(request):
    bits_k, bits_v, dim, rows, page, how = request.param
    q = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, rows * KV_HEADS, dim)).astype(np.float32) * 2)
    return q, how, *both(bits_k, bits_v, dim, page)


def distance(got, want):
    out, lse = (np.asarray(x, np.float64) for x in got)
    assert np.array_equal(np.isfinite(lse), np.isfinite(np.asarray(want[1])))
    some = np.isfinite(lse)
    error = np.linalg.norm(out - np.asarray(want[0])) / np.linalg.norm(want[0])
    return max(error, np.abs(lse[some] - np.asarray(want[1])[some]).max())


def test_pages_hold_the_bytes_of_the_dense_cache(filled):
    _, _, dense, pages, table, length = filled
    assert length.tolist() == dense.length[0].tolist() == list(LENGTHS)
    stack = dense.stacks[0]
    for codes, store in ((pages.key_codes, stack.keys), (pages.value_codes, stack.values)):
        for leaf, whole in zip(jax.tree.leaves(codes), jax.tree.leaves(store.codes), strict=True):
            rows = np.moveaxis(np.asarray(leaf)[np.asarray(table)], 1, 2)
            assert np.array_equal(rows.reshape(whole.shape[1:]), np.asarray(whole[0]))
    assert pages.nbytes >= sum(leaf.nbytes for leaf in jax.tree.leaves((pages.key_codes, pages.value_codes)))


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_attention_equals_the_dense_path(filled, implementation):
    q, how, dense, pages, table, length = filled
    want = attention.decode_attention(q, dense, 0, **how)
    got = paged.decode_attention_paged(q, pages, table, length, **how, implementation=implementation)
    assert distance(got, want) < 1e-5
    wrong = {
        "pages of a row in another order": (pages, table[:, ::-1], length),
        "pages of other rows": (pages, jnp.roll(table, 1, axis=0), length),
        "a newer token unseen": (pages, table, jnp.where(length > 1, length - 1, length)),
    }
    if implementation == "xla":
        for name, operands in wrong.items():
            assert distance(paged.decode_attention_paged(q, *operands, **how, implementation="xla"), want) > 1e-4, name


@pytest.mark.parametrize("how", [{}, {"sliding_window": 300}], ids=["all", "sliding"])
def test_long_rows_are_read_in_steps(how):
    keys, values = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)
    lengths, each, page = (1300, 900), 11, 128  # three steps of four pages, the last one of three
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 4, 64)).astype(np.float32) * 2)
    k, v = (jnp.asarray(x) for x in rng.normal(size=(2, 2, 1300, 2, 64)).astype(np.float32))
    mask = jnp.arange(1300) < jnp.array(lengths)[:, None]
    dense = cache.init(keys, values, layers=1, batch=2, kv_heads=2, capacity=each * page)
    dense = cache.append(dense, 0, k, v, mask=mask)
    table = jnp.asarray(rng.permutation(2 * each).reshape(2, each), jnp.int32)
    pages = paged.init(keys, values, pages=2 * each, kv_heads=2, page=page)
    pages, length = paged.append(pages, table, jnp.zeros(2, jnp.int32), k, v, mask=mask)
    got = paged.decode_attention_paged(q, pages, table, length, **how, implementation="xla")
    assert distance(got, attention.decode_attention(q, dense, 0, **how)) < 1e-5
    swapped = table.at[:, jnp.array([7, 8])].set(table[:, jnp.array([8, 7])])  # of two steps
    wrong = paged.decode_attention_paged(q, pages, swapped, length - 40, **how, implementation="xla")
    assert distance(wrong, attention.decode_attention(q, dense, 0, **how)) > 1e-4


def test_tpu_grid_reads_pages(filled):
    q, how, dense, pages, table, length = filled
    rule = xla.Rule(
        scale=jnp.float32(how.get("scale", q.shape[-1] ** -0.5)),
        soft_cap=jnp.float32(how["soft_cap"]) if "soft_cap" in how else None,
        sliding_window=jnp.int32(how["sliding_window"]) if "sliding_window" in how else None,
        visible=None,
    )
    rows = q.reshape(BATCH, KV_HEADS, -1, q.shape[-1])
    position = jnp.broadcast_to(length[:, None] - 1, (BATCH, rows.shape[2]))
    quantizers_, codes = (pages.keys, pages.values), (pages.key_codes, pages.value_codes)
    never = jnp.zeros_like(length)
    part = pallas.attend(quantizers_, codes, rows, position, never, rule, table=table, grid="tpu")
    got = part.out.reshape(q.shape), part.lse.reshape(q.shape[:2])
    assert distance(got, attention.decode_attention(q, dense, 0, **how)) < 1e-5


def test_rows_may_share_pages_and_tokens_without_a_page_are_dropped():
    keys, values = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=4)
    pages = paged.init(keys, values, pages=4, kv_heads=1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 1, 64)).astype(np.float32))
    pages, _ = paged.append(pages, jnp.array([[2]]), jnp.array([0]), x, x)  # a prefix that two rows go on from
    table = jnp.array([[2, 0], [2, -1]])
    more = jnp.concatenate([x[:, :3], 2 * x[:, :3]])
    before = np.asarray(pages.key_codes.codes)
    pages, length = paged.append(pages, table, jnp.array([64, 64]), more, more)
    assert length.tolist() == [67, 67]
    changed = {int(i) for i in np.nonzero(np.any(before != np.asarray(pages.key_codes.codes), axis=(1, 2, 3)))[0]}
    assert changed == {0}
    full, length = paged.append(pages, table, jnp.array([128, 127]), more, more)
    assert length.tolist() == [128, 128]
    assert np.array_equal(np.asarray(full.key_codes.codes), np.asarray(pages.key_codes.codes))
    q = jnp.ones((2, 1, 64))
    one, two = (paged.decode_attention_paged(q, pages, table, jnp.array([n, 64]))[0] for n in (64, 66))
    assert np.allclose(one[0], one[1])
    assert not np.allclose(two[0], two[1])


def test_append_is_in_place_where_donated():
    keys, values = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)
    pages = paged.init(keys, values, pages=64, kv_heads=2)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), pages)
    table, length = jnp.zeros((2, 4), jnp.int32), jnp.zeros(2, jnp.int32)
    x = jnp.zeros((2, 1, 2, 64))
    step = jax.jit(lambda pages, *rest: paged.append(pages, *rest), donate_argnums=0)
    memory = step.lower(shapes, table, length, x, x).compile().memory_analysis()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((pages.key_codes, pages.value_codes)))
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page": 32}, "page must be 64 or 128, got 32"),
        ({"pages": 0}, "pages must be at least 1, got 0"),
        ({"values": quantizers.Exact(dim=32)}, "same dim, got 64 and 32"),
    ],
)
def test_init_names_what_is_wrong(change, message):
    whole = quantizers.Exact(dim=64)
    with pytest.raises(ValueError, match=message):
        paged.init(**({"keys": whole, "values": whole, "pages": 2, "kv_heads": 1} | change))


def test_calls_name_what_is_wrong():
    whole = quantizers.Exact(dim=64)
    pages = paged.init(whole, whole, pages=2, kv_heads=2)
    table, length = jnp.zeros((1, 2), jnp.int32), jnp.array([5])
    q, x = jnp.ones((1, 4, 64)), jnp.ones((1, 3, 2, 64))
    for call, message in (
        (lambda: paged.decode_attention_paged(q[:, :3], pages, table, length), "a multiple of 2, 64"),
        (lambda: paged.decode_attention_paged(q, pages, table, jnp.array([1, 2])), "one entry a row"),
        (lambda: paged.decode_attention_paged(q, pages, table[:, :0], length), "at least one page"),
        (lambda: paged.decode_attention_paged(q, pages, table, length, soft_cap=0.0), "soft_cap must be positive"),
        (lambda: paged.decode_attention_paged(q, pages, table, length, sliding_window=0), "sliding_window must be"),
        (lambda: paged.decode_attention_paged(q, pages, table, length, implementation="pallas"), "Exact, not Scalar"),
        (lambda: paged.append(pages, table, length, x[:, :, :1], x), "k must have shape"),
        (lambda: paged.append(pages, table, length, x, x[..., :32]), "v must have shape"),
    ):
        with pytest.raises((ValueError, TypeCheckError), match=f"{message}|Type-check"):
            call()
