"""Continuous batching over a paged compressed cache: requests come and go, rows of the batch are refilled at once.

Every step reads one chunk of the prompts that are not read yet, then decodes a token for every row that is. Two
programs are compiled, one for each, whatever comes. Where the pages run out, the request that was admitted last gives
its own back and waits; it starts again from all it had, prompt and answer.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxquant import paged_cache
from jaxquant.models.decoder import Decoder
from jaxquant.page_pool import OutOfPages, PagePool
from jaxquant.paged_cache import PagedCache
from jaxquant.protocols import Quantizer

Choose = Callable[[Float[Array, "batch vocabulary"]], Int[Array, " batch"]]


@dataclasses.dataclass(kw_only=True)
class _Request:
    number: int
    prompt: list[int]
    max_tokens: int
    answer: list[int] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.answer


@dataclasses.dataclass(kw_only=True)
class _Row:
    request: _Request
    pages: list[int]
    held: int  # tokens in the pages

    @property
    def unread(self) -> list[int]:
        return self.request.tokens[self.held :]


@dataclasses.dataclass(kw_only=True)
class Counts:
    """What a batcher has done.

    Attributes:
        prefilled: prompt tokens that were computed.
        shared: prompt tokens that were found in pages of an earlier prompt.
        decoded: tokens that decode steps produced.
        evicted: times a request had to give its pages back and start again.
        steps: calls of `Batcher.step` that ran the model.
    """

    prefilled: int = 0
    shared: int = 0
    decoded: int = 0
    evicted: int = 0
    steps: int = 0


class Batcher:
    """Serves requests, a few rows at a time.

    Args:
        decoder: the network.
        keys: quantizer of the keys; `quantizers.Exact` for an uncompressed cache.
        values: quantizer of the values.
        rows: requests that are served at a time.
        pages: of the cache, in every layer.
        row_pages: that one request can own at most.
        page: tokens of a page, 64 or 128.
        chunk: prompt tokens of a row that a step reads.
        end_ids: token ids that end an answer.
        choose: token ids from logits; the most probable by default.

    Raises:
        ValueError: a size is out of range.

    Example:
        >>> from jaxquant import models
        >>> from jaxquant.methods import turboquant
        >>> model = models.load()
        >>> keys, values = turboquant.kv(jax.random.key(0), dim=model.architecture.dim, bits_k=4, bits_v=4)
        >>> batcher = Batcher(model.decoder, keys, values, rows=2, pages=8, row_pages=4)
        >>> number = batcher.submit(model.tokenizer.encode("import numpy as"), max_tokens=1)
        >>> model.tokenizer.decode(batcher.run()[number])
        ' the'
    """

    def __init__(
        self,
        decoder: Decoder,
        keys: Quantizer,
        values: Quantizer,
        *,
        rows: int,
        pages: int,
        row_pages: int,
        page: int = 64,
        chunk: int = 64,
        end_ids: Collection[int] = (),
        choose: Choose | None = None,
    ) -> None:
        if chunk < 2:
            raise ValueError(f"chunk must be at least 2, got {chunk}")
        a = decoder.architecture
        self.cache: PagedCache = paged_cache.init(
            keys, values, layers=a.layers, batch=rows, kv_heads=a.kv_heads, pages=pages, row_pages=row_pages, page=page
        )
        self.counts = Counts()
        self._pool = PagePool(pages, page=page)
        self._graph, self._state = nnx.split(decoder)
        self._vocabulary, self._positions = a.vocabulary, a.max_positions
        self._chunk, self._end_ids = chunk, frozenset(end_ids)
        self._choose = choose or _most_probable
        self._rows: list[_Row | None] = [None] * rows
        self._waiting: collections.deque[_Request] = collections.deque()
        self._age: list[int] = []  # numbers of the requests in rows, in the order of their admission
        self._submitted = 0

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or being served."""
        return bool(self._waiting) or any(self._rows)

    @property
    def free_pages(self) -> int:
        """Pages that no request owns."""
        return self._pool.free

    def submit(self, prompt: Sequence[int], *, max_tokens: int) -> int:
        """Queue a request, and give its number.

        Raises:
            ValueError: the prompt is empty or holds an unknown id, or the request could never fit.
        """
        if not len(prompt) or min(prompt) < 0 or max(prompt) >= self._vocabulary:
            raise ValueError(f"prompt must hold at least one token id, each from 0 to {self._vocabulary - 1}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        longest = min(self.cache.capacity, self.cache.shape[0] * self.cache.shape[2], self._positions)
        if len(prompt) + max_tokens - 1 > longest:
            raise ValueError(
                f"prompt of {len(prompt)} tokens and max_tokens={max_tokens} exceed the {longest} tokens of a row"
            )
        self._submitted += 1
        self._waiting.append(_Request(number=self._submitted, prompt=list(prompt), max_tokens=max_tokens))
        return self._submitted

    def cancel(self, number: int) -> None:
        """Forget a request and free its pages; nothing happens where it is done already."""
        self._waiting = collections.deque(request for request in self._waiting if request.number != number)
        for i, row in enumerate(self._rows):
            if row is not None and row.request.number == number:
                self._leave(i)

    def run(self) -> dict[int, list[int]]:
        """Serve until nobody waits, and give the answers by number."""
        answers: dict[int, list[int]] = collections.defaultdict(list)
        while self.busy:
            for number, token in self.step():
                answers[number].append(token)
        return dict(answers)

    def step(self) -> list[tuple[int, int]]:
        """Advance every row, and give the new tokens as pairs of request and token id."""
        self._admit()
        out: list[tuple[int, int]] = []
        reading = [i for i, row in enumerate(self._rows) if row is not None and len(row.unread) > 1]
        if reading:
            out += self._forward(reading, self._chunk)
        decoding = [i for i, row in enumerate(self._rows) if row is not None and len(row.unread) == 1]
        decoding = self._grown(decoding)
        if decoding:
            out += self._forward(decoding, 1)
        self.counts.steps += bool(reading or decoding)
        return out

    def _admit(self) -> None:
        for i, row in enumerate(self._rows):
            if row is not None or not self._waiting:
                continue
            request = self._waiting[0]
            tokens = request.tokens
            shared = self._pool.find(tokens)
            try:
                own = self._pool.take(-(-len(tokens) // self._pool.page) - len(shared))
            except OutOfPages:
                self._pool.give_back(shared)
                return
            self._waiting.popleft()
            self._age.append(request.number)
            self._rows[i] = _Row(request=request, pages=shared + own, held=len(shared) * self._pool.page)
            self.counts.shared += len(shared) * self._pool.page

    def _grown(self, decoding: list[int]) -> list[int]:
        """Give each row a page for its next token; the youngest requests leave where there is none."""
        for i in decoding:
            row = self._rows[i]
            while row is not None and row is self._rows[i] and row.held == len(row.pages) * self._pool.page:
                try:
                    row.pages += self._pool.take(1)
                except OutOfPages:
                    youngest = next(
                        j for j, other in enumerate(self._rows) if other and other.request.number == self._age[-1]
                    )
                    left = self._leave(youngest)
                    self._waiting.appendleft(left)
                    self.counts.evicted += 1
        return [i for i in decoding if self._rows[i] is not None]

    def _leave(self, i: int) -> _Request:
        row = self._rows[i]
        assert row is not None
        self._pool.give_back(row.pages)
        self._age.remove(row.request.number)
        self._rows[i] = None
        return row.request

    def _forward(self, chosen: list[int], width: int) -> list[tuple[int, int]]:
        count = len(self._rows)
        tokens, mask = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
        table, held = np.full(self.cache.table.shape, -1, np.int32), np.zeros(count, np.int32)
        for i in chosen:
            row = self._rows[i]
            assert row is not None
            part = row.unread[:width]
            tokens[i, : len(part)], mask[i, : len(part)] = part, True
            table[i, : len(row.pages)], held[i] = row.pages, row.held
        logits, self.cache = _step(self._graph, self._state, self.cache.at(table, held), tokens, mask)
        best = np.asarray(self._choose(logits))
        out = []
        for i in chosen:
            row = self._rows[i]
            assert row is not None
            row.held += int(mask[i].sum())
            if width == 1:
                self.counts.decoded += 1
            else:
                self.counts.prefilled += int(mask[i].sum())
                self._pool.remember(row.request.tokens[: row.held], row.pages)
            if row.unread:
                continue
            token, request = int(best[i]), row.request
            ended = token in self._end_ids
            if not ended:
                request.answer.append(token)
                out.append((request.number, token))
            if ended or len(request.answer) == request.max_tokens:
                self._leave(i)
        return out


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(
    graph: nnx.GraphDef,
    state: PyTree,
    cache: PagedCache,
    tokens: Int[Array, "batch new"],
    mask: Bool[Array, "batch new"],
) -> tuple[Float[Array, "batch vocabulary"], PagedCache]:
    """Read tokens, and give the logits after the last of each row."""
    decoder: Decoder = nnx.merge(graph, state)
    hidden, extended = decoder.hidden(tokens, cache, mask=mask)
    assert isinstance(extended, PagedCache)
    last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
    return decoder.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0], extended


@jax.jit
def _most_probable(logits: Float[Array, "batch vocabulary"]) -> Int[Array, " batch"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
