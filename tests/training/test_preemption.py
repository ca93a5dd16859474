"""A kill, a signal or SLURM may come at any moment: exit codes, what is saved, and that the run then goes on to the
same end.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from image_classifier.training.callbacks import preemption as signals_file
from image_classifier.training.callbacks.preemption import SignalHandler, slurm_job, slurm_warnings
from tests.conftest import QUICK, write_image

ROOT = Path(__file__).resolve().parents[2]
LINE = (
    "train",
    "data=folder",
    "data.dir=tree",
    "data.image_size=16",
    "data.batch_size=4",
    "model.backbone.channels=[4,8]",
    "model.backbone.dropout=0.2",
    "callbacks=ema",
    "callbacks.early_stopping=null",
    "callbacks.last_checkpoint.every_n_steps=3",
    "trainer.deterministic=true",
    "trainer.max_epochs=12",
    *QUICK,
)


def test_outside_of_the_steps_a_signal_ends_the_block_at_once() -> None:
    for number, error in ((signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)):
        before = signal.getsignal(number)
        with pytest.raises(error) as caught, SignalHandler().caught():
            os.kill(os.getpid(), number)
            time.sleep(1)
        assert signal.getsignal(number) is before
        assert number != signal.SIGTERM or caught.value.code == 143  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_waits_for_the_step_and_the_second_does_not(
    number: signal.Signals, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    signals, steps = SignalHandler(), 0
    with pytest.raises(SystemExit) as caught, signals.caught(), signals.deferred():
        os.kill(os.getpid(), number)
        steps = 1
    assert steps == 1 and caught.value.code == 128 + number
    said = capfd.readouterr().err
    assert "finishing the step under way" in said and said.splitlines()[-1].startswith(
        f"stopped by {number.name} after the last step"
    )
    monkeypatch.setattr(signals_file, "_ECHO_S", 0.0)
    with pytest.raises((SystemExit, KeyboardInterrupt)), signals.caught(), signals.deferred():
        os.kill(os.getpid(), number)
        steps = 2
    assert steps == 1


def test_a_sigterm_that_several_senders_pass_on_lets_the_step_end() -> None:
    signals, steps = SignalHandler(), 0
    with pytest.raises(SystemExit) as caught, signals.caught(), signals.deferred():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        steps = 1
    assert steps == 1 and caught.value.code == 143


@pytest.mark.parametrize(
    ("preempts", "numbers"), [(None, {signal.SIGUSR1, signal.SIGUSR2}), ("USR1", {signal.SIGUSR1})]
)
def test_slurm_warns_by_its_own_signal_and_by_submitits(
    preempts: str | None, numbers: set[signal.Signals], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SUBMITIT_PREEMPT_SIGNAL", raising=False)
    assert not slurm_warnings()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if preempts:
        monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", preempts)
    assert set(slurm_warnings()) == numbers


def fake_scontrol(folder: Path, code: int = 0) -> Path:
    """A `scontrol` that writes down what it was asked."""
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\nexit {code}\n')
    (folder / "scontrol").chmod(0o755)
    return folder


@pytest.mark.parametrize("code", [0, 1])
def test_slurms_warning_puts_the_job_back_into_the_queue(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bin_dir = fake_scontrol(tmp_path / "bin", code)
    monkeypatch.setenv("PATH", str(bin_dir), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(SystemExit) as caught, SignalHandler().caught():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1)
    assert caught.value.code == 128 + signal.SIGUSR1
    assert (bin_dir / "asked").read_text() == "requeue 77\n"
    assert ("back in the queue" if code == 0 else "resume=last") in caplog.text


def test_a_job_of_an_array_is_one_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "79")
    assert slurm_job() == "79"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm_job() == "77_2"


class Training:
    """`commands.py train` in a process of its own, watched by its log."""

    def __init__(self, *line: str, **environment: str) -> None:
        command = [sys.executable, str(ROOT / "commands.py"), *LINE, *line]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment
        )
        self.log: list[str] = []

    def until(self, pattern: str) -> Training:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if re.search(pattern, line):
                return self
        raise AssertionError("".join(self.log))

    def end(self, number: int | None = None, timeout: float = 300) -> int:
        if number is not None:
            self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=timeout)
        self.log.append(rest)
        return self.process.returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a run `whole` that nothing stopped."""
    folder = tmp_path_factory.mktemp("signals")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for number in range(48):
            write_image(folder / "tree" / ("cat" if number % 2 else "dog") / f"{number:03d}.png", number, 16)
        training = Training("name=whole")
        assert training.end() == 0, training.log
    finally:
        os.chdir(before)
    return folder


def assert_same(folder: Path, name: str) -> None:
    assert (folder / "runs" / name / "metrics.csv").read_bytes() == (folder / "runs/whole/metrics.csv").read_bytes()
    one, other = (
        torch.load(folder / f"models/{run}/model.ckpt", weights_only=True)["state_dict"] for run in (name, "whole")
    )
    assert all(torch.equal(one[key], other[key]) for key in other)
    for path in ("val/predictions.csv", "val/logits.npy", "val/metrics.json"):
        assert (folder / "plots" / name / path).read_bytes() == (folder / "plots/whole" / path).read_bytes()
    assert not [path for kind in ("runs", "models") for path in (folder / kind / name).rglob("*.part")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "pattern"),
    [
        (signal.SIGTERM, " parameters, "),  # before the first step
        (signal.SIGTERM, "epoch 1/"),
        (signal.SIGINT, "epoch 6/"),
        (signal.SIGTERM, "epoch 12/12"),  # while the results are written
        (signal.SIGINT, "ONNX agrees"),
    ],
)
def test_a_signal_saves_and_the_run_goes_on(
    number: signal.Signals, pattern: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole)
    name = f"signal-{number:d}-{re.sub(r'[^a-zA-Z0-9]+', '-', pattern)}"
    training = Training(f"name={name}").until(pattern)
    assert training.end(number) == 128 + number, training.log
    again = ("resume=last",) if (whole / "runs" / name).exists() else ()
    assert "stopped by" in training.log[-1]
    finish = Training(f"name={name}", *again)
    assert finish.end() == 0, finish.log
    assert_same(whole, name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_again_and_again_it_ends_as_if_never_killed(
    seed: int, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole)
    name, draw = f"killed-{seed}", random.Random(seed)
    again: tuple[str, ...] = ()
    for _ in range(4):
        training = Training(f"name={name}", *again).until(" parameters, | is finished")
        if "is finished" in training.log[-1]:  # the kill before came after the last file, as the process ended
            training.end()
            break
        time.sleep(draw.random() * 1.5)
        if training.end(signal.SIGKILL) == 0:
            break
        again = ("resume=last",)
    finish = Training(f"name={name}", "resume=last")
    code = finish.end()
    assert code == 0 or "is finished" in "".join(finish.log), finish.log
    assert_same(whole, name)


@pytest.mark.slow
def test_slurm_requeues_a_job_that_then_goes_on_by_itself(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole)
    bin_dir = fake_scontrol(tmp_path / "bin")
    environment = {"SLURM_JOB_ID": "4711", "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
    training = Training("name=slurm", **environment).until("epoch 4/")
    assert training.end(signal.SIGUSR1) == 128 + signal.SIGUSR1
    assert (bin_dir / "asked").read_text() == "requeue 4711\n"
    finish = Training("name=slurm", SLURM_RESTART_COUNT="1", **environment)
    assert finish.end() == 0, finish.log
    assert "SLURM started job 4711 again" in "".join(finish.log)
    assert_same(whole, "slurm")
