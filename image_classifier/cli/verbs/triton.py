"""The verb `triton`: start a server over a bundle's model repository, wait until it really answers, and stop it again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from image_classifier.atomic_io import file_lock, write_text
from image_classifier.bundle import INFO_NAME, Bundle, read_bundle
from image_classifier.cli import hydra_app
from image_classifier.errors import CheckpointError, ConfigError, ServerError, StorageError
from image_classifier.inference.load import pulled_checkpoint
from image_classifier.inference.triton.client import TritonBackend, channel_of, model_name
from image_classifier.inference.triton.flags import FLAGS
from image_classifier.inference.triton.protocol import Address, Refused
from image_classifier.program import program

_STATE, _LOG, _POLL_S = "server.json", "server.log", 0.2


@dataclass(frozen=True)
class ServerSettings:
    """The keys of conf/triton.yaml."""

    action: str
    checkpoint_name: str
    tritonserver: str | None = None
    arguments: list[str] = field(default_factory=list)
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    wait_s: float = 180.0
    models_dir: str = "models"
    runs_dir: str = "runs"
    dvc: bool | None = None
    trusted_packages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ConfigError(f"{self.action!r} is no action", f"write triton {' or triton '.join(ACTIONS)}")
        ports = (self.http_port, self.grpc_port, self.metrics_port)
        if len(set(ports)) < 3 or not all(0 < port < 65536 for port in ports):
            raise ConfigError(
                f"{', '.join(map(str, ports))} are not three ports", "use three different ones from 1 to 65535"
            )
        if self.wait_s <= 0:
            raise ConfigError("wait_s must be more than 0")

    @property
    def url(self) -> str:
        """Where the server will answer over HTTP."""
        return f"http://127.0.0.1:{self.http_port}"


@dataclass(frozen=True)
class Server:
    """What was started: a process of this machine (its id and when it began, as ids are given anew), or a project of `docker compose`."""

    url: str
    pid: int | None = None
    began: str | None = None
    project: str | None = None
    compose: str | None = None

    def alive(self) -> bool:
        """Whether it still runs; of a container that is Docker's to know."""
        return self.pid is None or (self.began is not None and _began(self.pid) == self.began)

    def stop(self, patience_s: float = 30.0) -> None:
        """End what was started and nothing else; ServerError where Docker refuses."""
        if self.pid is None:
            _compose(str(self.project), Path(str(self.compose)), "down")
            return
        deadline = time.monotonic() + patience_s
        with suppress(ProcessLookupError):  # it ended by itself in between
            if self.alive():
                os.kill(self.pid, signal.SIGTERM)
            while self.alive() and time.monotonic() < deadline:
                time.sleep(_POLL_S / 4)
            if self.alive():
                os.killpg(self.pid, signal.SIGKILL)  # it leads the group that `start` made for it


def triton(config: Any) -> None:
    """Start or stop.

    Raises:
        ConfigError: There is nothing to start it with, or it runs already.
        ServerError: It ended, did not get ready in time, or answers otherwise than the bundle; then it is stopped again.
    """
    asked = hydra_app.typed(ServerSettings, config, "")
    ACTIONS[asked.action](
        asked, Path(asked.runs_dir) / "triton" / Path(asked.checkpoint_name).expanduser().absolute().name
    )


def _start(asked: ServerSettings, folder: Path) -> None:
    path = pulled_checkpoint(asked.checkpoint_name, Path(asked.models_dir), asked.dvc)
    if not (path / INFO_NAME).is_file():
        raise CheckpointError(f"{str(path)!r} is not a bundle", "only a bundle holds a model repository")
    bundle = read_bundle(path)
    files = bundle.info.exports.get("triton", {}).get("files", [])
    if not files:
        raise CheckpointError(
            f"the bundle {path.name!r} holds no model repository", f"{program()} export {path.name} --to triton"
        )
    bundle.verify(files)
    bundle.refuse_unlisted("triton")
    try:
        with file_lock(folder / "lock", wait=False):
            _start_one(asked, path, bundle, folder)
    except BlockingIOError as error:
        raise ConfigError(f"another command is starting a server of {path.name!r}", "wait for it") from error


def _start_one(asked: ServerSettings, path: Path, bundle: Bundle, folder: Path) -> None:
    server = _read(folder)
    if server and server.alive():
        raise ConfigError(
            f"the server of {path.name!r} was started at {server.url}", f"{program()} triton stop {path.name}"
        )
    _refuse_used(asked)
    start = time.monotonic()
    server = _launched(asked, bundle, folder)
    try:
        write_text(folder / _STATE, json.dumps(asdict(server)) + "\n")
        _wait(asked, bundle, server, folder)
    except BaseException:
        server.stop()
        (folder / _STATE).unlink(missing_ok=True)
        raise
    took = f"a golden image answered right after {time.monotonic() - start:.1f} s"
    print(f"triton    {model_name(bundle.info)} at {server.url} and grpc://127.0.0.1:{asked.grpc_port}, {took}")
    where = "" if asked.runs_dir == ServerSettings.runs_dir else f" --runs_dir {asked.runs_dir}"
    print(f"stop it   {program()} triton stop {asked.checkpoint_name}{where}")


def _stop(asked: ServerSettings, folder: Path) -> None:
    server = _read(folder)
    if server is None:
        raise ConfigError(
            f"no server of {folder.name!r} was started here",
            f"{str(folder / _STATE)!r} would say so: use the same runs_dir",
        )
    was = server.alive()
    server.stop()
    (folder / _STATE).unlink()
    print(f"triton    {'stopped' if was else 'had already ended'}: {server.url}")


ACTIONS = {"start": _start, "stop": _stop}


def _refuse_used(asked: ServerSettings) -> None:
    """ConfigError where something listens on a port: it would answer in the place of the server that is to start."""
    for key in ("http_port", "grpc_port", "metrics_port"):
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", getattr(asked, key))) == 0:
                raise ConfigError(
                    f"something listens on port {getattr(asked, key)}", f"end it, or choose another: --{key} PORT"
                )


def _launched(asked: ServerSettings, bundle: Bundle, folder: Path) -> Server:
    repository = bundle.directory / "triton"
    if asked.tritonserver is None:
        project, file = (
            f"triton-{model_name(bundle.info).lower().replace('.', '-')}",
            (repository / "docker-compose.yml").absolute(),
        )
        ports = {
            f"TRITON_{name.upper()}_PORT": str(getattr(asked, f"{name}_port")) for name in ("http", "grpc", "metrics")
        }
        server = Server(asked.url, project=project, compose=str(file))
        try:
            _compose(project, file, "up", "--detach", ports=ports)
        except ServerError:
            with suppress(ServerError):  # the first is the one to know
                server.stop()
            raise
        return server
    program = shutil.which(os.path.expanduser(asked.tritonserver))
    if program is None:
        raise ConfigError(
            f"tritonserver={asked.tritonserver!r} is no program",
            "give the path of Triton's own tritonserver, or leave it out to use Docker",
        )
    places = [f"--{name}-{key}={value}" for name in ("http", "grpc", "metrics") for key, value in _place(asked, name)]
    line = [program, f"--model-repository={repository.absolute()}", *FLAGS, *places, *asked.arguments]
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / _LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        streams = [
            (os.POSIX_SPAWN_DUP2, log, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        ]
        pid = os.posix_spawn(program, line, os.environ, file_actions=streams, setsid=True)  # it outlives this process
    except OSError as error:
        raise ConfigError(
            f"{program!r} cannot be started ({error.strerror})", "give the path of Triton's own tritonserver"
        ) from error
    finally:
        os.close(log)
    return Server(asked.url, pid, _began(pid))


def _place(asked: ServerSettings, name: str) -> Sequence[tuple[str, object]]:
    return (("address", "127.0.0.1"), ("port", getattr(asked, f"{name}_port")))


def _wait(asked: ServerSettings, bundle: Bundle, server: Server, folder: Path) -> None:
    """Return when server and model are ready and one golden image was answered right."""
    channel, model, deadline = (
        channel_of(Address.of(server.url)),
        model_name(bundle.info),
        time.monotonic() + asked.wait_s,
    )
    said = "it is not ready"
    while time.monotonic() < deadline:
        if not server.alive():
            raise ServerError(
                f"the server ended before it was ready: {_last_words(folder / _LOG)}",
                f"all it said is in {str(folder / _LOG)!r}",
            )
        try:
            if channel.ready(model, timeout_s=5):
                TritonBackend.of(bundle, server.url, timeout_s=max(1.0, deadline - time.monotonic()))
                return
        except Refused as error:
            said = str(error)
        time.sleep(_POLL_S)
    where = (
        f"all it said is in {str(folder / _LOG)!r}"
        if server.pid
        else f"look at `docker compose --project-name {server.project} logs`"
    )
    raise ServerError(
        f"the server at {server.url} was not ready within {asked.wait_s:g} s ({said})",
        f"{where}; wait_s gives it longer",
    )


def _compose(project: str, file: Path, *words: str, ports: Mapping[str, str] | None = None) -> None:
    """Run `docker compose`; ConfigError where it is not there, ServerError where it fails."""
    docker = shutil.which("docker")
    mend = "install Docker with its compose plugin, or name a program: --tritonserver PATH"
    if docker is None:
        raise ConfigError("there is no docker on this machine", mend)
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        raise ConfigError("this machine's docker has no `compose`", mend)
    line = [docker, "compose", "--project-name", project, "--file", str(file), *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, **(ports or {})})
    if done.returncode:
        words_of_it = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ServerError(
            f"`docker compose {words[0]}` failed: {words_of_it[:300]}",
            "is the Docker service running, and may you use it?",
        )


def _read(folder: Path) -> Server | None:
    """What was started from here and not stopped yet; StorageError where the note about it is damaged."""
    try:
        return Server(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise StorageError(
            f"{str(folder / _STATE)!r} is damaged", "end the server by hand and remove this file"
        ) from error


def _began(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None where it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if words[0] in "ZX" else words[19]


def _last_words(log: Path) -> str:
    """The last error in the server's log, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E", "error"))]
    return ((errors or lines or ["it said nothing"])[-1])[:300]
