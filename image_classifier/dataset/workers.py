"""All cores for work on many images: blocks go out, results come back in order, errors are raised in the caller.

Workers are plain Python processes on two pipes instead of multiprocessing's. They never import the caller's `__main__`,
so notebooks, `python -c`, scripts without a guard and daemonic processes may start them. They are never forked from a
process with threads in it, and end by themselves when the caller dies, however it died.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from image_classifier.cpu import usable_cores
from image_classifier.errors import DataError
from image_classifier.progress import with_bar

Block = TypeVar("Block")
Result = TypeVar("Result")

MANY = 2048  # items for which processes are worth their start of about half a second
_AHEAD = 2  # blocks in flight per worker: one in work and one waiting, so that results cannot pile up
_START = "import sys; sys.path[:] = {path}; from image_classifier.dataset.workers import serve; serve()"


def map_blocks(
    function: Callable[[Block], Result],
    blocks: Sequence[Block],
    items: int,
    workers: int | None = None,
    progress: str | None = None,
) -> Generator[Result, None, None]:
    """Yield `function(block)` for each block, in the order of `blocks`; close the iterator to stop early.

    Few items are spread over threads, many over processes: work on a tiny image holds the interpreter's lock.

    Args:
        function: A top-level function or a `functools.partial` of one; its arguments and results can be pickled.
        blocks: Pieces of work of less than a second each: Ctrl-C waits for threads that are in one.
        items: Images (or the like) in all blocks together.
        workers: Threads or processes; None for one a core.
        progress: Text of the progress bar on standard error; None for no bar.

    Raises:
        DataError: A worker process was killed, mostly because memory is full.
        Exception: Whatever `function` raises, for the first block in order that fails.
    """
    count = max(1, min(workers or usable_cores(), len(blocks)))
    processes = _started(function, count) if count > 1 and items >= MANY else []
    results: Generator[Result, None, None] = (
        _answers(processes, blocks) if processes else _in_order(function, blocks, count)
    )
    with closing(results):
        yield from with_bar(results, progress, len(blocks)) if progress else results


def _in_order(
    call: Callable[[Block], Result], blocks: Sequence[Block], count: int, stop: Callable[[], None] | None = None
) -> Generator[Result, None, None]:
    """Yield results of `call` in the order of `blocks`, with `count` calls at a time.

    `stop` ends those in progress when the caller no longer waits for them.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(count) as pool:
        try:
            for block in blocks:
                waiting.append(pool.submit(call, block))
                if len(waiting) >= _AHEAD * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            if stop:
                stop()


def _answers(processes: Sequence[_Worker], blocks: Sequence[Any]) -> Generator[Any, None, None]:
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in processes:
        idle.put(worker)

    def call(block: Any) -> Any:
        worker = idle.get()
        try:
            return worker(block)
        finally:
            idle.put(worker)

    def stop() -> None:
        for worker in processes:
            worker.process.kill()

    try:
        yield from _in_order(call, blocks, len(processes), stop)
    finally:
        _ended(processes)


def _started(function: Callable[..., Any], count: int) -> list[_Worker]:
    """Start so many workers; return none if this Python cannot start another: then threads are used."""
    if not sys.executable or getattr(sys, "frozen", False):
        return []
    order = pickle.dumps(function)
    workers: list[_Worker] = []
    try:
        for _ in range(count):
            workers.append(_Worker(order))
    except OSError:  # the system's limit of processes
        _ended(workers)
        return []
    except BaseException:
        _ended(workers)
        raise
    return workers


def _ended(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.end()


class _Worker:
    """One process; called with a block, it returns the function's result or raises the function's error."""

    def __init__(self, order: bytes) -> None:
        self.order: bytes | None = order
        command = [sys.executable, f"-Xutf8={sys.flags.utf8_mode}", "-c", _START.format(path=ascii(sys.path))]
        # There are as many workers as cores.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # A new session: Ctrl-C on the terminal reaches the caller only, which then ends the workers.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )

    def __call__(self, block: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        content = pickle.dumps(block)
        try:
            if self.order is not None:
                self.process.stdin.write(self.order)
                self.order = None
            self.process.stdin.write(content)
            self.process.stdin.flush()
            good, answer = pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise self._lost() from error
        if not good:
            raise answer
        return answer

    def _lost(self) -> DataError:
        code = self.process.wait()
        ending = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
        return DataError(
            f"a worker process ended with {ending}",
            "the memory may be full: free some, or use fewer workers with data.cache.workers=1",
        )

    def end(self) -> None:
        """Kill the process, which holds nothing, and close its pipes."""
        self.process.kill()
        with suppress(BrokenPipeError):  # it never read its block
            self.process.communicate()


def serve() -> None:
    """Run a worker: read a function and then blocks from standard input, and write each result to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError), os.fdopen(os.dup(1), "wb") as output:
        # What a library prints must not mix with the results; standard error loses nothing when the worker is killed.
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        function = pickle.load(sys.stdin.buffer)
        while True:
            answer = _answer(function, pickle.load(sys.stdin.buffer))
            pickle.dump(answer, output, protocol=pickle.HIGHEST_PROTOCOL)
            output.flush()


def _answer(function: Callable[[Any], Any], block: Any) -> tuple[bool, Any]:
    try:
        return True, function(block)
    except Exception as error:  # raised again in the caller
        try:
            return False, pickle.loads(pickle.dumps(error)) and error
        except Exception:
            return False, RuntimeError(f"{type(error).__name__}: {error}")
