"""A decode step at 32,768 tokens, as compiled: the packed bytes come in, and the vectors they stand for never exist."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxquant import _attention, attention, cache
from jaxquant._kernels import xla
from jaxquant.methods import turboquant

TOKENS, DIM, KV_HEADS, HEADS = 32_768, 128, 8, 32
DEQUANTIZED = 2 * TOKENS * KV_HEADS * DIM * 4


@functools.cache
def shapes():
    """The cache without its buffers: nothing here needs them."""

    def init():
        keys, values = turboquant.kv(jax.random.key(0), dim=DIM, bits_k=4, bits_v=2)
        return cache.init(keys, values, layers=1, batch=1, kv_heads=KV_HEADS, capacity=TOKENS)

    return jax.eval_shape(init), jax.ShapeDtypeStruct((1, HEADS, DIM), jnp.float32)


def packed_bytes():
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes()[0].stacks[0]))


def memory(step, *arguments):
    return jax.jit(step).lower(*arguments).compile().memory_analysis()


def block_bytes():
    """Float32 keys and values of one block, scores and weights of its tokens, and the rows of queries and outputs."""
    block = 2 * xla.BLOCK * KV_HEADS * DIM * 4
    scores = 2 * xla.BLOCK * HEADS * 4
    rows = 4 * HEADS * DIM * 4
    return block + scores + rows


def test_decode_holds_one_block():
    held, q = shapes()
    usage = memory(lambda held, q: attention.decode_attention(q, held, 0), held, q)
    # Half as much again for the codes of a block as bytes, and masks.
    assert usage.temp_size_in_bytes < 1.5 * block_bytes() < DEQUANTIZED / 40
    queries_and_lengths = HEADS * DIM * 4 + 2 * 4
    assert usage.argument_size_in_bytes == packed_bytes() + queries_and_lengths
    # 100 bytes a token and kv head, and the quantizers: a row of signs and a codebook each.
    assert packed_bytes() == 100 * TOKENS * KV_HEADS + 2 * DIM + (16 + 4) * 4
    assert usage.output_size_in_bytes < HEADS * (DIM + 1) * 4 + 64


def test_reading_a_materialized_cache_breaks_the_bound():
    held, q = shapes()

    def dense(held, q):
        k, v = cache.materialize(held, 0)
        return jax.nn.dot_product_attention(q[:, None], k, v)

    usage = memory(dense, held, q)
    assert usage.temp_size_in_bytes > DEQUANTIZED / 2 > 1.5 * block_bytes()


@pytest.mark.parametrize("block", [256, 1024])
def test_the_block_size_is_what_decides(block, monkeypatch):
    """Half the block, half the memory: nothing else of that size is there."""
    held, q = shapes()
    monkeypatch.setattr(xla, "BLOCK", block)
    usage = memory(lambda held, q: _attention.decode.__wrapped__(held, jnp.int32(0), 0, q, rule(), ("xla",)), held, q)
    assert block_bytes() / 2 < usage.temp_size_in_bytes < 1.5 * block_bytes()


def rule():
    return xla.Rule(scale=jnp.float32(DIM**-0.5), soft_cap=None, sliding_window=None, visible=None)


def test_append_writes_into_the_buffers_it_is_given():
    held, _ = shapes()
    x = jax.ShapeDtypeStruct((1, 1, KV_HEADS, DIM), jnp.float32)

    def step(held, k, v):
        return cache.append(held, 0, k, v)

    donated = jax.jit(step, donate_argnums=0).lower(held, x, x).compile().memory_analysis()
    assert donated.alias_size_in_bytes >= packed_bytes()
    assert donated.temp_size_in_bytes < 64 * KV_HEADS * DIM  # float32 vectors of one token, several times over
    assert memory(step, held, x, x).alias_size_in_bytes == 0
