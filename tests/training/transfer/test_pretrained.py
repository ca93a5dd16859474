"""Which pretrained network can be had, with a server of this machine in place of the internet."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torchvision import models

from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.training.transfer import pretrained as tested
from image_classifier.training.transfer.pretrained import _Known, network_of_file, network_of_hub
from tests.conftest import ROOT

CONTENT = bytes(range(256)) * 1024
COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Serves CONTENT as a hub does; `cuts` says after how many bytes the next answers break off."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cuts: list[int] = []
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        rest = self.answer()
        self.wfile.write(rest[: self.server.cuts.pop(0)] if self.server.cuts else rest)

    def answer(self) -> bytes:
        self.close_connection = True
        self.server.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        if "/dropped" in self.path:
            return b""  # the connection ends without an answer
        refused = next((code for code in (401, 403, 404, 500) if f"/{code}" in self.path), 0)
        if refused:
            self.send_response(refused)
            if refused in (401, 403):
                self.send_header("X-Error-Code", "GatedRepo")
            if refused == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
            return b""
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("ETag", '"one"')
        self.send_header("X-Repo-Commit", COMMIT)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.send_header("Connection", "close")
        self.end_headers()
        return CONTENT[start:]

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(tested, "getproxies", dict)
    # All networks of torchvision take seconds to build.
    monkeypatch.setattr(models, "list_models", lambda module: ["mobilenet_v2", "resnet18", "squeezenet1_0"])


@pytest.mark.parametrize("network", ["mobilenet_v2", "resnet18"])
@pytest.mark.parametrize("file", ["{}-b0353104.pth", "weights.pth", "my best.pt", "other_v9-imagenet.pth"])
def test_the_network_of_a_file_is_found_whatever_its_name(network: str, file: str, tmp_path: Path) -> None:
    path = tmp_path / file.format(network)
    torch.save(models.get_model(network).state_dict(), path)
    found = network_of_file(str(path))
    assert found.name == network and found.overrides[:2] == ("model=torchvision", f"model.backbone.name={network}")
    assert found.origin == str(path)


def test_the_head_of_a_file_may_be_of_other_classes_and_the_names_may_have_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"state_dict": models.resnet18(num_classes=7).state_dict()}, path)
    assert network_of_file(str(path)).name == "resnet18"
    tensors = {f"module.{name}": value for name, value in models.resnet18(num_classes=7).state_dict().items()}
    torch.save(tensors, path)
    assert network_of_file(str(path)).name == "resnet18"


def test_a_file_of_no_known_network_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    tensors = models.resnet18().state_dict()
    for change in ({"layer1.0.conv1.weight": torch.zeros(1)}, {f"more.{row}": torch.zeros(1) for row in range(9)}):
        torch.save({**tensors, **change, "layer1.1.conv1.weight": torch.zeros(2), "fc.weight": torch.zeros(2)}, path)
        with pytest.raises(ConfigError, match="cannot tell which network the weights in") as caught:
            network_of_file(str(path))
        assert "\n" not in str(caught.value) and "model.backbone.name=NAME" in caught.value.hint


def from_server(hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tested, "_url", lambda one: f"{hub.url}/models/{name}")


def test_torchvisions_weights_are_fetched_into_its_cache_and_found_there(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = hashlib.sha256(CONTENT).hexdigest()[:8]
    from_server(hub, monkeypatch, f"mobilenet_v2-{digits}.pth")
    hub.cuts = [100_000]  # the first answer breaks off
    one = _Known("torchvision", "mobilenet_v2")
    assert not tested._is_cached(one)
    tested._download(one)
    assert (tmp_path / f"torch/hub/checkpoints/mobilenet_v2-{digits}.pth").read_bytes() == CONTENT
    assert hub.asked[-1].endswith("bytes=100000-") and len(hub.asked) == 2
    assert tested._is_cached(one)
    monkeypatch.setattr(tested, "_ON_CPU", (one,))
    found = network_of_hub(on_gpu=False)
    assert not isinstance(found, str) and found.origin == "in the cache of torchvision"
    assert found.overrides[-1] == "model.backbone.weights=DEFAULT" and len(hub.asked) == 2


def test_a_file_that_its_name_does_not_promise_is_removed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_server(hub, monkeypatch, "mobilenet_v2-00000000.pth")
    with pytest.raises(CheckpointError, match="mobilenet_v2 cannot be had: .* is not the file that its name promises"):
        tested._download(_Known("torchvision", "mobilenet_v2"))
    assert not list(tmp_path.rglob("mobilenet_v2*"))


def test_without_a_server_one_line_says_so_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub() as gone:
        closed = gone.url
    monkeypatch.setattr(tested, "_url", lambda one: f"{closed}/models/x-00000000.pth")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed)
    for on_gpu in (False, True):
        start = time.perf_counter()
        reason = network_of_hub(on_gpu)
        assert time.perf_counter() - start < 6
        assert isinstance(reason, str) and "\n" not in reason
        assert "cannot be had: 127.0.0.1 cannot be reached (Connection refused)" in reason


ASK = """
import sys
from image_classifier.errors import CheckpointError
from image_classifier.training.transfer.pretrained import _Known, _download, _is_cached, _ON_CPU
for name in sys.argv[1:]:
    one = _Known("timm", name)
    try:
        _download(one)
        print("found", _is_cached(one))
    except CheckpointError as error:
        print(error.fact, "|", error.hint)
"""


def test_of_hugging_face_a_file_is_cached_and_a_refusal_is_one_line(hub: Hub, tmp_path: Path) -> None:
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()} | own
    words = [sys.executable, "-c", ASK, "here.in1k", "401", "403", "404", "dropped"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found, *refused = done.stdout.splitlines()
    assert found == "found True" and len(refused) == 4
    (path,) = (tmp_path / "hf").rglob("model.safetensors")
    assert path.read_bytes() == CONTENT and "models--timm--here.in1k" in str(path)
    assert refused[3].startswith("the weights of dropped cannot be had: Server disconnected")
    for name, line in zip(("401", "403"), refused, strict=False):
        assert line == (
            f"the weights of {name} cannot be had: they are gated | accept the licence at "
            f"https://huggingface.co/timm/{name}, then run `hf auth login`"
        )
    assert refused[2].startswith("the weights of 404 cannot be had: ") and "model.weights=PATH" in refused[2]
