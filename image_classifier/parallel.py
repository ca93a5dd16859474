"""Work on large tables block by block, on several threads, with results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from image_classifier.cpu import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_THREADS = 8  # each needs memory for a block


def num_threads() -> int:
    """Return the number of cores that this process may use, at most 8."""
    return min(usable_cores(), _MAX_THREADS)


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Iterator[Result]:
    """Yield the function's results in the order of the items, computed on threads (numpy releases the lock).

    At most one result more than there are threads is computed ahead.

    >>> list(parallel_map(lambda number: number**2, range(4), threads=2))
    [0, 1, 4, 9]
    """
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
    """Return slices of `step` rows (at least one) that cover 0..total.

    >>> list(slices(5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, step)
    return (slice(start, min(start + step, total)) for start in range(0, total, step))
