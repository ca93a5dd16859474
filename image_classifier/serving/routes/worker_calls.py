"""Requests of the routes to a worker process, whose errors become HTTP errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from image_classifier.errors import ClassifierError
from image_classifier.serving.request_limits import Refusal
from image_classifier.serving.worker.handle import DeadlineExceeded, QueueFull, WorkerEnded, WorkerHandle


@contextmanager
def queue_slots(handle: WorkerHandle, images: int) -> Iterator[None]:
    """Reserve room in a model's queue while the block runs; raise Refusal at once where there is not enough."""
    try:
        with handle.queue_slots(images):
            yield
    except QueueFull as error:
        raise Refusal(503, "queue_full", str(error), error.retry_after_s) from None


async def ask_worker(
    handle: WorkerHandle, header: Mapping[str, Any], content: bytes, timeout_s: float
) -> tuple[dict[str, Any], bytes]:
    """Return the answer of a worker process.

    Raises:
        Refusal: There is no answer.
        WorkerCrash: The process dies of this request.
    """
    try:
        return await handle.request(header, content, timeout_s)
    except DeadlineExceeded as error:
        raise Refusal(503, "too_late", str(error), 1.0) from None
    except WorkerEnded as error:
        raise Refusal(503, "stopping", str(error), 1.0) from None
    except ClassifierError as error:
        raise Refusal(500, "model_failed", str(error)) from None
