"""A Triton server over a bundle's model repository: started, awaited until it answers correctly, and stopped again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from image_classifier.atomic_io import file_lock, write_text
from image_classifier.bundle import INFO_NAME, Bundle, read_bundle
from image_classifier.errors import CheckpointError, ConfigError, ServerError, StorageError
from image_classifier.inference.model_reference import CheckpointReference
from image_classifier.inference.triton.client import TritonBackend, channel_of, model_name
from image_classifier.inference.triton.protocol import Address, Refused
from image_classifier.program import program

ACTIONS = ("start", "stop")
# Files of a model repository can be run as code: it is read once, and nothing is loaded or changed over the network.
FLAGS = (
    "--model-control-mode=none",
    "--strict-readiness=true",
    "--exit-on-error=true",
    "--disable-auto-complete-config",
    "--exit-timeout-secs=10",
)
_PROTOCOLS = ("http", "grpc", "metrics")
_STATE = "server.json"
_LOG = "server.log"
_POLL_S = 0.2
_MAX_REASON = 300  # characters of another program's message


@dataclass(frozen=True, kw_only=True)
class ServerSettings(CheckpointReference):
    """The keys of conf/triton.yaml."""

    action: str
    tritonserver: str | None = None
    arguments: list[str] = field(default_factory=list)
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    wait_s: float = 180.0
    runs_dir: str = "runs"

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ConfigError(f"there is no action {self.action!r}", f"write triton {' or triton '.join(ACTIONS)}")
        ports = [self.port(name) for name in _PROTOCOLS]
        if len(set(ports)) < 3 or not all(0 < port < 65536 for port in ports):
            raise ConfigError(f"invalid ports {', '.join(map(str, ports))}: expected three different ones, 1 to 65535")
        if self.wait_s <= 0:
            raise ConfigError("wait_s must be more than 0")

    def port(self, name: str) -> int:
        """Return the port of `http`, `grpc` or `metrics`."""
        return int(getattr(self, f"{name}_port"))

    @property
    def url(self) -> str:
        """The address of the server over HTTP."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def folder(self) -> Path:
        """The folder with the note about the started server, and its log."""
        return Path(self.runs_dir) / "triton" / Path(self.checkpoint_name).expanduser().absolute().name


@dataclass(frozen=True)
class StartedServer:
    """A server that answers: its model, its address, and the seconds from start to the first correct answer."""

    model: str
    url: str
    seconds: float


@dataclass(frozen=True)
class StoppedServer:
    """A server that was stopped, or had ended before."""

    url: str
    was_running: bool


@dataclass(frozen=True)
class _Server:
    """A server as server.json keeps it: a process of this machine, or a project of `docker compose`.

    `began` is the start time of the process: the operating system uses process ids again.
    """

    url: str
    pid: int | None = None
    began: str | None = None
    project: str | None = None
    compose: str | None = None

    def alive(self) -> bool:
        """Return whether it still runs; a container counts as running, as only Docker knows."""
        return self.pid is None or (self.began is not None and _began(self.pid) == self.began)

    def stop(self, patience_s: float = 30.0) -> None:
        """End the server and nothing else; ServerError where Docker refuses."""
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
                os.killpg(self.pid, signal.SIGKILL)  # it leads the group that `_spawned` made for it


def start_server(settings: ServerSettings) -> StartedServer:
    """Start a server over the bundle's model repository and return once it answers a golden image correctly.

    Raises:
        CheckpointError: There is no bundle, or it has no model repository.
        ConfigError: There is no program to start it, a port is taken, or it runs already.
        ServerError: It ended, was not ready in time, or answers incorrectly; then it is stopped again.
    """
    path = settings.path()
    if not (path / INFO_NAME).is_file():
        raise CheckpointError(f"{str(path)!r} is not a bundle", "only a bundle has a model repository")
    bundle = read_bundle(path)
    files = bundle.info.exports.get("triton", {}).get("files", [])
    if not files:
        raise CheckpointError(
            f"the bundle {path.name!r} has no model repository", f"{program()} export {path.name} --to triton"
        )
    bundle.verify(files)
    bundle.refuse_unlisted("triton")
    try:
        with file_lock(settings.folder / "lock", wait=False):
            return _start_locked(settings, path.name, bundle)
    except BlockingIOError as error:
        raise ConfigError(f"another command is starting a server of {path.name!r}", "wait for it") from error


def stop_server(settings: ServerSettings) -> StoppedServer:
    """Stop the server that `start_server` started with the same `runs_dir`; ConfigError where there is none."""
    folder = settings.folder
    server = _read(folder)
    if server is None:
        raise ConfigError(
            f"no server of {folder.name!r} was started here",
            f"its record would be {str(folder / _STATE)!r}: use the same runs_dir",
        )
    was_running = server.alive()
    server.stop()
    (folder / _STATE).unlink()
    return StoppedServer(server.url, was_running)


def _start_locked(settings: ServerSettings, name: str, bundle: Bundle) -> StartedServer:
    server = _read(settings.folder)
    if server and server.alive():
        raise ConfigError(f"a server of {name!r} already runs at {server.url}", f"{program()} triton stop {name}")
    _check_ports(settings)
    start = time.monotonic()
    server = _launched(settings, bundle)
    try:
        write_text(settings.folder / _STATE, json.dumps(asdict(server)) + "\n")
        _wait(settings, bundle, server)
    except BaseException:
        server.stop()
        (settings.folder / _STATE).unlink(missing_ok=True)
        raise
    return StartedServer(model_name(bundle.info), server.url, time.monotonic() - start)


def _check_ports(settings: ServerSettings) -> None:
    """Raise ConfigError where another program listens on a port: it would answer instead of the new server."""
    for name in _PROTOCOLS:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", settings.port(name))) == 0:
                raise ConfigError(
                    f"port {settings.port(name)} is already in use",
                    f"end the program that listens there, or choose another port: --{name}_port PORT",
                )


def _launched(settings: ServerSettings, bundle: Bundle) -> _Server:
    repository = (bundle.directory / "triton").absolute()
    if settings.tritonserver is None:
        return _composed(settings, model_name(bundle.info), repository / "docker-compose.yml")
    return _spawned(settings, settings.tritonserver, repository)


def _composed(settings: ServerSettings, model: str, file: Path) -> _Server:
    """Start the container of the model repository."""
    project = f"triton-{model.lower().replace('.', '-')}"
    server = _Server(settings.url, project=project, compose=str(file))
    ports = {f"TRITON_{name.upper()}_PORT": str(settings.port(name)) for name in _PROTOCOLS}
    try:
        _compose(project, file, "up", "--detach", ports=ports)
    except ServerError:
        with suppress(ServerError):  # the first error is the one to report
            server.stop()
        raise
    return server


def _spawned(settings: ServerSettings, name: str, repository: Path) -> _Server:
    """Start the program `tritonserver` of this machine; it outlives this process."""
    program = shutil.which(os.path.expanduser(name))
    hint = "give the path of Triton's tritonserver"
    if program is None:
        raise ConfigError(f"tritonserver={name!r} is not a program", f"{hint}, or leave it out to use Docker")
    addresses = [
        flag
        for protocol in _PROTOCOLS
        for flag in (f"--{protocol}-address=127.0.0.1", f"--{protocol}-port={settings.port(protocol)}")
    ]
    line = [program, f"--model-repository={repository}", *FLAGS, *addresses, *settings.arguments]
    settings.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(settings.folder / _LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        streams = [
            (os.POSIX_SPAWN_DUP2, log, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        ]
        pid = os.posix_spawn(program, line, os.environ, file_actions=streams, setsid=True)
    except OSError as error:
        raise ConfigError(f"{program!r} cannot be started ({error.strerror})", hint) from error
    finally:
        os.close(log)
    return _Server(settings.url, pid, _began(pid))


def _wait(settings: ServerSettings, bundle: Bundle, server: _Server) -> None:
    """Return when server and model are ready and one golden image was answered correctly."""
    log = settings.folder / _LOG
    channel = channel_of(Address.of(server.url))
    deadline = time.monotonic() + settings.wait_s
    reason = "it is not ready"
    while time.monotonic() < deadline:
        if not server.alive():
            raise ServerError(
                f"the server ended before it was ready: {_last_error(log)}", f"its full log is {str(log)!r}"
            )
        try:
            if channel.ready(model_name(bundle.info), timeout_s=5):
                TritonBackend.of(bundle, server.url, timeout_s=max(1.0, deadline - time.monotonic()))
                return
        except Refused as error:
            reason = str(error)
        time.sleep(_POLL_S)
    look = f"see {str(log)!r}" if server.pid else f"see `docker compose --project-name {server.project} logs`"
    raise ServerError(
        f"the server at {server.url} was not ready within {settings.wait_s:g} s ({reason})",
        f"{look}, or raise wait_s",
    )


def _compose(project: str, file: Path, *words: str, ports: Mapping[str, str] | None = None) -> None:
    """Run `docker compose`; ConfigError where it is not installed, ServerError where it fails."""
    docker = shutil.which("docker")
    hint = "install Docker with its compose plugin, or name a program: --tritonserver PATH"
    if docker is None:
        raise ConfigError("docker is not installed", hint)
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        raise ConfigError("this machine's docker has no `compose`", hint)
    line = [docker, "compose", "--project-name", project, "--file", str(file), *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, **(ports or {})})
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ServerError(
            f"`docker compose {words[0]}` failed: {reason[:_MAX_REASON]}",
            "is the Docker service running, and may you use it?",
        )


def _read(folder: Path) -> _Server | None:
    """Return the server that was started and not stopped yet; StorageError where its record is damaged."""
    try:
        return _Server(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise StorageError(
            f"{str(folder / _STATE)!r} is damaged", "end the server by hand and remove this file"
        ) from error


def _began(pid: int) -> str | None:
    """Return when a process began, in clock ticks after the boot; None where it has ended.

    proc_pid_stat(5): behind the name in parentheses come state (field 3) and, 19 fields later, starttime (field 22).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _last_error(log: Path) -> str:
    """Return the last error in the server's log, or else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E", "error"))]
    return ((errors or lines or ["its log is empty"])[-1])[:_MAX_REASON]
