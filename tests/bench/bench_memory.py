"""What compiled programs need: bytes of temporaries and floating-point operations, as XLA counts them.

python tests/bench/bench_memory.py [training] [attention] [tiles] [guidance]

training: the gradient of a stack of feed-forward blocks, by what each block remembers; its growth with every layer, and
the error of the weights' gradient. attention: chunked beside `jax.nn.dot_product_attention`. tiles: a small video
decoder, whole and in tiles. guidance: a step of the small diffusion transformer with attention shared in more and more
layers. Nothing is timed.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant import activations, stochastic
from jaxquant.chunked_attention import chunked_attention
from jaxquant.diffusion import dit, guidance, tiles, vae
from jaxquant.methods import turboquant
from jaxquant.stochastic import Stochastic

MIB = 2**20


def compiled(f: Callable[..., Any], *shapes: Any) -> tuple[int, float]:
    """Give the bytes of temporaries and the operations."""
    program = jax.jit(f).lower(*shapes).compile()
    usage, operations = program.memory_analysis(), program.cost_analysis()
    assert usage is not None
    assert operations is not None
    return usage.temp_size_in_bytes, operations["flops"]


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def block(params: Any, x: jax.Array) -> jax.Array:
    h = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    return x + jax.nn.gelu(h @ params[0]) @ params[1]


def training(tokens: int = 2048, width: int = 256, layers: int = 16) -> None:
    packed = activations.checkpoint(block)

    def packed_with(bits: int, method: str) -> Callable[..., jax.Array]:
        def run(params: Any, x: jax.Array, key: jax.Array, i: jax.Array) -> jax.Array:
            if method == "stochastic":
                return packed(stochastic.fold_in(Stochastic(key=key, dim=width, bits=bits), i), params, x)
            return packed(turboquant.mse(jax.random.key(0), dim=width, bits=bits, scale="unbiased"), params, x)

        return run

    kinds: dict[str, Callable[..., jax.Array]] = {
        "plain": lambda params, x, key, i: block(params, x),
        "jax.checkpoint": lambda params, x, key, i: jax.checkpoint(block)(params, x),
        **{f"packed, stochastic {bits} bits": packed_with(bits, "stochastic") for bits in (8, 4, 2)},
        **{f"packed, TurboQuant {bits} bits": packed_with(bits, "turboquant") for bits in (4, 2)},
    }

    def gradient(run: Callable[..., jax.Array]) -> Callable[..., Any]:
        def net(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
            def step(x: jax.Array, each: Any) -> tuple[jax.Array, None]:
                *params, i = each
                return run(params, x, key, i), None

            return jnp.sum(jnp.square(jax.lax.scan(step, x, (*params, jnp.arange(len(params[0]))))[0]))

        return jax.grad(net)

    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((width, 4 * width), (4 * width, width))
    params = [jax.random.normal(k, (layers, *s)) * s[0] ** -0.5 for k, s in zip(keys, sizes, strict=False)]
    x = jax.random.normal(keys[2], (tokens, width))
    exact = None
    print("| remembers | temporaries, MiB | each layer, bytes a token | operations | gradient off by |")
    print("|---|---|---|---|---|")
    for name, run in kinds.items():
        f = gradient(run)
        deep = [floats(2 * layers, *s) for s in sizes]
        key = jax.eval_shape(lambda: jax.random.key(0))
        less, operations = compiled(f, [floats(layers, *s) for s in sizes], floats(tokens, width), key)
        more, _ = compiled(f, deep, floats(tokens, width), key)
        found = jax.jit(f)(params, x, jax.random.key(1))
        exact = found if exact is None else exact
        off = sum(jnp.sum(jnp.square(a - b)) for a, b in zip(found, exact, strict=True))
        off = float(off / sum(jnp.sum(jnp.square(b)) for b in exact)) ** 0.5
        each = (more - less) / layers / tokens
        print(f"| {name} | {less / MIB:.1f} | {each:.0f} | {operations / 1e9:.1f} G | {off:.1%} |", flush=True)


def attention(heads: int = 8, kv_heads: int = 2, dim: int = 64) -> None:
    print("| tokens | chunked, MiB | with gradient | dense, MiB | with gradient |\n|---|---|---|---|---|")
    for tokens in (2048, 8192, 32768):
        shapes = [floats(1, tokens, n, dim) for n in (heads, kv_heads, kv_heads)]
        found = []
        for f in (
            lambda q, k, v: chunked_attention(q, k, v, causal=True)[0],
            lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
        ):
            found.append(compiled(f, *shapes)[0] / MIB)
            found.append(compiled(jax.grad(lambda *x, f=f: jnp.sum(f(*x) ** 2), argnums=(0, 1, 2)), *shapes)[0] / MIB)
        print(f"| {tokens:,} | " + " | ".join(f"{x:,.1f}" for x in found) + " |", flush=True)


def tiled() -> None:
    graph, state = nnx.split(vae.Decoder(channels=4, hidden=32, rngs=nnx.Rngs(0)))
    print("| picture, pixels | whole, MiB | tiles of 32 latents, MiB | operations, tiles / whole |\n|---|---|---|---|")
    for side in (64, 128, 256):
        x = floats(1, 1, side, side, 4)
        whole = compiled(lambda state, x: nnx.merge(graph, state)(x), state, x)
        small = compiled(
            lambda state, x: tiles.decode(nnx.merge(graph, state), x, tile=32, overlap=2, halo=2), state, x
        )
        one = compiled(lambda state, x: nnx.merge(graph, state)(x), state, floats(1, 1, 32, 32, 4))[1]
        count = len(tiles._starts(side, 32, 6)) ** 2
        print(
            f"| {4 * side}² | {whole[0] / MIB:.1f} | {small[0] / MIB:.1f} | {count * one / whole[1]:.2f} |", flush=True
        )


def shared(layers: int = 4) -> None:
    print("| layers that share | operations of a guided step | less |\n|---|---|---|")
    for tokens, hidden in ((64, 128), (1024, 128)):
        side = 2 * round(tokens**0.5)
        model = dit.DiT(side=side, classes=5, hidden=hidden, heads=4, layers=layers, rngs=nnx.Rngs(0))
        graph, state = nnx.split(model)
        shapes = floats(2, side, side, 1), floats(2), jax.ShapeDtypeStruct((2,), jnp.int32)
        full = None
        for count in range(0, layers + 1, 2):

            def around(layer: int, attend: Any, x: jax.Array, count: int = count) -> jax.Array:
                return guidance.share(attend, x) if layer < count else attend(x)

            def run(state: Any, *x: jax.Array, graph: Any = graph, around: Any = around) -> jax.Array:
                return nnx.merge(graph, state)(*x, around=around)

            _, operations = compiled(run, state, *shapes)
            full = full or operations
            line = f"{count} of {layers}, {tokens:,} tokens of {hidden}"
            print(f"| {line} | {operations / 1e6:.1f} M | {1 - operations / full:.1%} |", flush=True)


if __name__ == "__main__":
    parts = {"training": training, "attention": attention, "tiles": tiled, "guidance": shared}
    for title in sys.argv[1:] or parts:
        print(f"\n{title}\n")
        parts[title]()
