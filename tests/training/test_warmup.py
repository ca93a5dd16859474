"""Warm-up, clipping and accumulation: what the steps are made with, and how many of them a scheduler counts."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from image_classifier.errors import ConfigError
from image_classifier.training.optimizers.muon import Muon
from image_classifier.training.optimizers.schedules import scaled_rates, warmup_factor, warmup_steps
from tests.conftest import Command
from tests.training.small_fits import Rates, SaveAt, equal_states, fit, small_module
from tests.training.test_parameter_groups import SCHEDULERS

MUON = partial(Muon, lr=0.02, auxiliary="sgd", auxiliary_lr=0.05, head_lr_scale=2.0)


@given(steps=st.integers(1, 1000))
def test_the_factor_rises_by_equal_parts_to_one_and_stays(steps: int) -> None:
    factors = [warmup_factor(step, steps) for step in range(steps + 5)]
    assert factors[0] == pytest.approx(1 / steps)
    assert factors[steps - 1 :] == [1.0] * 6
    rises = [after - before for before, after in pairwise(factors[:steps])]
    assert rises == pytest.approx([1 / steps] * (steps - 1))


@pytest.mark.parametrize(
    ("warmup", "num_steps", "expected"),
    [(0, 50, 0), (0.1, 50, 5), (0.5, 3, 2), (1, 50, 1), (7.0, 50, 7), (0, float("inf"), 0)],
)
def test_below_one_warmup_is_a_share_of_the_run(warmup: float, num_steps: float, expected: int) -> None:
    assert warmup_steps(warmup, num_steps) == expected


@pytest.mark.parametrize(
    ("warmup", "num_steps"), [(-0.1, 50), (float("nan"), 50), (float("inf"), 50), (0.1, float("inf"))]
)
def test_an_impossible_warmup_is_refused(warmup: float, num_steps: float) -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.warmup"):
        warmup_steps(warmup, num_steps)


@given(rates=st.lists(st.floats(1e-12, 1e3), min_size=1, max_size=4), factor=st.floats(1e-6, 1))
def test_rates_are_put_back_to_the_last_bit_also_after_an_error(rates: list[float], factor: float) -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=1.0)
    with pytest.raises(RuntimeError), scaled_rates(optimizer, factor):
        assert [group["lr"] for group in optimizer.param_groups] == [rate * factor for rate in rates]
        raise RuntimeError
    assert [group["lr"] for group in optimizer.param_groups] == rates


@pytest.mark.parametrize(
    "name", sorted(SCHEDULERS.keys() - {"plateau"})
)  # plateau answers to losses, which warm-up changes
def test_warmup_multiplies_what_any_scheduler_says_and_leaves_it_alone(name: str, tmp_path: Path) -> None:
    plain, warm = Rates(), Rates()
    for rates, settings in ((plain, SCHEDULERS[name]), (warm, replace(SCHEDULERS[name], warmup=0.5))):
        fit(
            small_module(partial(torch.optim.SGD, lr=0.1, momentum=0.9), settings),
            tmp_path,
            [rates],
            limit_val_batches=0,
        )
    factors = [min(1.0, (step + 1) / 6) for step in range(12)]
    for used, without, factor in zip(warm.used, plain.used, factors, strict=True):
        assert used == pytest.approx([factor * rate for rate in without])
    assert warm.logged == plain.logged


def test_the_rate_that_is_told_is_the_one_that_steps(tmp_path: Path) -> None:
    class Told(pl.Callback):
        rates: list[float] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
            self.rates.append(pl_module.learning_rate)

    used, told = Rates(), Told()
    fit(
        small_module(partial(torch.optim.SGD, lr=0.1), replace(SCHEDULERS["linear"], warmup=4)),
        tmp_path,
        [used, told],
        max_epochs=2,
    )
    assert told.rates == pytest.approx([one[0] for one in used.used])


def test_linear_with_warmup_is_a_triangle_down_to_zero(tmp_path: Path) -> None:
    rates = Rates()
    fit(
        small_module(partial(torch.optim.SGD, lr=0.1), replace(SCHEDULERS["linear"], warmup=4)),
        tmp_path,
        [rates],
        max_epochs=5,
    )
    used = [one[0] for one in rates.used]
    assert used.index(max(used)) == 3
    assert used[3:] == pytest.approx([0.1 * (1 - step / 20) for step in range(3, 20)])


@pytest.mark.parametrize("name", ["one_cycle", "exponential"])
def test_muons_groups_move_in_proportion_with_warmup(name: str, tmp_path: Path) -> None:
    rates = Rates()
    fit(small_module(partial(MUON, lr=0.1, auxiliary_lr=0.25), replace(SCHEDULERS[name], warmup=3)), tmp_path, [rates])
    assert all(
        [one / used[0] for one in used] == pytest.approx([1, 5, 5, 2.5, 2.5]) for used in rates.used
    )  # its bias is the second head


@pytest.mark.parametrize("name", ["cosine", "plateau"])
@pytest.mark.parametrize("make_optimizer", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), MUON], ids=["sgd", "muon"])
def test_a_run_stopped_within_its_warmup_goes_on_to_the_last_bit(
    make_optimizer: Any, name: str, tmp_path: Path
) -> None:
    modules = [small_module(make_optimizer, replace(SCHEDULERS[name], warmup=0.7), layer_decay=0.8) for _ in range(2)]
    fit(modules[0], tmp_path, [SaveAt(tmp_path / "stopped.ckpt", 1)])
    fit(modules[1], tmp_path, ckpt_path=tmp_path / "stopped.ckpt")
    assert equal_states(*modules)


@pytest.mark.parametrize("make_optimizer", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), MUON], ids=["sgd", "muon"])
def test_accumulated_gradients_are_those_of_the_larger_batch_in_the_schedule_too(
    make_optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "image_classifier.training.optimizers.muon.number_format", lambda device: torch.float64
    )  # else rounding is all one sees
    settings = replace(SCHEDULERS["linear"], warmup=0.3)
    whole, parts = (small_module(make_optimizer, settings, norm=False).double() for _ in range(2))
    seen = [Rates(), Rates()]
    fit(whole, tmp_path, [seen[0]], batch_size=24, max_epochs=10)
    fit(parts, tmp_path, [seen[1]], batch_size=6, accumulate_grad_batches=4, max_epochs=10)
    assert seen[0].used == seen[1].used
    assert len(seen[0].used) == 20
    for name, value in whole.classifier.state_dict().items():
        torch.testing.assert_close(parts.classifier.state_dict()[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("make_optimizer", [partial(torch.optim.SGD, lr=0.1), MUON], ids=["sgd", "muon"])
def test_gradients_are_clipped_to_their_norm_over_all_groups(make_optimizer: Any, tmp_path: Path) -> None:
    class Norms(pl.Callback):
        def __init__(self) -> None:
            self.found: list[float] = []

        def on_before_zero_grad(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
        ) -> None:
            gradients = [one.grad for one in pl_module.parameters() if one.grad is not None]
            if gradients:
                self.found.append(float(torch.linalg.vector_norm(torch.stack([one.norm() for one in gradients]))))

    clipped, free = Norms(), Norms()
    fit(small_module(make_optimizer), tmp_path, [clipped], gradient_clip_val=0.05)
    fit(small_module(make_optimizer), tmp_path, [free])
    assert max(free.found) > 0.06
    assert max(clipped.found) <= 0.05 * 1.001


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optimizer.layer_decay=1.5", "invalid optimizer.layer_decay=1.5"),
        ("scheduler.warmup=-1", "invalid scheduler.warmup=-1"),
        ("optimizer.lr=-0.1", "Invalid learning rate: -0.1"),
        ("callbacks.unfreeze.every_n_epochs=0", "invalid callbacks.unfreeze.every_n_epochs=0"),
        ("scheduler.build.pct_start=3", "Expected float between 0 and 1 pct_start"),
    ],
)
def test_impossible_values_are_refused_before_any_data_is_read(word: str, said: str, command: Command) -> None:
    done = command("train", "data=folder", "data.dir=nowhere", word)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
