"""The worker process: decodes, batches and answers what the server sends, and ends when the server is gone.

The server itself decodes nothing that a client sends. An image that crashes or hangs its decoder costs only this
process, which the server restarts.
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
from image_classifier.serving.worker.model import LoadedModel
from image_classifier.serving.worker.spec import ModelSpec

_HEARTBEAT_ID = 0  # id of messages that answer no request and only show that the process is alive
_HUNG_EXIT_CODE = 70


class PixelBudget:
    """A limit on the pixels that are decoded at the same time: large images wait for each other, to bound memory."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free = limit
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # small images must not overtake a large one for ever

    @contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Reserve this many pixels while the block runs; wait until they are free."""
        pixels = min(pixels, self._limit)
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


class Worker:
    """Answers the messages `image`, `pixels`, `explain` and `canary`, and `cancel` for one of them."""

    def __init__(self, model: LoadedModel, spec: ModelSpec, send: Callable[[bytes], None], errors: AsyncStream) -> None:
        self.model = model
        self.predictor = model.predictor
        self._send = send
        self._errors = errors
        self._score = None if self.predictor.detector is None else self.predictor.detector.scores
        runners = getattr(self.predictor.backend, "concurrent_runs", 1)
        self.batcher = DynamicBatcher(self._run_model, spec.batch, self._score, self._send_heartbeat, runners)
        self._decoders = ThreadPoolExecutor(usable_cores(), "decode")
        self._explainer = ThreadPoolExecutor(1, "decode-to-explain")
        self._budget = PixelBudget(spec.limits.max_pixels)
        self._cancelled: set[int] = set()
        self._open: set[int] = set()  # ids of requests without an answer
        self._bodies: dict[int, bytes] = {}  # images that wait to be decoded
        self._busy_since: dict[str, float] = {}  # by thread name
        self._handlers = {
            "image": self._on_image,
            "pixels": self._on_pixels,
            "canary": self._on_canary,
            "explain": self._on_explain,
        }
        threading.Thread(target=self._exit_when_hung, args=(spec.decode_s, spec.hang_s), daemon=True).start()

    def take(self, header: dict[str, Any], body: bytes) -> None:
        """Start to handle one message; its answer is sent when it is ready."""
        if "cancel" in header:
            self._cancelled |= {header["cancel"]} & self._open
            # Free the memory now: the image may have a long wait until its turn to be decoded.
            self._bodies.pop(header["cancel"], None)
            return
        self._open.add(header["id"])
        self._handlers[header["do"]](header, body)

    def _exit_when_hung(self, decode_s: float, hang_s: float) -> None:
        """End the process where a decoder or the model hangs: threads cannot be stopped, and the server restarts it."""
        while True:
            time.sleep(min(1.0, decode_s / 4, hang_s / 4))
            now = time.monotonic()
            for thread, since in list(self._busy_since.items()):
                limit_s = decode_s if thread.startswith("decode") else hang_s
                if now - since > limit_s:
                    self._errors.write(f"the thread {thread} hangs for more than {limit_s:g} s: the process ends\n")
                    self._errors.end()
                    os._exit(_HUNG_EXIT_CODE)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Let `_exit_when_hung` watch this thread while the block runs."""
        name = threading.current_thread().name
        self._busy_since[name] = time.monotonic()
        try:
            yield
        finally:
            del self._busy_since[name]

    def _answer(self, request_id: int, header: dict[str, Any], body: bytes = b"") -> None:
        """Send an answer; for a cancelled request only a heartbeat."""
        self._open.discard(request_id)
        if request_id in self._cancelled:
            self._cancelled.discard(request_id)
            self._send_heartbeat()
            return
        self._send(framing.encode({"id": request_id, **header}, body))

    def _send_heartbeat(self) -> None:
        self._send(framing.encode({"id": _HEARTBEAT_ID}))

    def _fail(self, request_id: int, error: BaseException) -> None:
        message = str(error) if isinstance(error, ClassifierError) else f"{type(error).__name__}: {error}"
        self._answer(request_id, {"failed": message})

    def _is_wanted(self, request_id: int) -> bool:
        """Check whether somebody waits for the answer; acknowledge a cancelled request."""
        if request_id not in self._cancelled:
            return True
        self._answer(request_id, {})
        return False

    def _run_model(self, pixels: np.ndarray, embeddings: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Compute logits [N, C] and, if wanted, embeddings [N, D] of pixels uint8 [N, 3, S, S]."""
        backend: Any = self.predictor.backend
        with self._watched():
            return backend.logits_and_embeddings(pixels) if embeddings else (backend.logits(pixels), None)

    def _on_image(self, header: dict[str, Any], body: bytes) -> None:
        self.batcher.expect(1)
        self._bodies[header["id"]] = body
        self._decoders.submit(self._decode, header["id"], header["name"])

    def _decode(self, request_id: int, name: str) -> None:
        """Decode one image and queue it for the model."""
        body = self._bodies.pop(request_id, b"")
        try:
            if not self._is_wanted(request_id):
                return
            pixels = self._read(body)[None]  # [1, 3, S, S]
            statistics = None if self._score is None else looks(pixels)
            self.batcher.put(
                BatchRequest(
                    pixels,
                    finish=lambda result: self._answer_image(request_id, name, result),
                    embeddings=statistics is not None,
                    wanted=lambda: self._is_wanted(request_id),
                    looks=statistics,
                )
            )
        except UnreadableImage as error:
            self._answer(request_id, {"answer": {"path": name, "error": error.reason}})
        except Exception as error:
            self._fail(request_id, error)
        finally:
            self.batcher.expect(-1)

    def _read(self, body: bytes) -> np.ndarray:
        """Return the pixels uint8 [3, S, S] of an encoded image."""
        limits = self.predictor.limits
        width, height = read_size(body, limits)
        with self._budget.reserve(width * height), self._watched():
            return np.ascontiguousarray(self.predictor.preprocess.read(body, limits).transpose(2, 0, 1))

    def _answer_image(self, request_id: int, name: str, result: BatchResult) -> None:
        try:
            (prediction,) = self.predictor.to_predictions([name], _logits_of(result), result.scores)
            if prediction.error:
                raise FloatingPointError(prediction.error)
            score = None if result.scores is None else float(result.scores[0])
            self._answer(request_id, {"answer": prediction.answer(), "ood_score": score, "batch": result.batch})
        except Exception as error:
            self._fail(request_id, error)

    def _on_pixels(self, header: dict[str, Any], body: bytes) -> None:
        """Answer pixels with logits and, if wanted, embeddings, as raw float32."""
        request_id = header["id"]
        embeddings = bool(header["embeddings"])
        pixels = np.frombuffer(body, np.uint8).reshape(header["shape"])

        def finish(result: BatchResult) -> None:
            try:
                tables = [_logits_of(result)]
            except Exception as error:
                return self._fail(request_id, error)
            if embeddings and result.embeddings is not None:
                tables.append(result.embeddings)
            content = b"".join(np.ascontiguousarray(table, np.float32).tobytes() for table in tables)
            shapes = [list(table.shape) for table in tables]
            return self._answer(request_id, {"shapes": shapes, "batch": result.batch}, content)

        self.batcher.put(BatchRequest(pixels, finish, embeddings, lambda: self._is_wanted(request_id)))

    def _on_canary(self, header: dict[str, Any], body: bytes) -> None:
        """Decode an image and run the golden pixels: the answer is {} where both are right, else it has `failed`."""
        request_id = header["id"]
        pixels = self.model.golden_pixels()

        def finish(result: BatchResult) -> None:
            try:
                reason = self.model.check_golden(_logits_of(result))
            except Exception as error:
                reason = str(error)
            self._answer(request_id, {"failed": reason} if reason else {})

        def decode() -> None:
            try:
                # Without the pixel budget, which large images may hold.
                self.predictor.preprocess.read(_png(pixels[0]), self.predictor.limits)
                self.batcher.put(BatchRequest(pixels, finish), "urgent")
            except Exception as error:
                self._fail(request_id, error)

        # A thread of its own: images that wait to be decoded must not delay the canary.
        threading.Thread(target=decode, daemon=True).start()

    def _on_explain(self, header: dict[str, Any], body: bytes) -> None:
        self._explainer.submit(self._explain, header, body)

    def _explain(self, header: dict[str, Any], body: bytes) -> None:
        """Answer with a heat map float32 over the image."""
        from image_classifier.inference.occlusion import occlusion_map

        request_id = header["id"]
        try:
            size = read_size(body, self.predictor.limits)
            heat_map = occlusion_map(
                self._read(body),
                header.get("class"),
                self.predictor,
                self._run_when_idle,
                lambda: request_id in self._cancelled,
            )
            grid = heat_map.over(self.predictor.preprocess, size)
            content = np.ascontiguousarray(grid, np.float32).tobytes()
            self._answer(request_id, {"class": heat_map.label, "shape": list(grid.shape)}, content)
        except UnreadableImage as error:
            self._answer(request_id, {"unreadable": error.reason})
        except Exception as error:
            self._fail(request_id, error)

    def _run_when_idle(self, pixels: np.ndarray) -> np.ndarray:
        """Return logits [N, C] of pixels uint8 [N, 3, S, S], computed while no other image waits."""
        done = threading.Event()
        results: list[BatchResult] = []

        def finish(result: BatchResult) -> None:
            results.append(result)
            done.set()

        self.batcher.put(BatchRequest(pixels, finish), "idle")
        done.wait()
        return np.asarray(_logits_of(results[0]))


def _logits_of(result: BatchResult) -> np.ndarray:
    """Return the logits [n, C] of a batch; raise its error where there are none."""
    if result.error is not None or result.logits is None:
        raise result.error or RuntimeError("the model returned no logits")
    return result.logits


def _png(pixels: np.ndarray) -> bytes:
    """Encode pixels uint8 [3, S, S] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def main(descriptor: int) -> None:
    """Answer the messages of a socket until it is closed; the first one is the model's spec."""
    # The server decides when the last answer is sent.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    # Nobody may be reading standard error.
    sys.stderr = errors = AsyncStream(2)
    code = 0
    try:
        _serve_socket(descriptor, errors)
    except Exception:
        traceback.print_exc()
        code = 1
    errors.end()
    # Threads may still be decoding for nobody: do not wait for them.
    os._exit(code)


def _serve_socket(descriptor: int, errors: AsyncStream) -> None:
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rb") as stream:
        lock = threading.Lock()

        def send(message: bytes) -> None:
            with lock:
                try:
                    connection.sendall(message)
                except OSError:
                    os._exit(0)  # the server is gone

        first = framing.read(stream)
        if first is None:
            return
        spec = ModelSpec.from_dict(first[0])
        try:
            model = LoadedModel.load(spec)
            worker = Worker(model, spec, send, errors)
        except ClassifierError as error:
            send(framing.encode({"refused": [error.fact, error.hint]}))
            return
        send(framing.encode({"ready": model.metadata()}))
        while message := framing.read(stream):
            worker.take(*message)


if __name__ == "__main__":
    main(int(sys.argv[1]))
