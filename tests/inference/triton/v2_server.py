"""A small server of the V2 protocol on loopback, which answers as it is told to: the right way, or in one of the ways
that go wrong.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

Model = Callable[[np.ndarray], dict[str, np.ndarray]]


def brightness(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Logits float32 [N, 2] and embedding float32 [N, 3], which differ for every image."""
    mean = pixels.mean(axis=(2, 3), dtype=np.float64)
    return {
        "logits": np.stack([-mean.sum(1), mean[:, 0]], axis=1).astype(np.float32),
        "embedding": mean.astype(np.float32),
    }


class V2Server(ThreadingHTTPServer):
    """`faults` are taken one a request for inference; each is a function of the handler, or None for a right answer."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model: Model = brightness, name: str = "m", most: int = 4, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.name, self.most = model, name, most
        self.faults: list[Callable[[Handler], None] | None] = []
        self.batches: list[int] = []
        self.is_ready = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(
        self, request: Any, client_address: Any
    ) -> None:  # a client that hangs up is what some tests are about
        pass


class Handler(BaseHTTPRequestHandler):
    server: V2Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        known = f"/v2/models/{self.server.name}"
        if self.path in ("/v2/health/ready", f"{known}/ready"):
            self.answer(200 if self.server.is_ready else 400)
        elif self.path == f"{known}/config":
            self.answer(200, {"name": self.server.name, "max_batch_size": self.server.most})
        else:
            self.answer(404, {"error": f"Request for unknown model: '{self.path.split('/')[3]}' is not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault:
            fault(self)
            return
        start = int(self.headers["Inference-Header-Content-Length"])
        asked = json.loads(body[:start])
        (pixels,) = asked["inputs"]
        if len(pixels["shape"]) != 4 or pixels["shape"][0] > self.server.most or pixels["shape"][1] != 3:
            self.answer(400, {"error": f"unexpected shape for input 'pixels', got {pixels['shape']}"})
            return
        found = self.server.model(np.frombuffer(body[start:], np.uint8).reshape(pixels["shape"]))
        self.server.batches.append(pixels["shape"][0])
        self.tensors({item["name"]: found[item["name"]] for item in asked["outputs"]})

    def tensors(self, found: dict[str, np.ndarray], **changed: Any) -> None:
        """Answer with tensors; `changed` lies about them."""
        rows = [
            {
                "name": name,
                "datatype": "FP32",
                "shape": list(value.shape),
                "parameters": {"binary_data_size": value.nbytes},
                **changed,
            }
            for name, value in found.items()
        ]
        words = json.dumps({"model_name": self.server.name, "outputs": rows}).encode()
        self.answer(
            200,
            words + b"".join(value.tobytes() for value in found.values()),
            {"Inference-Header-Content-Length": str(len(words))},
        )

    def answer(self, status: int, content: object = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(server: V2Server) -> Iterator[V2Server]:
    """The server while the block runs."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main(line: list[str]) -> None:
    """Play `tritonserver` in a process of its own: MODE (right, wrong, zeros, dies, never) and golden.npz first, then
    the real program's flags.
    """
    mode, golden = line[0], np.load(line[1])
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in line[2:])
    assert flags["model-control-mode"] == "none" and flags["http-address"] == "127.0.0.1", flags
    (name,) = (path.name for path in Path(flags["model-repository"]).iterdir() if path.is_dir())
    if mode == "dies":
        print(
            "I1122 tritonserver.cc:1 a banner\nE1122 model_repository_manager.cc:1 the model cannot be "
            "loaded\nI1122 bye",
            flush=True,
        )
        raise SystemExit(1)
    known = {row.tobytes(): number for number, row in enumerate(golden["pixels"])}
    sign = {"wrong": -1, "zeros": 0}.get(mode, 1)

    def answers(pixels: np.ndarray) -> dict[str, np.ndarray]:
        rows = [known[row.tobytes()] for row in pixels]
        return {"logits": sign * golden["logits"][rows], "embedding": golden["embeddings"][rows]}

    server = V2Server(answers, name, 64, int(flags["http-port"]))
    server.is_ready = False
    with serving(server):
        time.sleep(0.2)
        server.is_ready = mode != "never"
        threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
