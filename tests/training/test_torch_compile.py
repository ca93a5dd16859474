"""torch.compile: tried in long runs only, kept only where it is faster, and never part of what is saved."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Timer
from torch import nn

from image_classifier.errors import ConfigError
from image_classifier.training.callbacks import lr_sweep, torch_compile
from image_classifier.training.callbacks.torch_compile import TorchCompile
from tests.conftest import QUICK, Command


class Clock:
    """A clock that each step moves on by what a step costs."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(lr_sweep, "time", clock)
    monkeypatch.setattr(torch_compile, "processor_flags", frozenset)
    yield clock
    torch._dynamo.config.suppress_errors = False


class SimpleTimer(Timer):
    """`trainer.max_time` of so many seconds, of which none are over."""

    def __init__(self, allowed_s: float | None) -> None:
        super().__init__()
        self.allowed_s = allowed_s

    def time_remaining(self, stage: str = "train") -> float | None:
        return self.allowed_s


def run(
    clock: Clock, step_s: float, compiled_step_s: float, steps: int, watched: int = 60, allowed_s: float | None = None
) -> list[bool]:
    """Whether each step of a run of `steps` was compiled."""
    backbone = nn.Linear(1, 1)
    module: Any = SimpleNamespace(device=torch.device("cpu"), classifier=SimpleNamespace(backbone=backbone))
    trainer: Any = SimpleNamespace(estimated_stepping_batches=steps, global_step=0, accumulate_grad_batches=1)
    trainer.callbacks = [SimpleTimer(allowed_s)]
    callback, compiled = TorchCompile(at_once=False), []
    callback.on_train_start(trainer, module)
    for step in range(min(watched, steps)):
        callback.on_train_batch_start(trainer, module, None, step)
        compiled.append(backbone._compiled_call_impl is not None)
        clock.now += compiled_step_s if compiled[-1] else step_s
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, step)
    return compiled


def test_a_short_run_is_not_compiled(clock: Clock) -> None:
    assert not any(run(clock, step_s=1.0, compiled_step_s=0.1, steps=600))


@pytest.mark.slow
def test_a_run_whose_time_will_be_over_is_not_compiled(clock: Clock) -> None:
    assert not any(run(clock, step_s=1.0, compiled_step_s=0.5, steps=6000, allowed_s=600))
    assert any(run(clock, step_s=1.0, compiled_step_s=0.5, steps=6000, allowed_s=1200))


def test_less_time_repays_it_where_the_processor_has_amx(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compile, "processor_flags", lambda: frozenset({"amx_bf16"}))
    assert any(run(clock, step_s=1.0, compiled_step_s=0.5, steps=600))


def test_a_long_run_is_compiled_and_stays_so_where_that_is_faster(clock: Clock) -> None:
    compiled = run(clock, step_s=1.0, compiled_step_s=0.5, steps=6000)
    assert not compiled[0]
    assert compiled[-1]


def test_what_compiling_does_not_speed_up_goes_on_uncompiled(clock: Clock) -> None:
    compiled = run(clock, step_s=1.0, compiled_step_s=1.0, steps=6000)
    assert any(compiled)
    assert not compiled[-1]


def test_without_a_compiler_a_long_run_goes_on_uncompiled(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not any(run(clock, step_s=1.0, compiled_step_s=0.5, steps=6000))


def test_asked_for_without_a_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    module: Any = SimpleNamespace(device=torch.device("cpu"), classifier=SimpleNamespace(backbone=nn.Linear(1, 1)))
    with pytest.raises(ConfigError, match=r"install g\+\+"):
        TorchCompile(at_once=True).on_train_start(SimpleNamespace(), module)  # type: ignore[arg-type]


class Small(nn.Module):
    """A module with a classifier, as far as the callback looks."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.classifier = nn.ModuleDict({"backbone": nn.Linear(1, 1)})
        self.classifier.backbone = self.classifier["backbone"]


@pytest.mark.parametrize("gradient", [float("nan"), float("inf"), 1.0])
def test_a_compiled_network_whose_gradients_are_no_numbers_is_given_up(
    gradient: float, caplog: pytest.LogCaptureFixture
) -> None:
    callback, module = TorchCompile(at_once=True), Small()
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace())
    callback.on_train_start(trainer, module)  # type: ignore[arg-type]
    backbone = module.classifier["backbone"]
    assert backbone._compiled_call_impl is not None
    backbone.weight.grad = torch.tensor([[gradient]])
    callback.on_after_backward(trainer, module)  # type: ignore[arg-type]
    good = gradient == 1.0
    assert (
        backbone._compiled_call_impl is not None,
        backbone.weight.grad is not None,
        "is skipped" not in caplog.text,
    ) == (good, good, good)


@pytest.mark.slow
def test_a_compiled_run_leaves_a_bundle_that_answers_without_compiling(
    command: Command, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = [
        "train",
        "name=fast",
        "trainer.compile=true",
        "trainer.max_epochs=2",
        *QUICK,
        "+trainer.limit_train_batches=8",
    ]
    done = command(*line)
    assert done.code == 0, done.err
    assert "torch.compile: on (as configured)" in done.err
    keys = torch.load("models/fast/model.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in keys if "_orig_mod" in key]
    assert command("test", "--checkpoint_name", "fast", "--backend", "checkpoint").code == 0
