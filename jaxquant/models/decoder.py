"""One decoder for every supported family, as a Flax NNX module.

Submodules carry the names of the tensors in Hugging Face folders, so that loading is a walk over the module.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxquant import attention
from jaxquant import cache as caches
from jaxquant.cache import KVCache
from jaxquant.models.architecture import Architecture
from jaxquant.models.causal import causal_attention
from jaxquant.models.rope import Rope, rotate
from jaxquant.protocols import Cache, Quantizer

Tap = Callable[[int, Array, Array, Array], tuple[Array, Array, Array]]
"""Sees, and may replace, what attention reads: layer, queries, keys and values, [batch, new, heads, dim] each."""


class Norm(nnx.Module):
    """Root-mean-square normalisation, in float32."""

    def __init__(self, size: int, architecture: Architecture):
        self.weight = nnx.Param(jnp.zeros(size) if architecture.norm_plus_one else jnp.ones(size))
        self.epsilon = architecture.norm_epsilon
        self.plus_one = architecture.norm_plus_one

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        """Divide by the root mean square of the last axis and multiply by the weight."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        if self.plus_one:
            return (wide * (1.0 + self.weight[...].astype(jnp.float32))).astype(x.dtype)
        return wide.astype(x.dtype) * self.weight[...].astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention of one layer, over a cache or over its own input."""

    def __init__(self, architecture: Architecture, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        a = architecture

        def linear(inputs: int, outputs: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, rngs=rngs)

        self.q_proj = linear(a.hidden, a.heads * a.dim, a.qkv_bias)
        self.k_proj = linear(a.hidden, a.kv_heads * a.dim, a.qkv_bias)
        self.v_proj = linear(a.hidden, a.kv_heads * a.dim, a.qkv_bias)
        self.o_proj = linear(a.heads * a.dim, a.hidden, a.output_bias)
        self.q_norm = Norm(a.dim, a) if a.qk_norm else None
        self.k_norm = Norm(a.dim, a) if a.qk_norm else None
        self.layer = layer
        self.dim = a.dim
        self.scale = a.scale
        self.rope: Rope = a.ropes[layer]
        self.window = a.windows[layer]

    def __call__(
        self,
        x: Float[Array, "batch new hidden"],
        positions: Int[Array, "batch new"],
        cache: Cache | None,
        mask: Bool[Array, "batch new"] | None,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "batch new hidden"], Cache | None]:
        """Append the keys and values of `x` to the cache, if there is one, and attend."""
        batch, new, _ = x.shape
        q, k, v = (
            projection(x).reshape(batch, new, -1, self.dim) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, positions, self.rope), rotate(k, positions, self.rope)
        if tap is not None:
            q, k, v = tap(self.layer, q, k, v)
        if cache is None:
            out = causal_attention(q, k, v, mask=mask, scale=self.scale, window=self.window)
        else:
            out, cache = attention.attend(
                q, k, v, cache, self.layer, mask=mask, scale=self.scale, sliding_window=self.window
            )
        return self.o_proj(out.reshape(batch, new, -1).astype(x.dtype)), cache


class FeedForward(nnx.Module):
    """Gated feed-forward block."""

    def __init__(self, architecture: Architecture, *, dtype: DTypeLike, rngs: nnx.Rngs):
        a = architecture

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=a.mlp_bias, dtype=dtype, rngs=rngs)

        self.gate_proj = linear(a.hidden, a.intermediate)
        self.up_proj = linear(a.hidden, a.intermediate)
        self.down_proj = linear(a.intermediate, a.hidden)
        self.activation = a.activation

    def __call__(self, x: Float[Array, "batch new hidden"]) -> Float[Array, "batch new hidden"]:
        """Gate, widen and narrow."""
        gate = self.gate_proj(x)
        gate = jax.nn.silu(gate) if self.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        return self.down_proj(gate * self.up_proj(x))


class Layer(nnx.Module):
    """Attention and feed-forward block around the residual stream."""

    def __init__(self, architecture: Architecture, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        a = architecture
        self.input_layernorm = Norm(a.hidden, a)
        self.self_attn = Attention(a, layer, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = Norm(a.hidden, a)
        self.mlp = FeedForward(a, dtype=dtype, rngs=rngs)
        self.pre_feedforward_layernorm = Norm(a.hidden, a) if a.post_norms else None
        self.post_feedforward_layernorm = Norm(a.hidden, a) if a.post_norms else None

    def __call__(
        self,
        x: Float[Array, "batch new hidden"],
        positions: Int[Array, "batch new"],
        cache: Cache | None,
        mask: Bool[Array, "batch new"] | None,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "batch new hidden"], Cache | None]:
        """Add both blocks to the residual stream."""
        attended, cache = self.self_attn(self.input_layernorm(x), positions, cache, mask, tap)
        if self.pre_feedforward_layernorm is not None and self.post_feedforward_layernorm is not None:
            x = x + self.post_attention_layernorm(attended)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), cache
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Decoder(nnx.Module):
    """A causal language model that reads and writes a cache.

    Args:
        architecture: shapes and features.
        dtype: dtype of activations; weights are cast to it where they are used.
        rngs: keys for the random initial weights.

    >>> from jaxquant.models.architecture import from_config
    >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    >>> decoder = Decoder(from_config({"model_type": "llama", **sizes}), rngs=nnx.Rngs(0))
    >>> logits, _ = decoder(jnp.array([[1, 2, 3]]))
    >>> logits.shape
    (1, 3, 16)
    """

    def __init__(self, architecture: Architecture, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        a = architecture
        self.architecture = a
        self.embed_tokens = nnx.Embed(a.vocabulary, a.hidden, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(a, i, dtype=dtype, rngs=rngs) for i in range(a.layers)])
        self.norm = Norm(a.hidden, a)
        self.lm_head = None if a.tied else nnx.Linear(a.hidden, a.vocabulary, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch new"],
        cache: Cache | None = None,
        *,
        mask: Bool[Array, "batch new"] | None = None,
        tap: Tap | None = None,
        recompute: bool = False,
    ) -> tuple[Float[Array, "batch new vocabulary"], Cache | None]:
        """Return the logits of every position; see `hidden` for the arguments."""
        hidden, cache = self.hidden(tokens, cache, mask=mask, tap=tap, recompute=recompute)
        return self.logits(hidden), cache

    def hidden(
        self,
        tokens: Int[Array, "batch new"],
        cache: Cache | None = None,
        *,
        mask: Bool[Array, "batch new"] | None = None,
        tap: Tap | None = None,
        recompute: bool = False,
    ) -> tuple[Float[Array, "batch new hidden"], Cache | None]:
        """Run the layers and the last norm, without the projection to the vocabulary.

        Args:
            tokens: the next tokens of every row.
            cache: what came before, to be extended; None attends over `tokens` alone.
            mask: False marks padding, left or right: it takes no position, is not stored and is not seen.
            tap: called in every layer with the queries, keys and values, after their rotation; what it returns is what
                is stored and attended to. For calibration.
            recompute: keep nothing but the input of each layer for a gradient, and run the layer again on the way back.

        Returns:
            Hidden states, and the extended cache.
        """
        x = self.embed_tokens(tokens)
        x = x * jnp.asarray(self.architecture.embedding_scale, x.dtype)
        held = jnp.zeros((tokens.shape[0],), jnp.int32) if cache is None else cache.length[0]
        if mask is None:
            rank = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        else:
            rank = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        positions = held[:, None] + rank
        for layer in self.layers:
            run = functools.partial(layer, positions=positions, mask=mask, tap=tap)
            x, cache = (jax.checkpoint(run) if recompute else run)(x, cache=cache)
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "batch new hidden"]) -> Float[Array, "batch new vocabulary"]:
        """Project hidden states to the vocabulary, in float32."""
        if self.lm_head is None:
            weight = self.embed_tokens.embedding[...].T
        else:
            weight = self.lm_head.kernel[...]
        out = jnp.matmul(hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
        cap = self.architecture.logit_soft_cap
        return out if cap is None else cap * jnp.tanh(out / cap)

    def init_cache(
        self,
        keys: Quantizer | Sequence[Quantizer],
        values: Quantizer | Sequence[Quantizer],
        *,
        batch: int,
        capacity: int,
        sinks: int = 0,
        window: int = 0,
        exact_layers: Sequence[int] = (),
        dtype: DTypeLike = jnp.bfloat16,
    ) -> KVCache:
        """Make an empty cache with this decoder's layers and heads.

        Args:
            keys: quantizer of the keys, or one for each layer.
            values: quantizer of the values, or one for each layer.
            batch: rows.
            capacity: tokens a row can hold.
            sinks: first tokens kept exact.
            window: most recent tokens kept exact.
            exact_layers: layers that are not compressed.
            dtype: dtype of what is kept exact.
        """
        a = self.architecture
        return caches.init(
            keys=keys, values=values, layers=a.layers, batch=batch, kv_heads=a.kv_heads, capacity=capacity,
            sinks=sinks, window=window, exact_layers=exact_layers, dtype=dtype,
        )  # fmt: skip
