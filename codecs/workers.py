"""Map over chunks with threads, in order and with a bounded number of results waiting."""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def available() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Map a function over items, in order; with threads, work begins at once and not when results are asked for.

    Args:
        function: Work that releases the interpreter lock for most of its time.
        items: What to map over; consumed as far ahead as results may wait.
        threads: Calls at the same time; 1 runs them in the caller.

    Returns:
        One result per item.
    """
    if threads == 1:
        return map(function, items)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    rest = iter(items)
    waiting = collections.deque(pool.submit(function, item) for item in itertools.islice(rest, 4 * threads))
    return _results(function, rest, pool, waiting)


def _results(function: Callable, rest: Iterator, pool: concurrent.futures.ThreadPoolExecutor, waiting) -> Iterator:
    try:
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in itertools.islice(rest, 1))
    finally:
        pool.shutdown(cancel_futures=True)
