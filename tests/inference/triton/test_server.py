"""The verb `triton` with stand-ins for tritonserver and docker: it waits for a right answer, says what failed, and
stops what it started.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from image_classifier.bundle import BundleInfo, seal
from image_classifier.errors import ConfigError
from image_classifier.inference.evaluate import TestSettings
from image_classifier.inference.infer import InferSettings
from image_classifier.inference.triton.server import ServerSettings
from image_classifier.inference.verify import VerifySettings
from tests.conftest import PROGRAM, ROOT, Answer, Command


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with golden answers and a model repository, of which only the names matter here; the current folder is
    above it.
    """
    monkeypatch.chdir(tmp_path)
    folder, rng = tmp_path / "models" / "small", np.random.default_rng(0)
    repository = folder / "triton" / "small"
    repository.mkdir(parents=True)
    (repository / "config.pbtxt").write_text('name: "small"\n')
    (folder / "triton" / "docker-compose.yml").write_text("services: {}\n")
    pixels = rng.integers(0, 256, (3, 3, 4, 4), dtype=np.uint8)
    golden = {"logits": rng.normal(size=(3, 2)).astype("f4"), "embeddings": rng.normal(size=(3, 5)).astype("f4")}
    np.savez(folder / "golden.npz", pixels=pixels, **golden)
    exports = {"triton": {"files": ["triton/docker-compose.yml", "triton/small/config.pbtxt"], "tolerance": 1e-4}}
    seal(folder, BundleInfo("small", ("a", "b"), {"size": 4}, {}, {}, {}, exports=exports))
    return folder


def ports() -> list[str]:
    sockets = [socket.socket() for _ in range(3)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    found = [str(item.getsockname()[1]) for item in sockets]
    for item in sockets:
        item.close()
    return [
        word for key, port in zip(("http", "grpc", "metrics"), found, strict=True) for word in (f"--{key}_port", port)
    ]


def program(path: Path, mode: str, golden: Path) -> str:
    """A `tritonserver` that behaves as `mode` says."""
    path.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.inference.triton.v2_server {mode} {golden} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


Start = Callable[..., Answer]


@pytest.fixture
def start(bundle: Path, tmp_path: Path, command: Command) -> Start:
    def run(mode: str, *more: str) -> Answer:
        return command(
            "triton",
            "start",
            "small",
            "--tritonserver",
            program(tmp_path / "tritonserver", mode, bundle / "golden.npz"),
            *ports(),
            *more,
        )

    return run


def state(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "runs/triton/small/server.json").read_text()))


def runs(pid: object) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the stand-in is started where there is /proc")
class TestProgram:
    def test_it_starts_answers_and_stops(self, start: Start, command: Command, tmp_path: Path) -> None:
        started = start("right")
        assert started.code == 0, started.err
        known = state(tmp_path)
        assert f"small at {known['url']}" in started.out and "golden image answered correctly" in started.out
        assert runs(known["pid"])
        again = start("right")
        assert again.code == 2 and "already runs at" in again.err and again.err.count("\n") == 1
        checked = command("verify", "small", "--backend", "triton", "--url", known["url"])
        assert "triton    100% of 3 golden images" in checked.out, checked.err
        stopped = command("triton", "stop", "small")
        assert (stopped.code, stopped.out) == (0, f"triton    stopped: {known['url']}\n")
        assert not runs(known["pid"])
        twice = command("triton", "stop", "small")
        assert twice.code == 2 and "no server of 'small' was started here" in twice.err

    @pytest.mark.parametrize("mode", ["wrong", "zeros"])
    def test_readiness_that_lies_is_found_out(self, start: Start, tmp_path: Path, mode: str) -> None:
        done = start(mode)
        assert (
            done.code == 2
            and "its answer for a golden image differs from the bundle" in done.err
            and done.err.count("\n") == 1
        )
        assert not (tmp_path / "runs/triton/small/server.json").exists()

    def test_a_server_that_ends_says_why(self, start: Start, tmp_path: Path) -> None:
        done = start("dies")
        assert (
            done.code == 2
            and "the server ended before it was ready: E1122" in done.err
            and "the model cannot be loaded" in done.err
        )
        assert not (tmp_path / "runs/triton/small/server.json").exists()

    @pytest.mark.slow
    def test_one_that_is_never_ready_is_stopped(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        pids: list[int] = []
        spawn = os.posix_spawn
        monkeypatch.setattr(os, "posix_spawn", lambda *line, **more: pids.append(spawn(*line, **more)) or pids[-1])
        done = start("never", "--wait_s", "2")
        assert done.code == 2 and "was not ready within 2 s" in done.err and "server.log" in done.err
        assert len(pids) == 1 and not runs(pids[0])

    def test_stop_ends_only_what_was_started(self, start: Start, command: Command, tmp_path: Path) -> None:
        assert start("right").code == 0
        known, note = state(tmp_path), tmp_path / "runs/triton/small/server.json"
        note.write_text(json.dumps({**known, "began": "1"}))  # the id was given to another process since
        stopped = command("triton", "stop", "small")
        assert (stopped.code, stopped.out) == (0, f"triton    had already ended: {known['url']}\n")
        assert runs(known["pid"])
        note.write_text(json.dumps(known))
        assert command("triton", "stop", "small").code == 0
        assert not runs(known["pid"])

    @pytest.mark.slow
    def test_a_server_that_was_killed_can_be_started_again(
        self, start: Start, command: Command, tmp_path: Path
    ) -> None:
        assert start("right").code == 0
        os.kill(int(str(state(tmp_path)["pid"])), 9)
        time.sleep(0.2)
        assert start("right").code == 0
        assert command("triton", "stop", "small").code == 0

    def test_what_cannot_be_started(self, start: Start, bundle: Path, tmp_path: Path, command: Command) -> None:
        (tmp_path / "text").write_text("no program")
        (tmp_path / "text").chmod(0o755)
        for name, words in (("nope", "is not a program"), (str(tmp_path / "text"), "cannot be started")):
            done = command("triton", "start", "small", "--tritonserver", name, *ports())
            assert done.code == 2 and words in done.err and done.err.count("\n") == 1
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            done = start("right", "--grpc_port", str(taken.getsockname()[1]))
            assert done.code == 2 and "is already in use" in done.err and "--grpc_port" in done.err
        for strange in (bundle / "triton/other/1/model.py", bundle / "triton/linked"):
            strange.parent.mkdir(parents=True, exist_ok=True)
            strange.symlink_to(tmp_path) if strange.name == "linked" else strange.write_text("import os")
            done = start("right")
            assert done.code == 2 and f"{strange.relative_to(bundle).as_posix()!r}, which was not exported" in done.err
            strange.unlink()
        (bundle / "triton/small/config.pbtxt").write_text("changed")
        done = start("right")
        assert done.code == 2 and "config.pbtxt" in done.err and "damaged" in done.err


DOCKER = """#!/bin/sh
echo "$@ $TRITON_HTTP_PORT $TRITON_GRPC_PORT" >> {log}
case "$*" in
  "compose version") exit {version} ;;
  *" up --detach") {up} ;;
  *" down") kill $(cat {pid}) ;;
esac
"""


def docker(folder: Path, up: str = "exit 0", version: int = 0) -> Path:
    """A `docker` that writes down how it was called."""
    folder.mkdir()
    (folder / "docker").write_text(DOCKER.format(log=folder / "log", pid=folder / "pid", up=up, version=version))
    (folder / "docker").chmod(0o755)
    return folder


def test_docker_compose_is_told_where_and_ends_its_own_project(
    bundle: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ports()
    flags = f"--model-control-mode=none --http-address=127.0.0.1 --http-port={given[1]} "
    flags += f"--model-repository={bundle / 'triton'}"
    serve = program(tmp_path / "tritonserver", "right", bundle / "golden.npz")
    folder = docker(tmp_path / "bin", f"{serve} {flags} >/dev/null 2>&1 & echo $! > {tmp_path / 'bin' / 'pid'}")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    started = command("triton", "start", "small", *given)
    assert started.code == 0, started.err
    assert command("triton", "stop", "small").code == 0
    lines = (folder / "log").read_text().splitlines()
    project = f"compose --project-name triton-small --file {bundle / 'triton/docker-compose.yml'}"
    assert lines[1].split() == [*project.split(), "up", "--detach", given[1], given[3]]
    assert lines[-1].split() == [*project.split(), "down"]


@pytest.mark.parametrize(
    ("up", "version", "words"),
    [
        (
            "exit 0",
            1,
            "this machine's docker has no `compose`: install Docker with its compose plugin, or name a program",
        ),
        (
            "echo one >&2; echo 'Cannot connect to the Docker daemon' >&2; exit 1",
            0,
            "`docker compose up` failed: Cannot connect to the Docker daemon",
        ),
    ],
)
def test_docker_that_fails_is_one_line(
    bundle: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, up: str, version: int, words: str
) -> None:
    monkeypatch.setenv("PATH", f"{docker(tmp_path / 'bin', up, version)}:{os.environ['PATH']}")
    done = command("triton", "start", "small", *ports())
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1


def test_no_docker_no_repository_no_action(
    bundle: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = command("triton", "start", "small")
    assert done.code == 2 and "docker is not installed" in done.err and done.err.count("\n") == 1
    for changed, words in (
        ({"action": "begin"}, "there is no action 'begin'"),
        ({"http_port": 8001}, "invalid ports"),
        ({"wait_s": 0}, "wait_s must"),
    ):
        with pytest.raises(ConfigError, match=words):
            ServerSettings(**{"action": "start", "checkpoint_name": "small", **changed})  # type: ignore[arg-type]
    info = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**info, "exports": {}}))
    assert f"has no model repository: {PROGRAM} export small --to triton" in command("triton", "start", "small").err


@pytest.mark.parametrize("keys", [partial(InferSettings, images=["x.png"]), TestSettings, VerifySettings])
def test_an_address_and_its_backend_go_together(keys: Callable[..., object]) -> None:
    for backend, url, timeout_s, words in (
        ("triton", None, 60, "needs the server's address"),
        (None, "http://127.0.0.1:9", 60, "add --backend triton"),
        ("onnx", "http://127.0.0.1:9", 60, "add --backend triton"),
        ("triton", "http://a", 0, "server_timeout_s must be more than 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            keys(checkpoint_name="small", backend=backend, url=url, server_timeout_s=timeout_s)


def test_infer_says_what_is_wrong_with_its_server_in_one_line(bundle: Path, command: Command) -> None:
    (bundle.parents[1] / "x.png").write_bytes(b"")
    for url, words in (
        ("a:8000", "not the address of a Triton server"),
        ("http://nowhere.invalid", "cannot be used: the connection failed"),
    ):
        done = command("infer", "--checkpoint_name", "small", "--images", "x.png", "--backend", "triton", "--url", url)
        assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done.err
