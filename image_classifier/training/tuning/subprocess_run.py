"""One training as a process, a trial or a fold: what its command line is given, how it is started, listened to, answered and stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from image_classifier.cpu import usable_cores
from image_classifier.override_grammar import quoted

MARK = "\x1etrial "  # starts a line of the child's standard output that is a report: [number of the validation, value]
GO_ON, STOP = "go", "stop"
_MLFLOW = "image_classifier.training.loggers.MLflowLogger"
# Of a job with many ranks: the tuner may be one of its tasks, a trial is none.
_RANKS = (
    "SLURM_",
    "TORCHELASTIC_",
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_INTERRUPTED = (130, 143, -signal.SIGINT, -signal.SIGTERM)


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial's process ended: well, as not worth more (`pruned`), stopped from outside (`interrupted`), or failed with a reason."""

    pruned: bool = False
    interrupted: bool = False
    reason: str = ""


class TrialProcess:
    """A `train` whose validations are reported.

    Args:
        command: The whole command line.
        log: What the trial says is appended there.
        environment: Variables besides this process's own.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.command, self.log = list(command), log
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(_RANKS)} | {
            **environment
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def run(self, report: Callable[[int, float], bool]) -> TrialOutcome:
        """Run to the end; `report` takes the number of a validation and its value, and says whether to stop there."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            start = log.tell()
            with self._lock:
                if self._stopped:
                    return TrialOutcome(interrupted=True)
                # In a session of its own: Ctrl-C reaches the tuner only, which asks its trials to stop.
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self.environment,
                    start_new_session=True,
                )
            with self._process as process:
                pruned = self._listen(process, log, report)
                code = process.wait()
        if pruned or self._stopped or code in _INTERRUPTED:
            return TrialOutcome(pruned=pruned, interrupted=not pruned)
        return TrialOutcome(reason=_reason(code, self.log, start)) if code else TrialOutcome()

    def _listen(self, process: subprocess.Popen[bytes], log: IO[bytes], report: Callable[[int, float], bool]) -> bool:
        assert process.stdin is not None
        assert process.stdout is not None
        pruned = False
        for line in process.stdout:
            text = line.decode("utf-8", "replace")
            if not text.startswith(MARK):
                log.write(line)
                log.flush()
                continue
            step, value = json.loads(text.removeprefix(MARK))
            pruned = report(step, value)
            try:
                process.stdin.write(f"{STOP if pruned else GO_ON}\n".encode())
                process.stdin.flush()
            except BrokenPipeError:  # it died meanwhile: its exit code says how
                pruned = False
        return pruned

    def stop(self, at_once: bool = False) -> None:
        """Ask the trial to keep its newest step and end, or end it `at_once`; `run` returns when it is gone."""
        with self._lock:
            self._stopped = True
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)


def _reason(code: int, log: Path, start: int) -> str:
    """Why a process failed, as one line: its own last word, or the signal that killed it."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    if code < 0:
        name = signal.Signals(-code).name if -code in {item.value for item in signal.Signals} else f"signal {-code}"
        return f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    said = [line for line in lines if line.startswith("error: ")] or lines or [f"exit code {code}"]
    return re.sub(r"^error: ", "", said[-1])[:300]


def tracking_words(config: Any, group: str) -> list[str]:
    """What makes MLflow show the trainings of one `group` together, and keep no copy of their bundles, which would have no bound."""
    logger, words = config.get("logger") or {}, []
    nodes = {"logger": logger} | {f"logger.{name}": node for name, node in logger.items() if hasattr(node, "items")}
    for key, node in nodes.items():
        if node and node.get("_target_") == _MLFLOW:
            words += [f"++{key}.tags.study={quoted(group)}", f"{key}.artifacts=false"]
    return words


def spared_words(overrides: Sequence[str]) -> list[str]:
    """What keeps the trainings of a group from measuring what nobody will read, unless these words choose it."""
    return [] if any(text.startswith("diagnostics=") for text in overrides) else ["diagnostics=none"]


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, with exit code 143."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(143)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def gpus() -> list[str]:
    """The names of the GPUs that trials may use, as CUDA_VISIBLE_DEVICES takes them."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stdout.split() if done.returncode == 0 else []


def share(worker: int, workers: int) -> dict[str, str]:
    """The variables that give one of several trials on this machine its part of the processor cores, and a GPU of its own where there are several."""
    if workers == 1:
        return {}
    part = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, usable_cores() // workers))}
    names = gpus()
    return {**part, "CUDA_VISIBLE_DEVICES": names[worker % len(names)]} if len(names) > 1 else part
