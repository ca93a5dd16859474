"""A server that answers as `serve` does, without a model: what an image's name says is what it is taken for."""

from __future__ import annotations

import json
import mimetypes
import threading
import time
import zlib
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import image_classifier
from image_classifier.images import FORMATS

PAGE = Path(image_classifier.__file__).parent / "serving/page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; manifest-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self)",
    "Cross-Origin-Opener-Policy": "same-origin",
}
HOSTILE = "<img src=x onerror=alert(1)>"
# Some must be taken neither for markup, nor for a formula, nor for a place in a list.
CLASSES = ("daisy", "dandelion", "roses", "sunflowers", "tulips", HOSTILE, "=1+1", "7")


@dataclass
class Stub:
    """What the server does and has been asked; a test changes it while the server runs."""

    key: str | None = None
    urls: bool = False
    names: tuple[str, ...] = ("flowers",)
    refusals: list[tuple[int, str, str]] = field(
        default_factory=list
    )  # status, code, Retry-After: of the next requests to /predict
    delay_s: float = 0.0
    max_bytes: int = 2**20
    max_pixels: int = 50_000_000
    formats: tuple[str, ...] = tuple(FORMATS)
    asked: list[dict[str, Any]] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)  # of files, by their names
    together: int = 0
    most_together: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def model(self, name: str) -> dict[str, Any]:
        return {
            "name": name or self.names[0],
            "version": "3fa9c1d2",
            "backend": "onnxruntime",
            "classes": list(CLASSES),
            "image_size": 160,
            "temperature": 1.1,
            "decision": {"threshold": 0.62, "ood_limit": 3.1, "set_level": 0.05, "note": ""},
            "metrics": {"test": {"accuracy": 0.9714}, "val": {"accuracy": 0.96}},
            "intervals": {"test": {"accuracy": [0.951, 0.983]}},
            "provenance": {"created": "2026-11-22T03:22:47+00:00"},
            "limits": {
                "max_bytes": self.max_bytes,
                "max_pixels": self.max_pixels,
                "max_images": 64,
                "formats": list(self.formats),
            },
            "explain": True,
            "urls": self.urls,
        }


def prediction(name: str, content: bytes) -> dict[str, Any]:
    """By its name: bad and unsure ones, and those named after a class."""
    if "bad" in name:
        return {"path": name, "error": "cannot identify image file: it is cut off after 12 bytes"}
    unsure = "unsure" in name
    best = next((place for place, each in enumerate(CLASSES) if each in name), zlib.crc32(content) % 5)
    weights = [1 + zlib.crc32(content + bytes([place])) % 8 for place in range(len(CLASSES))]
    weights[best] = 20 if unsure else 900
    shares = sorted(
        ((each, weight / sum(weights)) for each, weight in zip(CLASSES, weights, strict=True)),
        key=lambda share: -share[1],
    )
    label, confidence = shares[0]
    answer = {
        "path": name,
        "predicted_class": label,
        "confidence": confidence,
        "all_predictions": dict(shares),
        "decision": "label",
        "reason": "",
    }
    if unsure:
        reason = f"not sure enough: confidence {confidence:.3f}, the limit is 0.620"
        return {**answer, "decision": "abstain", "reason": reason, "prediction_set": [each for each, _ in shares[:2]]}
    return {**answer, "prediction_set": [label]}


def heat() -> list[list[float | None]]:
    """A warm place right of the middle, and a first and last column that the model does not see."""

    def value(row: int, column: int) -> float | None:
        return None if column in (0, 19) else max(0.0, 1 - (((row - 6) / 6) ** 2 + ((column - 12) / 6) ** 2))

    return [[value(row, column) for column in range(20)] for row in range(16)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        stub: Stub = self.server.stub
        if url.path == "/" or url.path.startswith("/page/"):
            file = PAGE / (url.path.removeprefix("/page/") if url.path != "/" else "index.html")
            if file.is_file():
                self.send(200, file.read_bytes(), mimetypes.guess_type(file.name)[0] or "")
            else:
                self.refuse(404, "not_found")
        elif not self.allowed(stub):
            pass
        elif url.path == "/models":
            models = [
                {"name": name, "version": "3fa9c1d2", "ready": True, "default": place == 0}
                for place, name in enumerate(stub.names)
            ]
            self.json(200, {"models": models})
        elif url.path == "/model":
            self.json(200, stub.model(parse_qs(url.query).get("model", [""])[0]))
        else:
            self.refuse(404, "not_found")

    def do_POST(self) -> None:
        stub: Stub = self.server.stub
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.allowed(stub):
            return
        with stub.lock:
            refusal = stub.refusals.pop(0) if stub.refusals else None
            stub.together += 1
            stub.most_together = max(stub.most_together, stub.together)
        time.sleep(stub.delay_s)
        with stub.lock:
            stub.together -= 1
        if refusal:
            self.refuse(refusal[0], refusal[1], {"Retry-After": refusal[2]})
        else:
            self.answer(stub, urlsplit(self.path), self.parts(body))

    def answer(self, stub: Stub, url: Any, parts: list[tuple[str, bytes]]) -> None:
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        stub.asked.append({"path": url.path, **query, "names": [name for name, _ in parts]})
        stub.contents |= dict(parts)
        common = {"model": query.get("model", stub.names[0]), "model_version": "3fa9c1d2", "request_id": "0"}
        if url.path == "/explain":
            self.json(200, {**common, "path": parts[0][0], "class": query["class"], "heat": heat()})
            return
        predictions = [prediction(name, content) for name, content in parts]
        self.json(422 if all("error" in each for each in predictions) else 200, {**common, "predictions": predictions})

    def parts(self, body: bytes) -> list[tuple[str, bytes]]:
        kind = self.headers["Content-Type"]
        if kind == "application/json":
            return [(image["url"], image["url"].encode()) for image in json.loads(body)["images"]]
        form = message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
        parts: list[Any] = form.get_payload()  # type: ignore[assignment]
        assert all(part.get_param("name", header="content-disposition") == "images" for part in parts)
        return [(str(part.get_filename()), part.get_payload(decode=True)) for part in parts]

    def allowed(self, stub: Stub) -> bool:
        if stub.key in (None, self.headers["X-API-Key"]):
            return True
        self.refuse(401, "unauthorized")
        return False

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.json(status, {"error": {"code": code, "message": f"the stub says {code}"}, "request_id": "0"}, headers)

    def json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(content).encode(), "application/json", headers)

    def send(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            **HEADERS,
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class StubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        self.stub = Stub()
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"
