"""Streams: tensors of one shape that change from step to step, as the features of a diffusion model do.

A stream has a quantizer, a strategy that says what of it is sent at each step, and perhaps a scorer whose best tokens
are always sent anew. `start` opens a stream with its first tensor and `step` sends the next; both return the payload,
which is all that a receiver needs (`receive`), and the state, whose `value` is what the receiver now has.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, PyTree, UInt8

from jaxquant._pytree import pytree, static
from jaxquant.protocols import Context, Quantizer, Scorer, StepStrategy

Number = float | Float[Array, ""]


@pytree
class Stream:
    """How a tensor that changes from step to step is coded.

    Attributes:
        quantizer: of its vectors.
        strategy: what is sent.
        scorer: says which tokens matter, or None.
        threshold: score from which a token is sent anew at every step.
    """

    quantizer: Quantizer
    strategy: StepStrategy
    scorer: Scorer | None = None
    threshold: Number = float("inf")


@pytree
class State:
    """Where a stream is.

    Attributes:
        held: state of the strategy, the same at sender and receiver.
        scorer: state of the scorer, at the sender.
        step: steps sent.
    """

    held: PyTree[Any]
    scorer: PyTree[Any]
    step: Int[Array, " batch"]

    @property
    def nbytes(self) -> int:
        """Bytes held between steps, everything included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@jax.jit
def start(stream: Stream, x: Float[Array, "batch heads tokens dim"]) -> tuple[State, PyTree[Any]]:
    """Open a stream with its first tensor.

    Example:
        >>> from jaxquant.methods import delta
        >>> stream = delta.stream(jax.random.key(0), dim=64, bits=4)
        >>> state, payload = start(stream, jnp.ones((1, 2, 8, 64)))
        >>> state, payload = step(stream, state, 1.01 * jnp.ones((1, 2, 8, 64)))
        >>> value(stream, state).shape
        (1, 2, 8, 64)
    """
    batch, heads, _, dim = x.shape
    if dim != stream.quantizer.dim:
        raise ValueError(f"x has shape {x.shape}; its last axis must be the quantizer's dim, {stream.quantizer.dim}")
    payload = stream.strategy.start(stream.quantizer, _clean(x))
    return State(
        held=stream.strategy.load(stream.quantizer, payload),
        scorer=None if stream.scorer is None else stream.scorer.init(batch, heads, dim),
        step=jnp.ones(batch, jnp.int32),
    ), payload


@jax.jit
def step(
    stream: Stream, state: State, x: Float[Array, "batch heads tokens dim"], layer: Integer[Array, ""] | int = 0
) -> tuple[State, PyTree[Any]]:
    """Send the next tensor."""
    x = _clean(x)
    scorer, fresh = state.scorer, jnp.zeros(x.shape[:3], bool)
    if stream.scorer is not None:
        scorer, scores = stream.scorer.score(scorer, x, Context(layer=jnp.asarray(layer, jnp.int32), step=state.step))
        fresh = scores >= stream.threshold
    payload = stream.strategy.send(state.held, stream.quantizer, x, fresh)
    held = stream.strategy.follow(state.held, stream.quantizer, payload)
    return State(held=held, scorer=scorer, step=state.step + 1), payload


def receive(stream: Stream, held: PyTree[Any] | None, payload: PyTree[Any]) -> PyTree[Any]:
    """Follow a payload; the first one is followed from None."""
    if held is None:
        return stream.strategy.load(stream.quantizer, payload)
    return stream.strategy.follow(held, stream.quantizer, payload)


def value(stream: Stream, state: State) -> Float[Array, "batch heads tokens dim"]:
    """Decode the newest step, in float32."""
    return stream.strategy.value(state.held, stream.quantizer)


@pytree
class Coded:
    """What is sent of a vector: its code, and the order of the prediction that it corrects.

    Attributes:
        codes: of the vector less its prediction.
        order: 0 without a prediction, 1 from the step before, 2 from the two before; two bits would do.
    """

    codes: PyTree[Any]
    order: UInt8[Array, "*batch"]


@pytree
class Past:
    """What was decoded last: the reference of predictions.

    Attributes:
        newest: of the step before.
        older: of the step before that, where predictions of order 2 are made.
        steps: since the stream began, of each row.
    """

    newest: Float[Array, "batch *rest dim"]
    older: Float[Array, "batch *rest dim"] | None
    steps: Int[Array, " batch"]


@pytree
class Predict:
    """Code the difference from a prediction of the decoded past, vector by vector.

    With p and pp decoded one and two steps ago, the predictions are 0, gain p and gain (2 p - pp). The one with the
    smallest error is taken, but 0 unless that error is below `limit` times the vector, and always at a keyframe.

    Attributes:
        gain: of predictions; 1 where steps drift, less where they revert.
        limit: relative error up to which a prediction is used.
        keyframe: every such step is sent whole.
        order: 1 or 2.
    """

    gain: Number = 1.0
    limit: Number = 1.0
    keyframe: int | Int[Array, ""] = 16
    order: int = static(default=1)

    def start(self, quantizer: Quantizer, x: Float[Array, "batch *rest dim"], /) -> Coded:
        """Code without a prediction."""
        return Coded(codes=quantizer.quantize(x), order=jnp.zeros(x.shape[:-1], jnp.uint8))

    def load(self, quantizer: Quantizer, payload: Coded, /) -> Past:
        """Decode, and begin the past with it."""
        newest = quantizer.restore(quantizer.expand(payload.codes))
        older = newest if self.order > 1 else None
        return Past(newest=newest, older=older, steps=jnp.ones(newest.shape[0], jnp.int32))

    def send(
        self,
        state: Past,
        quantizer: Quantizer,
        x: Float[Array, "batch *rest dim"],
        fresh: Bool[Array, " batch *rest"],
        /,
    ) -> Coded:
        """Take the best prediction and code what it misses."""
        guesses = self._guesses(state)
        misses = jnp.stack([_energy(x - guess) for guess in guesses])
        order = jnp.argmin(misses, axis=0)
        bound = jnp.asarray(self.limit, jnp.float32) ** 2 * misses[0]
        whole = (state.steps % jnp.asarray(self.keyframe, jnp.int32) == 0).reshape(-1, *(1,) * (x.ndim - 2))
        useless = (jnp.min(misses, axis=0) >= bound) | whole | fresh
        order = jnp.where(useless, 0, order).astype(jnp.uint8)
        return Coded(codes=quantizer.quantize(x - _chosen(guesses, order)), order=order)

    def follow(self, state: Past, quantizer: Quantizer, payload: Coded, /) -> Past:
        """Decode against the same predictions."""
        newest = _chosen(self._guesses(state), payload.order)
        newest = newest + quantizer.restore(quantizer.expand(payload.codes))
        return Past(newest=newest, older=None if state.older is None else state.newest, steps=state.steps + 1)

    def value(self, state: Past, quantizer: Quantizer, /) -> Float[Array, "batch *rest dim"]:
        """Give the newest step."""
        return state.newest

    def _guesses(self, state: Past) -> list[Array]:
        guesses = [jnp.zeros_like(state.newest), self.gain * state.newest]
        if state.older is not None:
            guesses.append(self.gain * (2 * state.newest - state.older))
        return guesses


@pytree
class Differential:
    """The same along the tokens of a block, for a pipeline: the first token of each group is the keyframe.

    A quantizer of whole groups [..., tokens, dim], not of vectors: decoding runs along each group.

    Attributes:
        quantizer: of vectors and of differences.
        predict: the predictions.
        group: tokens of a group; the block of the pipeline is a multiple.
    """

    quantizer: Quantizer
    predict: Predict
    group: int = static()

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.quantizer.dim

    def quantize(self, x: Float[Array, "*batch tokens dim"], /) -> Coded:
        """Code groups token by token."""
        tokens = jnp.moveaxis(self._grouped(_clean(x)), -2, 0)
        first = self.predict.start(self.quantizer, tokens[0])
        none = jnp.zeros(tokens.shape[1:-1], bool)

        def one(past: Past, token: Array) -> tuple[Past, Coded]:
            sent = self.predict.send(past, self.quantizer, token, none)
            return self.predict.follow(past, self.quantizer, sent), sent

        _, rest = lax.scan(one, self.predict.load(self.quantizer, first), tokens[1:])
        return jax.tree.map(functools.partial(self._joined, lead=x.ndim - 2), first, rest)

    def expand(self, code: Coded, /) -> Float[Array, "*batch tokens dim"]:
        """Decode groups token by token."""
        lead = code.order.ndim - 1
        split = jax.tree.map(
            lambda leaf: jnp.moveaxis(
                leaf.reshape(*leaf.shape[:lead], -1, self.group, *leaf.shape[lead + 1 :]), lead + 1, 0
            ),
            code,
        )
        past = self.predict.load(self.quantizer, jax.tree.map(lambda leaf: leaf[0], split))

        def one(past: Past, sent: Coded) -> tuple[Past, Array]:
            past = self.predict.follow(past, self.quantizer, sent)
            return past, past.newest

        _, rest = lax.scan(one, past, jax.tree.map(lambda leaf: leaf[1:], split))
        return self._joined(past.newest, rest, lead=lead)

    def restore(self, y: Float[Array, "*batch tokens dim"], /) -> Float[Array, "*batch tokens dim"]:
        """Return `y`."""
        return y

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Cast to float32."""
        return q.astype(jnp.float32)

    def _grouped(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-2], -1, self.group, x.shape[-1])

    @staticmethod
    def _joined(first: Array, rest: Array, *, lead: int) -> Array:
        """Put the tokens of a group, which are the first axis of `rest`, back behind the axis of groups."""
        whole = jnp.moveaxis(jnp.concatenate([first[None], rest]), 0, lead + 1)
        return whole.reshape(*whole.shape[:lead], -1, *whole.shape[lead + 2 :])


def _clean(x: Array) -> Float[Array, "..."]:
    return jnp.nan_to_num(x.astype(jnp.float32))


def _energy(x: Array) -> Array:
    return jnp.sum(x * x, axis=-1)


def _chosen(guesses: list[Array], order: Array) -> Array:
    chosen = guesses[0]
    for i, guess in enumerate(guesses[1:], start=1):
        chosen = jnp.where((order == i)[..., None], guess, chosen)
    return chosen
