"""One training as a process, a trial or a fold: its overrides, its start, its reports, its end."""

from __future__ import annotations

import json
import os
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

# A line of the child's standard output that starts with it is a report: [number of the validation, value].
MARK = "\x1etrial "
# Answers to it on the child's standard input.
GO_ON, STOP = "go", "stop"
_MLFLOW = "image_classifier.training.loggers.MLflowLogger"
# Variables of a job with many ranks: the tuner may be one of its tasks, a trial is not.
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
    """How a trial's process ended: complete (all fields empty), pruned, stopped from outside, or failed."""

    pruned: bool = False
    interrupted: bool = False
    reason: str = ""


class TrialProcess:
    """A `train` process that reports its validations.

    Args:
        command: The command line.
        log: The file that its output is appended to.
        environment: Variables that replace or add to those of this process.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.command = list(command)
        self.log = log
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(_RANKS)}
        self.environment = inherited | dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False
        self._lock = threading.Lock()

    def run(self, report: Callable[[int, float], bool]) -> TrialOutcome:
        """Run to the end; `report` takes the number of a validation and its value, and returns whether to prune."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            start = log.tell()
            with self._lock:
                if self._is_stopped:
                    return TrialOutcome(interrupted=True)
                # In a new session: Ctrl-C reaches the tuner only, which stops its trials.
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
        if pruned or self._is_stopped or code in _INTERRUPTED:
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
            except BrokenPipeError:
                # It has died meanwhile; its exit code tells how.
                pruned = False
        return pruned

    def stop(self, at_once: bool = False) -> None:
        """Let the trial save its newest step and end, or kill it `at_once`; `run` returns when it is gone."""
        with self._lock:
            self._is_stopped = True
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)


def _reason(code: int, log: Path, start: int) -> str:
    """Return why a process failed, as one line: its last error message, or the signal that killed it."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    if code < 0:
        name = signal.Signals(-code).name if -code in {item.value for item in signal.Signals} else f"signal {-code}"
        return f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    messages = [line for line in lines if line.startswith("error: ")] or lines or [f"exit code {code}"]
    return messages[-1].removeprefix("error: ")[:300]


def tracking_words(config: Mapping[str, Any], group: str) -> list[str]:
    """Return overrides for MLflow: one tag for the trainings of a `group`, and no copies of their bundles.

    `config` are the plain settings. A study has no limit of trials, so copies of all bundles would fill the disk.

    >>> tracking_words({"logger": {"_target_": "image_classifier.training.loggers.MLflowLogger"}}, "study")
    ["++logger.tags.study='study'", 'logger.artifacts=false']
    """
    logger = config.get("logger") or {}
    nodes = {"logger": logger}
    nodes |= {f"logger.{name}": node for name, node in logger.items() if isinstance(node, Mapping)}
    overrides = []
    for key, node in nodes.items():
        if node and node.get("_target_") == _MLFLOW:
            overrides += [f"++{key}.tags.study={quoted(group)}", f"{key}.artifacts=false"]
    return overrides


def spared_words(overrides: Sequence[str]) -> list[str]:
    """Return the override that turns the diagnostics of a group's trainings off, unless these overrides choose them.

    >>> spared_words(["optimizer=sgd"]), spared_words(["diagnostics=default"])
    (['diagnostics=none'], [])
    """
    return [] if any(text.startswith("diagnostics=") for text in overrides) else ["diagnostics=none"]


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """End the block at SIGTERM as at Ctrl-C, with exit code 143."""

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
    """Return the names of the GPUs that trials may use, as in CUDA_VISIBLE_DEVICES."""
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
    """Return the variables that divide this machine's cores, and its GPUs where there are several, between workers."""
    if workers == 1:
        return {}
    variables = {}
    if "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, usable_cores() // workers))
    names = gpus()
    if len(names) > 1:
        variables["CUDA_VISIBLE_DEVICES"] = names[worker % len(names)]
    return variables
