"""Large tables by pieces: a few at a time on the processor's cores, their results in order whatever the number of threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from image_classifier.cpu import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_THREADS = 8  # each needs room for a piece of its own


def num_threads() -> int:
    """Return the cores that this process may use, 8 at most."""
    return min(usable_cores(), _MOST_THREADS)


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Iterator[Result]:
    """The function's results in the order of the items, computed by threads (numpy frees the lock), no more of them ahead than threads."""
    count = threads or num_threads()
    if count == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(count) as pool:
        ahead: deque[Future[Result]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def slices(total: int, step: int) -> Iterator[slice]:
    """Pieces of `step` (at least one) that make up 0..total."""
    step = max(1, step)
    return (slice(start, min(start + step, total)) for start in range(0, total, step))
