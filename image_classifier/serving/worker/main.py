"""The process that holds a model: it decodes, batches and answers what the server sends, and ends when the server is gone.

Nothing that a client sends is decoded in the server itself: a picture that kills or hangs its decoder costs this process, which is started anew.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from image_classifier.cpu import usable_cores
from image_classifier.errors import ClassifierError, UnreadableImage
from image_classifier.evaluation.reliability.ood import looks
from image_classifier.images import read_size
from image_classifier.serving.async_log import AsyncStream
from image_classifier.serving.worker import framing
from image_classifier.serving.worker.batching import BatchRequest, BatchResult, DynamicBatcher
from image_classifier.serving.worker.spec import LoadedModel, ModelSpec

_NOBODY = 0  # whose messages are signs of life
_HUNG = 70  # the exit code of a process that ended itself


class PixelBudget:
    """How many pixels may be decoded at once: large pictures wait for one another, so that memory has a bound."""

    def __init__(self, most: int) -> None:
        self._left = self._most = most
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # small pictures do not overtake a large one for ever

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Hold so many while the block runs."""
        pixels = min(pixels, self._most)
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += pixels
                self._changed.notify_all()


class Worker:
    """Answers messages: `image`, `pixels`, `explain`, `canary`, and `cancel` of one of them."""

    def __init__(
        self, model: LoadedModel, order: ModelSpec, send: Callable[[bytes], None], errors: AsyncStream
    ) -> None:
        self.model, self.predictor, self._send, self._errors = model, model.predictor, send, errors
        self._judge = None if self.predictor.detector is None else self.predictor.detector.scores
        runners = getattr(self.predictor.backend, "concurrent_runs", 1)
        self.batches = DynamicBatcher(
            self._run, order.batch, self._judge, lambda: send(framing.encode({"id": _NOBODY})), runners
        )  # a sign of life
        self._decoders = ThreadPoolExecutor(usable_cores(), "decode")
        self._explainer = ThreadPoolExecutor(1, "decode-to-explain")
        self._budget = PixelBudget(order.limits.max_pixels)
        self._gone: set[int] = set()
        self._open: set[int] = set()
        self._bodies: dict[int, bytes] = {}  # of pictures that wait to be decoded
        self._busy: dict[str, float] = {}  # since when each thread has been at one thing
        threading.Thread(target=self._watch, args=(order.decode_s, order.hang_s), daemon=True).start()
        self._do = {"image": self._image, "pixels": self._pixels, "canary": self._canary, "explain": self._explain}

    def _watch(self, decode_s: float, hang_s: float) -> None:
        """End the process where a decoder or the model hangs: its thread cannot be ended, and the server starts another process."""
        while True:
            time.sleep(min(1.0, decode_s / 4, hang_s / 4))
            now = time.monotonic()
            for thread, since in list(self._busy.items()):
                limit = decode_s if thread.startswith("decode") else hang_s
                if now - since > limit:
                    self._errors.write(
                        f"the thread {thread} is at one thing for more than {limit:g} s: the process ends\n"
                    )
                    self._errors.end()
                    os._exit(_HUNG)

    @contextmanager
    def _at_one_thing(self) -> Iterator[None]:
        name = threading.current_thread().name
        self._busy[name] = time.monotonic()
        try:
            yield
        finally:
            del self._busy[name]

    def take(self, head: dict[str, Any], body: bytes) -> None:
        """One message; its answer is sent when it is there."""
        if "cancel" in head:
            self._gone |= {head["cancel"]} & self._open
            self._bodies.pop(head["cancel"], None)  # now: its turn to be decoded may come late
            return
        self._open.add(head["id"])
        self._do[head["do"]](head, body)

    def _answer(self, number: int, head: dict[str, Any], body: bytes = b"") -> None:
        self._open.discard(number)
        if number in self._gone:
            self._gone.discard(number)
            head, body, number = {}, b"", _NOBODY
        self._send(framing.encode({"id": number, **head}, body))

    def _fail(self, number: int, error: BaseException) -> None:
        own = isinstance(error, ClassifierError)
        self._answer(number, {"failed": str(error) if own else f"{type(error).__name__}: {error}"})

    def _wanted(self, number: int) -> Callable[[], bool]:
        def wanted() -> bool:
            if number in self._gone:
                self._answer(number, {})
                return False
            return True

        return wanted

    def _run(self, pixels: np.ndarray, embeddings: bool) -> tuple[np.ndarray, np.ndarray | None]:
        backend: Any = self.predictor.backend
        with self._at_one_thing():
            return backend.logits_and_embeddings(pixels) if embeddings else (backend.logits(pixels), None)

    def _image(self, head: dict[str, Any], body: bytes) -> None:
        self.batches.coming(1)
        self._bodies[head["id"]] = body
        self._decoders.submit(self._decode, head["id"], head["name"])

    def _decode(self, number: int, name: str) -> None:
        body = self._bodies.pop(number, b"")
        try:
            if not self._wanted(number)():
                return
            pixels = self._read(body)[None]
            seen = None if self._judge is None else looks(pixels)
            self.batches.put(
                BatchRequest(
                    pixels,
                    lambda found: self._predict(number, name, found),
                    seen is not None,
                    self._wanted(number),
                    seen,
                )
            )
        except UnreadableImage as error:
            self._answer(number, {"answer": {"path": name, "error": error.reason}})
        except Exception as error:
            self._fail(number, error)
        finally:
            self.batches.coming(-1)

    def _read(self, body: bytes) -> np.ndarray:
        """The pixels uint8 [3, S, S] of a picture."""
        limits = self.predictor.limits
        width, height = read_size(body, limits)
        with self._budget.of(width * height), self._at_one_thing():
            return np.ascontiguousarray(self.predictor.preprocess.read(body, limits).transpose(2, 0, 1))

    def _predict(self, number: int, name: str, found: BatchResult) -> None:
        try:
            if found.error is not None or found.logits is None:
                raise found.error or RuntimeError("no logits")
            (prediction,) = self.predictor.to_predictions([name], found.logits, found.scores)
            if prediction.error:
                raise FloatingPointError(prediction.error)
            score = None if found.scores is None else float(found.scores[0])
            self._answer(number, {"answer": prediction.answer(), "ood_score": score, "batch": found.batch})
        except Exception as error:
            self._fail(number, error)

    def _pixels(self, head: dict[str, Any], body: bytes) -> None:
        number, embeddings = head["id"], bool(head["embeddings"])
        pixels = np.frombuffer(body, np.uint8).reshape(head["shape"])

        def finish(found: BatchResult) -> None:
            if found.error is not None or found.logits is None:
                return self._fail(number, found.error or RuntimeError("no logits"))
            tables = [found.logits, found.embeddings] if embeddings and found.embeddings is not None else [found.logits]
            content = b"".join(np.ascontiguousarray(table, np.float32).tobytes() for table in tables)
            return self._answer(
                number, {"shapes": [list(table.shape) for table in tables], "batch": found.batch}, content
            )

        self.batches.put(BatchRequest(pixels, finish, embeddings, self._wanted(number)))

    def _canary(self, head: dict[str, Any], body: bytes) -> None:
        """A picture through the decoder and golden pixels through the model: {} where both are as they should be, else `failed`."""
        number, pixels = head["id"], self.model.golden_pixels()

        def finish(found: BatchResult) -> None:
            reason = (
                str(found.error) if found.error is not None or found.logits is None else self.model.wrong(found.logits)
            )
            self._answer(number, {"failed": reason} if reason else {})

        def decode() -> None:
            try:
                self.predictor.preprocess.read(
                    _png(pixels[0]), self.predictor.limits
                )  # without a budget, which large pictures may hold
                self.batches.put(BatchRequest(pixels, finish), "urgent")
            except Exception as error:
                self._fail(number, error)

        threading.Thread(target=decode, daemon=True).start()  # not behind pictures that wait to be decoded

    def _explain(self, head: dict[str, Any], body: bytes) -> None:
        self._explainer.submit(self._explain_one, head, body)

    def _explain_one(self, head: dict[str, Any], body: bytes) -> None:
        from image_classifier.inference.occlusion import occlusion_map

        number = head["id"]
        try:
            size = read_size(body, self.predictor.limits)
            found = occlusion_map(
                self._read(body), head.get("class"), self.predictor, self._soon, lambda: number in self._gone
            )
            grid = found.over(self.predictor.preprocess, size)
            self._answer(
                number,
                {"class": found.label, "shape": list(grid.shape)},
                np.ascontiguousarray(grid, np.float32).tobytes(),
            )
        except UnreadableImage as error:
            self._answer(number, {"unreadable": error.reason})
        except Exception as error:
            self._fail(number, error)

    def _soon(self, pixels: np.ndarray) -> np.ndarray:
        """Logits [N, C] of pixels uint8 [N, 3, S, S], computed while no picture waits."""
        done, outcomes = threading.Event(), []

        def finish(found: BatchResult) -> None:
            outcomes.append(found)
            done.set()

        self.batches.put(BatchRequest(pixels, finish), "idle")
        done.wait()
        if outcomes[0].error is not None or outcomes[0].logits is None:
            raise outcomes[0].error or RuntimeError("no logits")
        return np.asarray(outcomes[0].logits)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def main(descriptor: int) -> None:
    """Serve the other end of a socket until it is closed; its first message is the order."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the server decides when the last answer is out
        signal.signal(ignored, signal.SIG_IGN)
    sys.stderr = errors = AsyncStream(2)  # which nobody may be reading
    code = 0
    try:
        _answer(descriptor, errors)
    except Exception:
        traceback.print_exc()
        code = 1
    errors.end()
    os._exit(code)  # threads may still be decoding, for nobody


def _answer(descriptor: int, errors: AsyncStream) -> None:
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rb") as stream:
        lock = threading.Lock()

        def send(message: bytes) -> None:
            with lock:
                try:
                    connection.sendall(message)
                except OSError:
                    os._exit(0)  # nobody is there to hear it

        first = framing.read(stream)
        if first is None:
            return
        order = ModelSpec.from_dict(first[0])
        try:
            model = LoadedModel.loaded(order)
            process = Worker(model, order, send, errors)
        except ClassifierError as error:
            send(framing.encode({"refused": [error.fact, error.hint]}))
            return
        send(framing.encode({"ready": model.facts()}))
        while message := framing.read(stream):
            process.take(*message)


if __name__ == "__main__":
    main(int(sys.argv[1]))
