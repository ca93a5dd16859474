"""What a run finds out before it begins: sound values, the same run as if they had been given, and no trace of the
trials.
"""

import csv
import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classifier.errors import ConfigError
from image_classifier.training import autotune
from image_classifier.training.autotune import find_batch_size, seconds_of
from image_classifier.training.callbacks.lr_sweep import LearningRateSweep, StepTimer
from image_classifier.training.learning_rate_finder import lowest, smoothed, suggest
from image_classifier.training.memory import _container_free, free_memory, memory_used
from image_classifier.training.trial_trainer import without_trace
from tests.conftest import QUICK, Command, MakeTree
from tests.training.small_fits import fit, small_module

SMALL = (
    "data=folder",
    "data.dir=tree",
    "data.image_size=16",
    *QUICK,
    "model.backbone.channels=[4,8]",
    "trainer.accelerator=cpu",
)
RATES = np.geomspace(1e-6, 10, 100)


@pytest.fixture
def in_a_folder_with_a_tree(tmp_path: Path, make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(cat=20, dog=20)
    monkeypatch.chdir(tmp_path)


def weights(name: str) -> dict[str, torch.Tensor]:
    content = torch.load(f"models/{name}/model.ckpt", weights_only=True)
    return dict(content["state_dict"])


@settings(deadline=None, max_examples=30)
@given(steepest=st.floats(-4.5, -1.0), noise=st.floats(0, 0.03), seed=st.integers(0, 99))
def test_the_steepest_descent_is_found_through_noise(steepest: float, noise: float, seed: int) -> None:
    place = np.log10(RATES)
    losses = (
        2.3 - 2 / (1 + np.exp(-4 * (place - steepest))) + 10 ** (2 * (place - steepest - 1.5))
    )  # falls about there, diverges later
    losses += noise * np.random.default_rng(seed).standard_normal(len(losses))
    kept = losses < 8  # the sweep stops where the loss diverges
    found = suggest(RATES[kept], smoothed(losses[kept]))
    assert found is not None and abs(np.log10(found) - steepest) < 0.5


def test_a_loss_that_only_rises_gives_no_rate() -> None:
    assert suggest(RATES, np.linspace(1, 9, 100)) is None
    assert lowest(RATES, np.linspace(1, 9, 100)) is None


def test_smoothing_keeps_a_straight_line_and_does_not_lag() -> None:
    line = np.linspace(5, 1, 60)
    assert np.allclose(smoothed(line)[10:-10], line[10:-10], atol=0.02)


@pytest.mark.slow
def test_a_run_that_found_its_rate_is_the_run_that_was_given_it(
    in_a_folder_with_a_tree: None, command: Command
) -> None:
    base = ("train", *SMALL, "data.batch_size=4", "trainer.max_epochs=2", "trainer.deterministic=true")
    answer = command(*base, "name=found", "optimizer.lr=auto")
    assert answer.code == 0, answer.err
    assert "optimizer.lr: " in answer.err
    saved = yaml.safe_load(Path("runs/found/config.yaml").read_text())
    rate = saved["optimizer"]["lr"]
    assert 1e-6 < rate < 10 and saved["scheduler"]["build"]["max_lr"] == rate
    assert Path("plots/found/learning_rate_finder.png").stat().st_size > 5000
    with Path("plots/found/learning_rate_finder.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert 10 < len(rows) <= 100 and rows[0]["learning_rate"] == pytest.approx(1e-6)
    given_ = command(*base, "name=given", f"optimizer.lr={rate}")
    assert given_.code == 0, given_.err
    found, expected = weights("found"), weights("given")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_sweep_takes_one_loss_a_step_though_a_step_takes_several_batches(tmp_path: Path) -> None:
    single, several = LearningRateSweep(1e-4, 1e-2, 8), LearningRateSweep(1e-4, 1e-2, 8)
    fit(small_module(norm=False), tmp_path, [single], batch_size=12, max_epochs=2)
    fit(small_module(norm=False), tmp_path, [several], batch_size=6, accumulate_grad_batches=2, max_epochs=2)
    assert several.rates == single.rates and len(single.rates) == 8
    assert several.losses == pytest.approx(single.losses, rel=1e-4)


class FakeTrials:
    """Trials of a machine whose speed and memory are known."""

    on_gpu = False

    def __init__(self, images: int, speeds: dict[int, float | None]) -> None:
        self.speeds, self.tried = speeds, list[int]()
        self.config = SimpleNamespace(optimizer=SimpleNamespace(lr=1e-3))
        self.num_train = images


def found_with(
    monkeypatch: pytest.MonkeyPatch, images: int, speeds: dict[int, float | None], peaks: dict[int, float] | None = None
) -> int:
    trials = FakeTrials(images, speeds)

    def speed(trials: Any, batch_size: int) -> tuple[float, float] | None:
        rate = trials.speeds[batch_size]
        return None if rate is None else (rate, (peaks or {}).get(batch_size, 1e6))

    monkeypatch.setattr(autotune, "_speed", speed)
    monkeypatch.setattr(autotune, "memory_used", lambda on_gpu: 0.0)
    monkeypatch.setattr(autotune, "free_memory", lambda on_gpu: 1e9)
    return find_batch_size(trials)  # type: ignore[arg-type]


def test_the_batch_grows_while_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found_with(monkeypatch, 10_000, {16: 100, 32: 150, 64: 180, 128: 182}) == 64


def test_the_batch_stays_below_a_tenth_of_the_training_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found_with(monkeypatch, 400, {16: 100, 32: 150}) == 32
    assert found_with(monkeypatch, 40, {4: 100}) == 4


def test_the_batch_stays_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found_with(monkeypatch, 10_000, {16: 100, 32: 150, 64: None}) == 32
    assert (
        found_with(monkeypatch, 10_000, {16: 100, 32: 150}, {16: 1e8, 32: 9e8}) == 32
    )  # 64 would add 1.6 GB where 1 GB is left
    with pytest.raises(ConfigError, match="not even"):
        found_with(monkeypatch, 10_000, {16: None})


def test_running_out_of_gpu_memory_ends_a_trial_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trials = FakeTrials(100, {})
    trials.fit = fit  # type: ignore[attr-defined]
    from image_classifier.dataset.settings import DataSettings

    assert autotune._speed(trials, DataSettings(batch_size=16)) is None  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_finds_its_batch_and_ends_within_its_time(
    in_a_folder_with_a_tree: None, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    line = (
        "train",
        *SMALL,
        "name=timed",
        "data.batch_size=auto",
        "trainer.max_epochs=null",
        "trainer.max_time=00:00:00:05",
    )
    answer = command(*line)
    assert answer.code == 0, answer.err
    assert (
        "images/s, peak memory" in answer.err
        and "data.batch_size: " in answer.err
        and "trainer.max_steps: " in answer.err
    )
    saved = yaml.safe_load(Path("runs/timed/config.yaml").read_text())
    assert saved["data"]["batch_size"] in (1, 2, 3) and saved["trainer"]["max_steps"] > 0
    with Path("runs/timed/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["val/loss"] and int(rows[-1]["step"]) <= saved["trainer"]["max_steps"]


@pytest.mark.slow
def test_more_time_given_on_resume_is_planned_anew(in_a_folder_with_a_tree: None, command: Command) -> None:
    line = (
        "train",
        *SMALL,
        "name=timed",
        "scheduler=constant",
        "data.batch_size=4",
        "trainer.max_epochs=null",
        "~callbacks.early_stopping",
    )
    assert command(*line, "trainer.max_time=00:00:00:03").code == 0
    short = yaml.safe_load(Path("runs/timed/config.yaml").read_text())["trainer"]["max_steps"]
    answer = command("train", "resume=runs/timed", "trainer.max_time=00:00:00:09")
    assert answer.code == 0, answer.err
    assert "trainer.max_time: 00:00:00:09 instead of 00:00:00:03" in answer.err
    assert yaml.safe_load(Path("runs/timed/config.yaml").read_text())["trainer"]["max_steps"] > 1.5 * short > 0


@pytest.mark.slow
def test_trials_leave_every_random_state_as_it_was() -> None:
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    expected = (random.random(), np.random.random(), torch.rand(3))  # noqa: NPY002
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    level = logging.getLogger("image_classifier").level
    with pytest.raises(KeyError), without_trace():
        random.random(), np.random.random(9), torch.rand(7)  # noqa: NPY002
        raise KeyError
    assert logging.getLogger("image_classifier").level == level
    assert (random.random(), np.random.random()) == expected[:2] and torch.equal(torch.rand(3), expected[2])  # noqa: NPY002


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("model.tta=flip", "data.flip=false"), "model.tta=flip"),
        (("model.tta=flip_shift", "data.flip=false"), "set model.tta=shift"),
        (("model.tta=mirror",), "model.tta=mirror"),
        (("trainer.max_epochs=null",), "this run would never end"),
        (("optimizer=muon", "optimizer.lr=auto", "optimizer.auxiliary_lr=0.1"), "optimizer.auxiliary_lr"),
        (("trainer.max_epochs=null", "trainer.max_time=soon"), "trainer.max_time=soon"),
    ],
)
def test_what_cannot_be_is_refused_before_the_data_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, line: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = command("train", "data=folder", "data.dir=nowhere", *line)
    assert answer.code == 2 and says in answer.err.splitlines()[-1], answer.err


def test_time_is_read_as_lightning_reads_it() -> None:
    assert seconds_of("00:00:30:05") == 1805
    assert seconds_of({"minutes": 2}) == 120
    with pytest.raises(ConfigError, match="trainer.max_time"):
        seconds_of("soon")


def test_a_busy_moment_does_not_make_steps_look_slow() -> None:
    watch = StepTimer(2, None, phases=2)
    watch.steps = [9.0, 9.0, 1.0, 1.0, 5.0, 1.0, 9.0, 9.0, 3.0, 3.0, 3.0, 30.0]
    assert watch.step_s() == 2.0
    assert watch.step_s(undisturbed=False) == (2.0 + 9.75) / 2


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert 0 < free_memory(False) < 2**50 and memory_used(False) > 2**20
    assert _container_free(tmp_path) == float("inf")
    for name, text in {
        "memory.max": "1000\n",
        "memory.current": "700\n",
        "memory.stat": "anon 400\nfile 300\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert _container_free(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_free(tmp_path) == float("inf")
