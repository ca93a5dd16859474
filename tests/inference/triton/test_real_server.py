"""A real Triton server on loopback serves what `export --to triton` wrote: the same answers, and the ways it
refuses.
"""

from __future__ import annotations

import csv
import http.client
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from image_classifier.bundle import read_bundle
from image_classifier.errors import ServerError
from image_classifier.inference.golden import Golden
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.inference.triton import client
from image_classifier.inference.triton.client import TritonBackend
from tests.conftest import ROOT, Answer, Command, run_command
from tests.inference.triton.real_server import environment, real_program
from tests.inference.triton.test_server import ports

pytestmark = pytest.mark.triton
PYTHON = [sys.executable, str(ROOT / "commands.py")]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_program(tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def exported(program: Path, trained: Path) -> Path:
    """The folder in which `digits` was trained and exported, with batches of at most 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        line = [
            "export",
            "digits",
            "--to",
            "triton",
            "--triton.max_batch_size",
            "16",
            "--triton.preferred_batch_sizes",
            "[8,16]",
            "--images",
            "40",
        ]
        subprocess.run([*PYTHON, *line], check=True, capture_output=True, text=True)
    return trained


class Running:
    """A server that `triton start` started."""

    def __init__(self, folder: Path, runs: Path, given: list[str]) -> None:
        self.bundle = read_bundle(folder / "models/digits")
        self.urls = [f"http://127.0.0.1:{given[1]}", f"grpc://127.0.0.1:{given[3]}"]
        self.pid = int(json.loads((runs / "triton/digits/server.json").read_text())["pid"])

    def stubs(self) -> list[int]:
        """The processes of the server's Python backend."""
        children = Path(f"/proc/{self.pid}/task").glob("*/children")
        return [int(pid) for file in children for pid in file.read_text().split()]


@contextmanager
def started(folder: Path, program: Path, runs: Path) -> Iterator[Running]:
    given = ports()
    done = subprocess.run(
        [*PYTHON, "triton", "start", "digits", "--tritonserver", str(program), "--runs_dir", str(runs), *given],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "golden image answered correctly" in done.stdout
    try:
        yield Running(folder, runs, given)
    finally:
        ended = subprocess.run(
            [*PYTHON, "triton", "stop", "digits", "--runs_dir", str(runs)], cwd=folder, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def server(exported: Path, program: Path) -> Iterator[Running]:
    with started(exported, program, exported / "runs") as running:
        yield running


SCHEMES = pytest.mark.parametrize("scheme", [0, 1], ids=["http", "grpc"])


@SCHEMES
def test_golden_images_get_the_same_answers(server: Running, scheme: int) -> None:
    backend, golden = TritonBackend.of(server.bundle, server.urls[scheme]), Golden.of(server.bundle)
    logits, embeddings = backend.logits_and_embeddings(golden.pixels)
    np.testing.assert_allclose(logits, golden.logits, atol=1e-5)
    np.testing.assert_allclose(embeddings, golden.embeddings, atol=1e-5)
    assert backend.channel.ready("digits", 5) and not backend.channel.ready("nothing", 5)


@SCHEMES
def test_batches_over_the_servers_limit_are_split(server: Running, scheme: int) -> None:
    backend, golden = TritonBackend.of(server.bundle, server.urls[scheme]), Golden.of(server.bundle)
    pixels = np.random.default_rng(0).integers(0, 256, (101, *golden.pixels.shape[1:]), dtype=np.uint8)
    assert backend.max_batch_size == 16
    np.testing.assert_array_equal(backend.logits(pixels), whole(server, pixels))
    backend.max_batch_size = 17
    with pytest.raises(ServerError, match="batch-size must be <= 16"):
        backend.logits(pixels)


def whole(server: Running, pixels: np.ndarray) -> np.ndarray:
    """The answers of ONNX Runtime in this process, in the batches that the server is given."""
    onnx = OnnxBackend(server.bundle.path("model.onnx"))
    return np.concatenate([onnx.logits(pixels[start : start + 16]) for start in range(0, len(pixels), 16)])


def answers(folder: Path, command: Command, *more: str) -> Answer:
    return command(
        "infer",
        "--checkpoint_name",
        "digits",
        "--images",
        str(folder / "data/digits/test"),
        "--format",
        "csv",
        "--top_k",
        "10",
        *more,
    )


def test_a_real_folder_gets_the_same_answers(
    server: Running, exported: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(exported)
    expected = list(csv.DictReader(io.StringIO(answers(exported, command).out)))
    assert len(expected) > 100
    for url in server.urls:
        done = answers(exported, command, "--backend", "triton", "--url", url)
        assert done.code == 0, done.err
        found = list(csv.DictReader(io.StringIO(done.out)))
        for row, other in zip(expected, found, strict=True):
            assert [row[key] for key in ("path", "predicted_class", "decision", "prediction_set")] == [
                other[key] for key in ("path", "predicted_class", "decision", "prediction_set")
            ]
            probabilities, others = json.loads(row["all_predictions"]), json.loads(other["all_predictions"])
            assert all(abs(probabilities[label] - others[label]) < 1e-5 for label in probabilities)
    for line in (("verify", "digits"), ("test", "--checkpoint_name", "digits")):
        done = command(*line, "--backend", "triton", "--url", server.urls[0])
        assert done.code == 0, done.err
    assert (
        "triton    100% of 8 golden images"
        in command("verify", "digits", "--backend", "triton", "--url", server.urls[1]).out
    )


@SCHEMES
def test_what_the_server_refuses_is_one_clear_error(server: Running, scheme: int) -> None:
    with pytest.raises(ServerError, match=r"unknown model: 'nothing'.*triton start NAME"):
        TritonBackend(server.urls[scheme], "nothing", 10)
    backend, golden = TritonBackend.of(server.bundle, server.urls[scheme]), Golden.of(server.bundle)
    for pixels in (golden.pixels[:, :, :4], golden.pixels[:, :1]):
        with pytest.raises(ServerError, match="unexpected shape for input 'pixels'"):
            backend.logits(pixels)
    with pytest.raises(ServerError, match=r"instead of \[8, 11\]"):
        TritonBackend(server.urls[scheme], "digits", 11).logits(golden.pixels)


def test_broken_json_and_wrong_types_are_answered_with_an_error_and_harm_nothing(server: Running) -> None:
    host, port = server.urls[0].removeprefix("http://").split(":")
    for body in (
        b"{",
        b"[]",
        b'{"inputs": 1}',
        json.dumps({"inputs": [{"name": "pixels", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}).encode(),
    ):
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("POST", "/v2/models/digits/infer", body, {"Connection": "close"})
        assert connection.getresponse().status >= 400
        connection.close()
    TritonBackend.of(server.bundle, server.urls[0])


def test_the_servers_own_client_gets_the_same_and_the_labels(server: Running, tmp_path: Path) -> None:
    script = """
import sys, numpy, tritonclient.http as http
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
pixels = numpy.load(sys.argv[1])["pixels"][:2]
client = http.InferenceServerClient(sys.argv[2].removeprefix("http://"))
given = http.InferInput("pixels", pixels.shape, "UINT8")
given.set_data_from_numpy(pixels)
print(client.infer("digits", [given], outputs=[http.InferRequestedOutput("logits")]).as_numpy("logits").tolist())
output = http.InferRequestedOutput("logits", class_count=1)
answer = client.infer("digits", [given], outputs=[output]).as_numpy("logits")[0][0]
print(answer.decode().split(":")[-1])
client.close()
config = text_format.Parse(open(sys.argv[3]).read(), model_config_pb2.ModelConfig())
print(config.max_batch_size, config.backend, [list(item.dims) for item in config.input])
"""
    config = server.bundle.path("triton/digits/config.pbtxt")
    line = [environment() / "bin/python", "-c", script, server.bundle.path("golden.npz"), server.urls[0], config]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits, label, facts = done.stdout.splitlines()
    golden = Golden.of(server.bundle)
    np.testing.assert_allclose(json.loads(logits), golden.logits[:2], atol=1e-5)
    assert label == server.bundle.info.classes[int(golden.logits[0].argmax())]
    assert facts == f"16 onnxruntime [{list(golden.pixels.shape[1:])}]"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)


@SCHEMES
def test_a_server_that_is_killed_midway_is_one_clear_error(
    exported: Path, program: Path, tmp_path: Path, scheme: int, quick: None
) -> None:
    with started(exported, program, tmp_path) as running:
        backend, golden = TritonBackend.of(running.bundle, running.urls[scheme]), Golden.of(running.bundle)
        backend.logits(golden.pixels)
        os.kill(running.pid, signal.SIGKILL)
        with pytest.raises(ServerError, match="6 times: is it running there"):
            backend.logits(golden.pixels)


def test_a_killed_server_leaves_no_half_table(
    exported: Path,
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    quick: None,
) -> None:
    monkeypatch.chdir(exported)
    with started(exported, program, tmp_path) as running:
        asked = TritonBackend.logits_and_embeddings
        calls: list[int] = []

        def killing(self: TritonBackend, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            calls.append(len(pixels))
            if len(calls) == 2:
                os.kill(running.pid, signal.SIGKILL)
            return asked(self, pixels)

        monkeypatch.setattr(TritonBackend, "logits_and_embeddings", killing)
        line = (
            "infer",
            "--checkpoint_name",
            "digits",
            "--images",
            "data/digits/test",
            "--output",
            str(tmp_path / "out.csv"),
            "--format",
            "csv",
        )
        done = run_command(monkeypatch, capfd, (*line, "--backend", "triton", "--url", running.urls[0]))
    assert done.code == 2 and "cannot be used: the connection failed" in done.err and done.err.count("\n") == 1
    assert len(calls) == 2 and not (tmp_path / "out.csv").exists()


def test_readiness_that_lies_is_found_out(exported: Path, program: Path, tmp_path: Path) -> None:
    with started(exported, program, tmp_path) as running:
        (stub,) = running.stubs()
        os.kill(stub, signal.SIGKILL)
        time.sleep(0.5)
        for url in running.urls:
            with pytest.raises(ServerError, match="cannot be used: .*(not healthy|HTTP 500|gRPC INTERNAL)"):
                TritonBackend.of(running.bundle, url)


@contextmanager
def slow_server(exported: Path, program: Path, folder: Path, delay_ms: int) -> Iterator[list[str]]:
    """The repository with a queue of one and a model that takes its time; its addresses."""
    shutil.copytree(exported / "models/digits/triton", folder / "triton")
    config = folder / "triton/digits/config.pbtxt"
    slow = f'parameters {{ key: "delay_ms" value {{ string_value: "{delay_ms}" }} }}\n'
    text = (
        config.read_text()
        .replace("max_queue_size: 256", "max_queue_size: 1")
        .replace("preferred_batch_size: [8, 16]", "preferred_batch_size: [1]")
    )
    config.write_text(text.replace("max_batch_size: 16", "max_batch_size: 1") + slow)
    given = ports()
    flags = [
        f"--{name}-{key}={value}"
        for name, port in zip(("http", "grpc", "metrics"), given[1::2], strict=True)
        for key, value in (("address", "127.0.0.1"), ("port", port))
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, f"--model-repository={folder / 'triton'}", *flags, "--exit-timeout-secs=2"],
            stdout=log,
            stderr=log,
        )
    try:
        urls = [f"http://127.0.0.1:{given[1]}", f"grpc://127.0.0.1:{given[3]}"]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if client.channel_of(client.Address.of(urls[0])).ready("digits", 5):
                    break
            except client.Refused:
                time.sleep(0.1)
        yield urls
    finally:
        process.terminate()
        process.wait(30)


@SCHEMES
def test_a_full_queue_and_an_answer_that_takes_too_long(
    exported: Path, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: int
) -> None:
    pixels = Golden.of(read_bundle(exported / "models/digits")).pixels[:1]
    outcomes: list[object] = []

    def ask(backend: TritonBackend) -> None:
        try:
            outcomes.append(backend.logits(pixels).shape)
        except ServerError as error:
            outcomes.append(str(error))

    def at_once(count: int) -> None:
        outcomes.clear()
        threads = [
            threading.Thread(target=ask, args=(TritonBackend(urls[scheme], "digits", 10),)) for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with slow_server(exported, program, tmp_path, 300) as urls:
        monkeypatch.setattr(client, "RETRIES", 0)
        at_once(12)
        refused = [outcome for outcome in outcomes if isinstance(outcome, str)]
        assert refused and all(
            "xceeds maximum queue size" in text and "triton.max_queue_size" in text for text in refused
        ), outcomes
        assert len(refused) < 12
        monkeypatch.setattr(client, "RETRIES", 5)
        at_once(6)
        assert outcomes == [(1, 10)] * 6
        with pytest.raises(ServerError, match=r"no answer within 0\.1 s"):
            TritonBackend(urls[scheme], "digits", 10, timeout_s=0.1).logits(pixels)
