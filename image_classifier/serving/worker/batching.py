"""Dynamic batching: rows of pixels that wait are run together, as many as the bound on latency allows."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from image_classifier.errors import ConfigError

_MEMORY = 0.8  # of what was known of the time a row takes, after one more batch
_WORTH_S = 0.02  # of work that is worth a batch of its own beside another


@dataclass(frozen=True)
class BatchSettings:
    """The keys of `batch`.

    Args:
        max_images: The most in one batch.
        max_ms: How long a batch may run, milliseconds; as many images are taken as did fit in it lately, at least one.
        wait_ms: How long an image waits for others that are being decoded, milliseconds.
        at_once: Batches beside each other on the processor, each with a core less for every other one; on a GPU there is one.

    Raises:
        ConfigError: A value that cannot be.
    """

    max_images: int = 32
    max_ms: float = 100.0
    wait_ms: float = 2.0
    at_once: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.max_images <= 4096:
            raise ConfigError(f"batch.max_images must be a number from 1 to 4096, not {self.max_images}")
        if not 1 <= self.at_once <= 64:
            raise ConfigError(f"batch.at_once must be a number from 1 to 64, not {self.at_once}")
        if not 0 < self.max_ms <= 60_000 or not 0 <= self.wait_ms <= 1000:
            raise ConfigError("batch.max_ms must be above 0 and at most 60000, batch.wait_ms from 0 to 1000")


@dataclass
class BatchRequest:
    """Pixels uint8 [n, 3, S, S] that belong together, and what is called with their share of the outputs, or with the error.

    `looks` float32 [n, 11] are given where scores are wanted, which need embeddings.
    """

    pixels: np.ndarray
    finish: Callable[[BatchResult], None]
    embeddings: bool = False
    wanted: Callable[[], bool] = lambda: True
    looks: np.ndarray | None = None
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class BatchResult:
    """Logits float32 [n, C] and, where asked for, embeddings float32 [n, D] and scores [n]; or the error. `batch` images were run together."""

    logits: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    scores: np.ndarray | None = None
    error: Exception | None = None
    batch: int = 0


Run = Callable[[np.ndarray, bool], tuple[np.ndarray, np.ndarray | None]]
Judge = Callable[[np.ndarray, np.ndarray], np.ndarray]


class DynamicBatcher:
    """Threads that run what waits: urgent work first, then the others in their order, idle work where there is nothing else.

    Of `runners` each runs a batch of its own, beside each other: while one waits for a core that decodes, the other computes. Another thread hands
    out the answers, so that the model waits for none of that; it has the scores of a whole batch from `judge`, which takes embeddings [N, D] and
    looks [N, 11]. `after_idle` is called after each batch of idle work.
    """

    def __init__(
        self,
        run: Run,
        asked: BatchSettings,
        judge: Judge | None = None,
        after_idle: Callable[[], None] = lambda: None,
        runners: int = 1,
    ) -> None:
        self._run, self._asked, self._judge, self._after_idle = run, asked, judge, after_idle
        self._answers = ThreadPoolExecutor(1, "answers")
        self._waiting: dict[str, deque[BatchRequest]] = {"urgent": deque(), "next": deque(), "idle": deque()}
        self._changed = threading.Condition()
        self._coming = 0
        self._row_s = 0.0
        self._free = runners
        self._ended = False
        self._threads = [
            threading.Thread(target=self._loop, name=f"batches-{number}", daemon=True) for number in range(runners)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, work: BatchRequest, when: str = "next") -> None:
        """Let the work wait for its turn: urgent, next or idle."""
        with self._changed:
            self._waiting[when].append(work)
            self._changed.notify()

    def coming(self, count: int) -> None:
        """So many more (or, negative, fewer) images are being decoded, for which a batch may wait a little."""
        with self._changed:
            self._coming += count
            self._changed.notify()

    def stop(self) -> None:
        """End the threads after the batches that they are running."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._answers.shutdown()

    def most(self) -> int:
        """Images that a batch may have now."""
        fitting = int(self._asked.max_ms / 1000 / self._row_s) if self._row_s else self._asked.max_images
        return max(1, min(self._asked.max_images, fitting))

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._due():
                    self._changed.wait(self._asked.max_ms / 1000 if any(self._waiting.values()) else None)
                if self._ended:
                    return
                if not self._waiting["urgent"]:
                    enough = lambda: self._ended or not self._coming or _rows(self._waiting["next"]) >= self.most()
                    self._changed.wait_for(enough, self._asked.wait_ms / 1000)
                kind = next((kind for kind, queue in self._waiting.items() if queue), None)
                if kind is None or not self._due():
                    continue  # another runner took it, or all but a little
                chosen = self._taken(self._waiting[kind])
                self._free -= 1
                self._changed.notify()  # of another runner, where enough is left
            try:
                if chosen:
                    self._answer(chosen)
                if kind == "idle":
                    self._after_idle()
            finally:
                with self._changed:
                    self._free += 1

    def _due(self) -> bool:
        """Whether to begin a batch now; beside another one where it is worth its price, or what waits has waited long."""
        queues = [queue for queue in self._waiting.values() if queue]
        if self._ended or self._waiting["urgent"] or (queues and self._free == len(self._threads)):
            return True
        latest = time.monotonic() - self._asked.max_ms / 1000
        return any(_rows(queue) * self._row_s >= _WORTH_S or queue[0].since <= latest for queue in queues)

    def _taken(self, waiting: deque[BatchRequest]) -> list[BatchRequest]:
        """The works of the next batch, in their order, at least one, together no more rows than `most` and than another free runner leaves."""
        chosen: list[BatchRequest] = []
        share = max(
            math.ceil(_rows(waiting) / self._free),
            math.ceil(_WORTH_S / self._row_s) if self._row_s else self._asked.max_images,
        )
        rows, most = 0, min(self.most(), share)
        while waiting and (not chosen or rows + len(waiting[0].pixels) <= most):
            work = waiting.popleft()
            if work.wanted():
                chosen.append(work)
                rows += len(work.pixels)
        return chosen

    def _answer(self, works: Sequence[BatchRequest]) -> None:
        rows, start = _rows(works), time.monotonic()
        try:
            pixels = works[0].pixels if len(works) == 1 else np.concatenate([work.pixels for work in works])
            logits, embeddings = self._run(pixels, any(work.embeddings for work in works))
        except Exception as error:
            self._answers.submit(_hand_out, works, BatchResult(error=error, batch=rows))
            return
        row_s = (time.monotonic() - start) / rows
        with self._changed:
            self._row_s = row_s if not self._row_s else _MEMORY * self._row_s + (1 - _MEMORY) * row_s
        self._answers.submit(self._judged, works, BatchResult(logits, embeddings, batch=rows))

    def _judged(self, works: Sequence[BatchRequest], found: BatchResult) -> None:
        """Hand out the answers, with scores where there are `looks`."""
        looks = [
            work.looks if work.looks is not None else np.zeros((len(work.pixels), 0), np.float32) for work in works
        ]
        width = max(table.shape[1] for table in looks)
        try:
            if width and self._judge is not None and found.embeddings is not None:
                seen = np.concatenate(
                    [table if table.shape[1] else np.zeros((len(table), width), np.float32) for table in looks]
                )
                found = replace(found, scores=self._judge(found.embeddings, seen))
        except Exception as error:
            found = BatchResult(error=error, batch=found.batch)
        _hand_out(works, found)


def _rows(works: Iterable[BatchRequest]) -> int:
    return sum(len(work.pixels) for work in works)


def _hand_out(works: Sequence[BatchRequest], found: BatchResult) -> None:
    """To each work its rows."""
    first = 0
    for work in works:
        own = slice(first, first := first + len(work.pixels))
        logits, embeddings, scores = (
            None if table is None else table[own] for table in (found.logits, found.embeddings, found.scores)
        )
        work.finish(BatchResult(logits, embeddings, scores, found.error, found.batch))
