"""Who owns which page: reference counts, prefixes that several rows share, and what may be used again. No arrays.

A page that is full of a prompt's tokens is known by all tokens from the start of the row to its end, so that another
prompt with the same beginning owns it too instead of computing it. When its last owner leaves, it keeps its content
until the room is needed; the one that was left longest ago goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence


class OutOfPages(Exception):
    """More pages are asked for than are free: finish or evict a row, and ask again."""


class PagePool:
    """Pages by number, from 0.

    Example:
        >>> pool = PagePool(4, page=2)
        >>> first = pool.take(2)
        >>> pool.remember([5, 6, 7], first)  # one page is full
        >>> pool.find([5, 6, 9])
        [0]
        >>> pool.free
        2
    """

    def __init__(self, pages: int, *, page: int) -> None:
        if pages < 1 or page < 1:
            raise ValueError(f"pages and page must be at least 1, got {pages} and {page}")
        self.page = page
        self._owners = [0] * pages
        self._empty = list(range(pages - 1, -1, -1))
        self._known: dict[tuple[int, ...], int] = {}
        self._names: dict[int, tuple[int, ...]] = {}
        self._left: OrderedDict[int, None] = OrderedDict()  # known pages that nobody owns, oldest first

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._empty) + len(self._left)

    def owners(self, number: int) -> int:
        """Count the rows that own a page."""
        return self._owners[number]

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Own the pages that hold the longest known beginning of a prompt, and give them in order.

        At least one token stays outside, since the logits after the prompt's last token have to be computed.
        """
        found: list[int] = []
        for stop in range(self.page, len(tokens), self.page):
            number = self._known.get(tuple(tokens[:stop]))
            if number is None:
                break
            self._owners[number] += 1
            self._left.pop(number, None)
            found.append(number)
        return found

    def take(self, count: int) -> list[int]:
        """Own pages whose content does not matter.

        Raises:
            OutOfPages: fewer are free; nothing is taken then.
        """
        if count > self.free:
            raise OutOfPages(f"{count} pages are asked for and {self.free} are free")
        taken = []
        for _ in range(count):
            if not self._empty:
                number, _ = self._left.popitem(last=False)
                del self._known[self._names.pop(number)]
                self._empty.append(number)
            taken.append(self._empty.pop())
        for number in taken:
            self._owners[number] = 1
        return taken

    def remember(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Say what a row's first pages hold; only those that `tokens` fill are remembered."""
        for i, number in enumerate(pages[: len(tokens) // self.page]):
            name = tuple(tokens[: (i + 1) * self.page])
            if name not in self._known and number not in self._names:
                self._known[name], self._names[number] = number, name

    def give_back(self, pages: Sequence[int]) -> None:
        """Own pages no longer.

        Raises:
            ValueError: nobody owns one of them.
        """
        for number in reversed(pages):  # a later page is of use only with those before it: it goes first
            if not self._owners[number]:
                raise ValueError(f"page {number} has no owner")
            self._owners[number] -= 1
            if self._owners[number]:
                continue
            if number in self._names:
                self._left[number] = None
            else:
                self._empty.append(number)
