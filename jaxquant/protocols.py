"""The plug-in contract: what rotations, quantizers and the parts of a pipeline must offer.

A plug-in is a frozen pytree dataclass (`@protocols.pytree`, with `protocols.static()` fields) that satisfies one of
these protocols. Nothing is registered: pass the object. Methods are plain functions of arrays, so they fuse into the
caller's `jit`. Rotations and quantizers have no state and take any number of leading axes. Scorers, strategies and
monitors take their state first and return it first, like the body of a `lax.scan`; every leaf of a state has the rows
of the batch as its first axis.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxquant._pytree import pytree as pytree
from jaxquant._pytree import static as static


@runtime_checkable
class Rotation(Protocol):
    """An orthogonal map of R^dim that spreads a vector's energy over its coordinates."""

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        ...

    def rotate(self, x: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Map vectors into the coordinates in which they are coded; computed in float32, returned in x's dtype."""
        ...

    def unrotate(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Map coordinates back; the inverse and the transpose of `rotate`."""
        ...


@runtime_checkable
class Quantizer(Protocol):
    """A per-vector code whose decoder is linear after a table lookup: `dequantize = restore . expand`.

    The split is what lets attention work on codes. With `project` the transpose of `restore`,

        <q, dequantize(code)> = <project(q), expand(code)>     and
        sum_t p_t dequantize(code_t) = restore(sum_t p_t expand(code_t)),

    so a query is rotated once, an output is un-rotated once, and only `expand` runs per token.
    """

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        ...

    def quantize(self, x: Float[Array, "*batch dim"], /) -> PyTree[Any]:
        """Code vectors; every leaf of the result keeps the leading axes of `x`, and its bytes are the storage."""
        ...

    def expand(self, code: PyTree[Any], /) -> Float[Array, "*batch width"]:
        """Look codes up and scale them, in the coordinates of the code (float32)."""
        ...

    def restore(self, y: Float[Array, "*batch width"], /) -> Float[Array, "*batch dim"]:
        """Map expanded codes, or any weighted sum of them, back to vectors (float32)."""
        ...

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch width"]:
        """Map queries into the coordinates of the code: the transpose of `restore` (float32)."""
        ...


class Context(NamedTuple):
    """What is known of the tokens that are scored, beside their vectors.

    Attributes:
        layer: of the model.
        step: of each row: the position of the first of the tokens, or the step of a stream.
        values: that belong to keys being scored, or None.
        received: attention that each token received while it was exact, summed as the scorer's `attend` does, or None.
    """

    layer: Int[Array, ""]
    step: Int[Array, " batch"]
    values: Float[Array, "batch kv_heads tokens dim"] | None = None
    received: Float[Array, "batch kv_heads tokens"] | None = None


@runtime_checkable
class Scorer(Protocol):
    """Says how much each token matters, when it leaves the exact window."""

    def init(self, batch: int, kv_heads: int, dim: int, /) -> PyTree[Any]:
        """Make the state that no token has passed through."""
        ...

    def score(
        self, state: PyTree[Any], x: Float[Array, "batch kv_heads tokens dim"], ctx: Context, /
    ) -> tuple[PyTree[Any], Float[Array, "batch kv_heads tokens"]]:
        """Score tokens, given their keys (or the vectors of a stream); more is more important."""
        ...


@runtime_checkable
class AttentiveScorer(Scorer, Protocol):
    """A scorer that watches what attention reads."""

    def attend(
        self,
        state: PyTree[Any],
        scores: Float[Array, "batch kv_heads tokens"],
        weights: Float[Array, "batch kv_heads queries tokens"],
        queries: Float[Array, "batch kv_heads queries dim"],
        valid: Bool[Array, "batch queries"],
        /,
    ) -> tuple[PyTree[Any], Float[Array, "batch kv_heads tokens"]]:
        """Revise the scores of stored and exact tokens after some queries, in their order.

        Splitting the queries over several calls must not change the result. `weights` and `queries` are means over the
        query heads that share a kv head; `valid` is False on padding.
        """
        ...


class Held(NamedTuple):
    """What a strategy has stored, decoded for one step of attention.

    Attributes:
        k: keys.
        v: values.
        position: of each token, -1 where there is none; the axis of heads may be 1.
        weight: log of how many tokens an entry stands for, for all queries or for each; 0 if None.
        score: of each entry, where the strategy keeps them.
    """

    k: Float[Array, "batch kv_heads entries dim"]
    v: Float[Array, "batch kv_heads entries dim"]
    position: Int[Array, "batch heads entries"]
    weight: Float[Array, "batch kv_heads rows entries"] | None = None
    score: Float[Array, "batch kv_heads entries"] | None = None


@runtime_checkable
class Strategy(Protocol):
    """Decides what is stored of each token. Its state is the storage: packed codes, and no other copy of a token."""

    def init(
        self,
        quantizers: tuple["Quantizer", "Quantizer"],
        /,
        *,
        batch: int,
        kv_heads: int,
        capacity: int,
        block: int,
    ) -> PyTree[Any]:
        """Allocate storage for `capacity` tokens a row, a multiple of `block`, with quantizers of keys and values."""
        ...

    def store(
        self,
        state: PyTree[Any],
        quantizers: tuple["Quantizer", "Quantizer"],
        k: Float[Array, "batch kv_heads block dim"],
        v: Float[Array, "batch kv_heads block dim"],
        scores: Float[Array, "batch kv_heads block"] | None,
        step: Int[Array, " batch"],
        threshold: Float[Array, " batch"],
        /,
    ) -> PyTree[Any]:
        """Store a block of tokens, the first of them at position `step`.

        Args:
            state: storage.
            quantizers: of keys and of values.
            k: keys.
            v: values.
            scores: of the tokens; None without a scorer.
            step: position of the first token.
            threshold: score from which a token gets what is scarce; monitors move it.
        """
        ...

    def read(
        self,
        state: PyTree[Any],
        quantizers: tuple["Quantizer", "Quantizer"],
        queries: Float[Array, "batch kv_heads rows dim"],
        /,
    ) -> Held:
        """Decode what is stored, for scaled queries."""
        ...


@runtime_checkable
class RankedStrategy(Strategy, Protocol):
    """A strategy that keeps the scores of what it stores."""

    def rescore(self, state: PyTree[Any], scores: Float[Array, "batch kv_heads entries"], /) -> PyTree[Any]:
        """Replace the scores, in the order of `read`."""
        ...


@runtime_checkable
class StepStrategy(Protocol):
    """Codes a tensor that changes from step to step; sender and receiver hold the same state.

    The sender makes a payload from its state and follows it as the receiver does, so that it always knows what the
    receiver has: errors cannot add up. All leaves of states and payloads have the rows of the batch first.
    """

    def start(self, quantizer: "Quantizer", x: Float[Array, "batch heads tokens dim"], /) -> PyTree[Any]:
        """Code the tensor of the first step whole."""
        ...

    def load(self, quantizer: "Quantizer", payload: PyTree[Any], /) -> PyTree[Any]:
        """Make the state of a first payload."""
        ...

    def send(
        self,
        state: PyTree[Any],
        quantizer: "Quantizer",
        x: Float[Array, "batch heads tokens dim"],
        fresh: Bool[Array, "batch heads tokens"],
        /,
    ) -> PyTree[Any]:
        """Code the tensor of the next step; tokens marked `fresh` must not rest on earlier steps, where room allows."""
        ...

    def follow(self, state: PyTree[Any], quantizer: "Quantizer", payload: PyTree[Any], /) -> PyTree[Any]:
        """Move the state on by a payload."""
        ...

    def value(self, state: PyTree[Any], quantizer: "Quantizer", /) -> Float[Array, "batch heads tokens dim"]:
        """Decode the newest step."""
        ...


class Observation(NamedTuple):
    """What a monitor sees each time a block of tokens is complete.

    Attributes:
        entropy: of the attention weights, in nats, the mean over heads and queries since the last time.
        pushforward: maps a change of the newest query, [batch, kv_heads, dim], to the change of its attention output:
            a Jacobian-vector product.
    """

    entropy: Float[Array, " batch"]
    pushforward: Callable[[Float[Array, "batch kv_heads dim"]], Float[Array, "batch kv_heads dim"]]


@runtime_checkable
class Monitor(Protocol):
    """Watches attention and moves the threshold of the strategy."""

    def init(self, batch: int, kv_heads: int, dim: int, /) -> PyTree[Any]:
        """Make the state before anything was seen."""
        ...

    def observe(
        self, state: PyTree[Any], seen: Observation, threshold: Float[Array, " batch"], /
    ) -> tuple[PyTree[Any], Float[Array, " batch"]]:
        """Give the threshold for the blocks to come, from what was seen and the threshold of the pipeline."""
        ...


@runtime_checkable
class Cache(Protocol):
    """What a decoder extends: a `KVCache`, or the cache of a pipeline, which also has `attend`."""

    @property
    def length(self) -> Int[Array, "layers batch"]:
        """Tokens of each row that came."""
        ...

    @property
    def dim(self) -> int:
        """Length of a key or value vector."""
        ...

    @property
    def capacity(self) -> int:
        """Most tokens a row can hold."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held, everything included."""
        ...

    @property
    def bytes_per_token(self) -> float:
        """Bytes of keys and values, everything included, for each token of capacity and kv head."""
        ...
