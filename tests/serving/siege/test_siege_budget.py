"""What is held in the model's process for pictures that wait: bounded, given back at once, and fair."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np

from image_classifier.images import DecodeLimits
from image_classifier.serving.async_log import AsyncStream
from image_classifier.serving.worker import framing
from image_classifier.serving.worker.batching import BatchSettings
from image_classifier.serving.worker.main import PixelBudget, Worker


def test_a_large_picture_gets_its_turn_among_small_ones() -> None:
    budget, ended = PixelBudget(100), threading.Event()

    def small() -> None:
        while not ended.is_set():
            with budget.reserve(30):
                time.sleep(0.001)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            pool.submit(small)
        time.sleep(0.05)
        large = threading.Event()

        def take() -> None:
            with budget.reserve(100):
                large.set()

        pool.submit(take)
        found = large.wait(10)
        ended.set()
    assert found


def test_the_bytes_of_a_picture_that_nobody_wants_are_given_back_before_its_turn() -> None:
    reading, go_on, sent = threading.Event(), threading.Event(), []
    spec: Any = SimpleNamespace(batch=BatchSettings(), limits=DecodeLimits(), decode_s=30.0, hang_s=60.0)
    model: Any = SimpleNamespace(predictor=SimpleNamespace(detector=None, limits=DecodeLimits(), backend=None))
    process = Worker(model, spec, lambda message: sent.append(framing.read(io.BytesIO(message))), AsyncStream(2))

    def read(body: bytes) -> np.ndarray:
        reading.set()
        go_on.wait(10)
        raise ValueError("enough")

    process._read = read  # type: ignore[method-assign]
    decoders = process._decoders._max_workers
    for number in range(1, decoders + 6):
        process.take({"do": "image", "id": number, "name": "a.png"}, bytes(1000))
    assert reading.wait(10)
    for number in range(1, decoders + 6):
        process.take({"cancel": number}, b"")
    assert not process._bodies
    go_on.set()
    process._decoders.shutdown()
    process.batcher.stop()
    assert [head for head, _ in sent] == [{"id": 0}] * (decoders + 5)  # signs of life, and nothing is left
    assert not process._cancelled and not process._open
