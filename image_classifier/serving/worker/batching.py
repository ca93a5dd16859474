"""Dynamic batching: requests that wait are run together, as many as the latency limit allows."""

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

_DECAY = 0.8  # weight of the old estimate of the time per row, after one more batch
_WORTHWHILE_S = 0.02  # a second batch runs in parallel only if it has this many seconds of work


@dataclass(frozen=True)
class BatchSettings:
    """The keys of `batch`.

    Args:
        max_images: Maximum number of images in one batch.
        max_ms: Maximum time of a batch in milliseconds. A batch takes as many images as recent batches could run in
            this time, at least one.
        wait_ms: How long an image waits for others that are being decoded, in milliseconds.
        at_once: Parallel batches on the CPU, each with one core less for every other batch. A GPU runs one at a time.

    Raises:
        ConfigError: A value is out of range.
    """

    max_images: int = 32
    max_ms: float = 100.0
    wait_ms: float = 2.0
    at_once: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.max_images <= 4096:
            raise ConfigError(f"invalid batch.max_images {self.max_images}", "expected 1 to 4096")
        if not 1 <= self.at_once <= 64:
            raise ConfigError(f"invalid batch.at_once {self.at_once}", "expected 1 to 64")
        if not 0 < self.max_ms <= 60_000:
            raise ConfigError(f"invalid batch.max_ms {self.max_ms}", "expected more than 0 and at most 60000")
        if not 0 <= self.wait_ms <= 1000:
            raise ConfigError(f"invalid batch.wait_ms {self.wait_ms}", "expected 0 to 1000")


@dataclass
class BatchRequest:
    """Images that stay together in one batch, and a callback that gets their outputs or the error.

    Args:
        pixels: uint8 [n, 3, S, S].
        finish: Called once with the result for these n rows.
        embeddings: Whether the model must also return embeddings.
        wanted: Checked when a batch is filled; a request that returns False is dropped.
        looks: Brightness and colour statistics float32 [n, 11], given where out-of-distribution scores are wanted.
        since: When the request was made, by the monotonic clock.
    """

    pixels: np.ndarray
    finish: Callable[[BatchResult], None]
    embeddings: bool = False
    wanted: Callable[[], bool] = lambda: True
    looks: np.ndarray | None = None
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class BatchResult:
    """The outputs for n rows, or the error.

    Args:
        logits: float32 [n, C].
        embeddings: float32 [n, D], where the request asked for them.
        scores: Out-of-distribution scores [n], where the request has `looks`.
        error: Why there are no outputs.
        batch: How many images were run together.
    """

    logits: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    scores: np.ndarray | None = None
    error: Exception | None = None
    batch: int = 0


RunModel = Callable[[np.ndarray, bool], tuple[np.ndarray, np.ndarray | None]]
ScoreRows = Callable[[np.ndarray, np.ndarray], np.ndarray]


class DynamicBatcher:
    """Threads that run waiting requests: urgent ones first, then the others in order, idle ones if nothing else waits.

    Each of `runners` threads runs batches of its own: while one waits for a core that decodes, another computes. One
    more thread computes the scores of finished batches and calls back, so that no runner waits for that.

    Args:
        run: Takes pixels uint8 [N, 3, S, S] and whether embeddings are wanted; returns logits [N, C] and embeddings
            [N, D] or None.
        settings: Limits of a batch.
        score: Takes embeddings [N, D] and looks [N, 11]; returns scores [N].
        after_idle: Called after each batch of idle requests.
        runners: Number of threads that run batches.
    """

    def __init__(
        self,
        run: RunModel,
        settings: BatchSettings,
        score: ScoreRows | None = None,
        after_idle: Callable[[], None] = lambda: None,
        runners: int = 1,
    ) -> None:
        self._run = run
        self._settings = settings
        self._score = score
        self._after_idle = after_idle
        self._callbacks = ThreadPoolExecutor(1, "callbacks")
        self._queues: dict[str, deque[BatchRequest]] = {"urgent": deque(), "next": deque(), "idle": deque()}
        self._changed = threading.Condition()  # guards every field below
        self._decoding = 0
        self._row_s = 0.0  # estimated seconds per row; 0 until the first batch
        self._free_runners = runners
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._loop, name=f"batches-{number}", daemon=True) for number in range(runners)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, request: BatchRequest, queue: str = "next") -> None:
        """Add a request to a queue: `urgent`, `next` or `idle`."""
        with self._changed:
            self._queues[queue].append(request)
            self._changed.notify()

    def expect(self, count: int) -> None:
        """Add to the number of images that are being decoded, for which a batch waits a little; negative subtracts."""
        with self._changed:
            self._decoding += count
            self._changed.notify()

    def stop(self) -> None:
        """End the threads after the batches that they are running."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._callbacks.shutdown()

    def max_rows(self) -> int:
        """Return how many images a batch may have now."""
        if not self._row_s:
            return self._settings.max_images
        rows_in_time = int(self._settings.max_ms / 1000 / self._row_s)
        return max(1, min(self._settings.max_images, rows_in_time))

    def _loop(self) -> None:
        """Run batches until the batcher is stopped."""
        while True:
            with self._changed:
                # Sleep until a batch should start. While requests wait, look again after `max_ms`: one may have waited
                # too long by then.
                while not self._should_start():
                    self._changed.wait(self._settings.max_ms / 1000 if any(self._queues.values()) else None)
                if self._stopped:
                    return
                # Give images that are being decoded a short time to join, unless an urgent request waits.
                if not self._queues["urgent"]:
                    self._changed.wait_for(self._is_full, self._settings.wait_ms / 1000)
                # The lock was free in that time: another runner may have taken the requests.
                name = next((name for name, queue in self._queues.items() if queue), None)
                if name is None or not self._should_start():
                    continue
                chosen = self._take_batch(self._queues[name])
                self._free_runners -= 1
                # Wake another runner: enough requests may be left for it.
                self._changed.notify()
            try:
                if chosen:
                    self._run_batch(chosen)
                if name == "idle":
                    self._after_idle()
            finally:
                with self._changed:
                    self._free_runners += 1

    def _is_full(self) -> bool:
        """Check whether waiting for more images is pointless."""
        return self._stopped or not self._decoding or _count_rows(self._queues["next"]) >= self.max_rows()

    def _should_start(self) -> bool:
        """Check whether to start a batch now.

        A runner starts at once if no other runner is busy. A batch that runs in parallel must be worth its cost, or
        hold a request that has waited for `max_ms`.
        """
        queues = [queue for queue in self._queues.values() if queue]
        if self._stopped or self._queues["urgent"] or (queues and self._free_runners == len(self._threads)):
            return True
        too_old = time.monotonic() - self._settings.max_ms / 1000
        return any(_count_rows(queue) * self._row_s >= _WORTHWHILE_S or queue[0].since <= too_old for queue in queues)

    def _take_batch(self, queue: deque[BatchRequest]) -> list[BatchRequest]:
        """Remove the next batch from a queue: complete requests in order, at least one, without cancelled ones."""
        # Leave a fair share of the rows to the other free runners, but never split work below what is worth a batch.
        fair_share = math.ceil(_count_rows(queue) / self._free_runners)
        smallest = math.ceil(_WORTHWHILE_S / self._row_s) if self._row_s else self._settings.max_images
        limit = min(self.max_rows(), max(fair_share, smallest))

        # Take requests until the next one would exceed the limit; a first one that is larger runs alone.
        chosen: list[BatchRequest] = []
        rows = 0
        while queue and (not chosen or rows + len(queue[0].pixels) <= limit):
            request = queue.popleft()
            if request.wanted():
                chosen.append(request)
                rows += len(request.pixels)
        return chosen

    def _run_batch(self, requests: Sequence[BatchRequest]) -> None:
        """Run the model once for all requests and update the estimated time per row."""
        rows = _count_rows(requests)
        start = time.monotonic()
        try:
            # [n, 3, S, S] of each request -> [N, 3, S, S]
            pixels = requests[0].pixels if len(requests) == 1 else np.concatenate([one.pixels for one in requests])
            logits, embeddings = self._run(pixels, any(one.embeddings for one in requests))
        except Exception as error:
            self._callbacks.submit(_call_back, requests, BatchResult(error=error, batch=rows))
            return
        row_s = (time.monotonic() - start) / rows
        with self._changed:
            # Exponential moving average; the first batch sets it.
            self._row_s = row_s if not self._row_s else _DECAY * self._row_s + (1 - _DECAY) * row_s
        self._callbacks.submit(self._finish_batch, requests, BatchResult(logits, embeddings, batch=rows))

    def _finish_batch(self, requests: Sequence[BatchRequest], result: BatchResult) -> None:
        """Compute scores where requests have `looks`, then call back."""
        no_looks = np.zeros((0, 0), np.float32)
        looks = [no_looks if one.looks is None else one.looks for one in requests]
        width = max(table.shape[1] for table in looks)
        try:
            if width and self._score is not None and result.embeddings is not None:
                # Rows without looks get zeros, so that the table has a row for each embedding: [N, 11].
                rows = [
                    table if table.shape[1] else np.zeros((len(one.pixels), width), np.float32)
                    for one, table in zip(requests, looks, strict=True)
                ]
                result = replace(result, scores=self._score(result.embeddings, np.concatenate(rows)))
        except Exception as error:
            result = BatchResult(error=error, batch=result.batch)
        _call_back(requests, result)


def _count_rows(requests: Iterable[BatchRequest]) -> int:
    return sum(len(request.pixels) for request in requests)


def _call_back(requests: Sequence[BatchRequest], result: BatchResult) -> None:
    """Give each request its rows of the outputs, or the error."""
    start = 0
    for request in requests:
        rows = slice(start, start + len(request.pixels))
        start = rows.stop
        logits, embeddings, scores = (
            None if table is None else table[rows] for table in (result.logits, result.embeddings, result.scores)
        )
        request.finish(BatchResult(logits, embeddings, scores, result.error, result.batch))
