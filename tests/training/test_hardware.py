"""What makes a step fast: chosen by capability, said, and all off with trainer.speed=safe."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import nn

from image_classifier.errors import ConfigError
from image_classifier.training import hardware
from image_classifier.training.builders import as_fast_as
from image_classifier.training.hardware import Hardware, SpeedSettings, choose_hardware
from image_classifier.training.optimizers.muon import Muon


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def with_flags(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(hardware, "processor_flags", lambda: frozenset(flags))


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16"])
def test_bfloat16_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, flag: str, caplog: pytest.LogCaptureFixture
) -> None:
    with_flags(monkeypatch, "avx512f", flag)
    with caplog.at_level(logging.INFO):
        assert choose_hardware(SpeedSettings()) == Hardware(
            "bf16-mixed", channels_last=True, fused=True, compile="auto"
        )
    assert f"precision: bf16-mixed (the processor has {flag})" in caplog.text


def test_float32_where_bfloat16_would_be_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    with_flags(monkeypatch, "avx2")
    assert choose_hardware(SpeedSettings()).precision == "32-true"


def test_safe_turns_all_off_and_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with_flags(monkeypatch, "avx512f", "avx512_bf16")
    with caplog.at_level(logging.INFO):
        assert choose_hardware(SpeedSettings(speed="safe", compile=True, channels_last=True)) == Hardware(
            "32-true", channels_last=False
        )
    assert caplog.text.count("trainer.speed=safe") == 4


def test_safe_with_a_precision_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_hardware(SpeedSettings(speed="safe", precision="64-true")).precision == "64-true"


def test_clipping_in_mixed_precision_takes_no_fused_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    with_flags(monkeypatch, "avx512_bf16")
    assert not choose_hardware(SpeedSettings(gradient_clip_val=1.0)).fused
    with_flags(monkeypatch, "avx2")
    assert choose_hardware(SpeedSettings(gradient_clip_val=1.0)).fused


@pytest.mark.parametrize("wrong", [-1.0, float("inf"), float("nan")])
def test_gradients_are_clipped_at_a_finite_positive_number(wrong: float) -> None:
    with pytest.raises(ConfigError, match="must be 0 or more"):
        SpeedSettings(gradient_clip_val=wrong)
    SpeedSettings(gradient_clip_val=0.0)


def test_half_precision_takes_no_fused_optimizer() -> None:
    assert not choose_hardware(
        SpeedSettings(precision="16-mixed")
    ).fused  # which would hide its gradients from trainer.on_nan


def test_a_deterministic_run_does_not_choose_by_the_clock() -> None:
    assert choose_hardware(SpeedSettings(deterministic=True)).compile is False
    assert choose_hardware(SpeedSettings(deterministic=True, compile=True)).compile is True


@pytest.mark.parametrize("wrong", [{"speed": "fastest"}, {"compile": "maybe"}, {"channels_last": "yes please"}])
def test_unknown_values_are_one_line(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="is unknown"):
        SpeedSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("precision", "exact"), [("32-true", True), ("bf16-mixed", False)])
def test_a_float32_run_lets_muon_compute_nothing_in_bfloat16(precision: str, exact: bool) -> None:
    optimizer = as_fast_as(Hardware(precision, channels_last=False, fused=True), partial(Muon, lr=0.1))(
        [nn.Parameter(torch.ones(2, 2))]
    )
    assert optimizer._exact == exact
