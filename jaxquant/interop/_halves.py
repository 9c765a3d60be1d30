"""What a framework's cache holds of one layer: packed codes, the first tokens and the newest ones as they came.

Every token has a slot, padding included, as in the frameworks' own caches. A token is coded once: when it leaves the
window of newest tokens, from its exact copy, which is then forgotten. So the codes do not depend on how the input was
cut into chunks, and what is read depends on nothing but what is held.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

Tensor = Any  # of the framework


@runtime_checkable
class Coder(Protocol):
    """A quantizer in the arithmetic of one framework, and the few operations in which frameworks differ."""

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        ...

    def quantize(self, x: Tensor, /) -> tuple[Tensor, ...]:
        """Code tokens [batch, kv_heads, tokens, dim]: tensors with the same leading axes."""
        ...

    def dequantize(self, code: tuple[Tensor, ...], like: Tensor, /) -> Tensor:
        """Decode tokens, in the dtype of `like`."""
        ...

    def join(self, parts: Sequence[Tensor], /) -> Tensor:
        """Concatenate along tokens, into memory of its own."""
        ...

    def zeros(self, like: Tensor, tokens: int, /) -> Tensor:
        """Make tokens of zeros, with the other axes, the dtype and the device of `like`."""
        ...

    def own(self, x: Tensor, /) -> Tensor:
        """Copy, so that nothing of a larger tensor stays alive."""
        ...

    def place(
        self, out: Tensor, rows: Sequence[int], slots: Sequence[int], tokens: Tensor, which: Sequence[int], /
    ) -> Tensor:
        """Set `out[rows[i], :, slots[i]]` to `tokens[rows[i], :, which[i]]` for every i, and return it."""
        ...


class Half:
    """The keys, or the values, of one layer.

    Attributes:
        coder: of every token that is not exact.
        sinks: tokens at the start of a row that stay exact, padding not counted.
        window: newest slots that stay exact.
        codes: of the slots from `start` on that have left the window, [batch, kv_heads, slots, ...] each.
        recent: the slots after those, as they came.
        exact: the first tokens of every row, [batch, kv_heads, sinks, dim].
        start: the oldest slot held.
    """

    def __init__(self, coder: Coder, *, sinks: int, window: int, like: Tensor):
        self.coder, self.sinks, self.window = coder, sinks, window
        self.recent = coder.zeros(like, 0)
        self.codes = coder.quantize(self.recent)
        self.exact = coder.zeros(like, sinks) if sinks else None
        self.start = 0

    @property
    def coded(self) -> int:
        """Slots held as codes."""
        return self.codes[0].shape[2]

    @property
    def end(self) -> int:
        """The slot of the next token."""
        return self.start + self.coded + self.recent.shape[2]

    @property
    def tensors(self) -> list[Tensor]:
        """All that grows or shrinks with the tokens held."""
        return [*self.codes, self.recent, *([] if self.exact is None else [self.exact])]

    def append(self, x: Tensor, padding: Sequence[int]) -> None:
        """Add tokens to every row.

        Args:
            x: the tokens, [batch, kv_heads, new, dim].
            padding: slots at the start of each row that hold no token.
        """
        self._keep_sinks(x, padding)
        newest = self.coder.join([self.recent, x])
        leaving = newest.shape[2] - self.window
        if leaving > 0:
            coded = self.coder.quantize(newest[:, :, :leaving])
            self.codes = tuple(self.coder.join(pair) for pair in zip(self.codes, coded, strict=True))
            newest = self.coder.own(newest[:, :, leaving:])
        self.recent = newest

    def read(self, padding: Sequence[int]) -> Tensor:
        """Decode every slot held, from `start` on, in the dtype of the tokens."""
        out = self.coder.dequantize(self.codes, self.recent)
        if self.recent.shape[2]:
            out = self.coder.join([out, self.recent])
        if self.exact is not None and self.start < max(padding, default=0) + self.sinks:
            out = self._place(out, self.start, self.start + self.coded, padding, self.exact, backwards=False)
        return out

    def crop(self, end: int) -> None:
        """Forget every slot from `end` on."""
        if end < self.end:
            kept = max(end - self.start, 0)
            self._cut(slice(0, min(kept, self.coded)), slice(0, max(kept - self.coded, 0)))
            self.start = min(self.start, end)

    def drop(self, start: int) -> None:
        """Forget every slot before `start`."""
        if start > self.start:
            gone = min(start - self.start, self.end - self.start)
            self._cut(slice(min(gone, self.coded), None), slice(max(gone - self.coded, 0), None))
            self.start += gone

    def select(self, take: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by some of its rows."""
        self.codes = tuple(take(code) for code in self.codes)
        self.recent = take(self.recent)
        self.exact = None if self.exact is None else take(self.exact)

    def _cut(self, coded: slice, recent: slice) -> None:
        self.codes = tuple(self.coder.own(code[:, :, coded]) for code in self.codes)
        self.recent = self.coder.own(self.recent[:, :, recent])

    def _keep_sinks(self, x: Tensor, padding: Sequence[int]) -> None:
        if self.exact is None or self.end >= max(padding, default=0) + self.sinks:
            return
        self.exact = self._place(self.exact, self.end, self.end + x.shape[2], padding, x, backwards=True)

    def _place(
        self, out: Tensor, first: int, last: int, padding: Sequence[int], tokens: Tensor, *, backwards: bool
    ) -> Tensor:
        """Copy sinks whose slots lie in [first, last) to a tensor of these slots, or backwards from it to the sinks."""
        if len(set(padding)) == 1:
            low, high = max(first, padding[0]), min(last, padding[0] + self.sinks)
            if low < high:
                places = slice(low - first, high - first), slice(low - padding[0], high - padding[0])
                to, source = places[::-1] if backwards else places
                out[:, :, to] = tokens[:, :, source]
            return out
        found = [
            (row, offset + i - first, i)
            for row, offset in enumerate(padding)
            for i in range(self.sinks)
            if first <= offset + i < last
        ]
        if not found:
            return out
        rows, slots, sinks = zip(*found, strict=True)
        return self.coder.place(out, rows, *((sinks, tokens, slots) if backwards else (slots, tokens, sinks)))
