"""A run that is stopped anywhere, any number of times, and goes on ends bit by bit as one that never stopped."""

from __future__ import annotations

import random
import tempfile
from functools import partial
from pathlib import Path

import pytest
from torch.optim import SGD

from tests.training.short_runs import BATCHES, Options, Result, same, train

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*LeafSpec.*:FutureWarning")

# Where Lightning calls back, and how often in a run of three epochs.
HOOKS = {
    "on_train_epoch_start": 3,
    "on_train_batch_start": 3 * BATCHES,
    "on_before_backward": 3 * BATCHES,
    "on_train_batch_end": 3 * BATCHES,
    "on_validation_start": 3,
    "on_validation_batch_start": 3,
    "on_validation_epoch_end": 3,
    "on_validation_end": 3,
    "on_train_epoch_end": 3,
    "on_train_end": 1,
}
_whole: dict[str, Result] = {}


def whole(options: Options) -> Result:
    """The same training, never stopped."""
    key = repr(options)
    if key not in _whole:
        with tempfile.TemporaryDirectory() as folder:
            _whole[key] = train(Path(folder), options)
    return _whole[key]


def assert_same(end: Result, options: Options) -> None:
    expected = whole(options)
    assert end.ended and expected.ended
    assert end.rows == expected.rows
    assert same(end.last, expected.last)
    assert same(end.best, expected.best)


PLAIN = Options()
HARD = Options(accumulate=2, average="ema", scheduler="plateau", every_n_steps=2)


@pytest.mark.parametrize("killed", [False, True], ids=["signal", "kill"])
@pytest.mark.parametrize(
    ("options", "hook", "number"),
    [
        (PLAIN, "on_train_batch_end", 8),
        (HARD, "on_before_backward", 9),
        (HARD, "on_validation_batch_start", 2),
        (PLAIN, "on_train_epoch_end", 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_that_was_cut_ends_as_one_that_was_not(
    options: Options, hook: str, number: int, killed: bool, tmp_path: Path
) -> None:
    assert not train(tmp_path, options, (hook, number), killed).ended
    assert_same(train(tmp_path, options), options)


def test_validations_in_the_middle_of_an_epoch_are_neither_skipped_nor_repeated(tmp_path: Path) -> None:
    options = Options(trainer={"val_check_interval": 3}, every_n_steps=3)
    assert not train(tmp_path, options, ("on_train_batch_start", 11), True).ended
    assert not train(tmp_path, options, ("on_validation_batch_start", 1)).ended
    assert_same(train(tmp_path, options), options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_any_run_cut_anywhere_three_times(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    options = Options(
        accumulate=draw.choice([1, 2]),
        average=draw.choice(["", "ema", "swa"]),
        scheduler=draw.choice(["one_cycle", "plateau", "exponential"]),
        every_n_steps=draw.choice([None, 2]),
        patience=draw.choice([0, 1]),
        trainer=draw.choice(
            [
                {},
                {"val_check_interval": 3},
                {"check_val_every_n_epoch": 2},
                {"max_steps": 11},
                {"limit_train_batches": 5},
            ]
        ),
    )
    for _ in range(3):
        hook = draw.choice(list(HOOKS))
        if train(tmp_path, options, (hook, draw.randint(1, HOOKS[hook])), draw.random() < 0.5).ended:
            break
    assert_same(train(tmp_path, options), options)


def test_a_run_that_has_ended_has_nothing_left_to_do(tmp_path: Path) -> None:
    end = train(tmp_path, Options(epochs=4, patience=1))
    again = train(tmp_path, Options(epochs=4, patience=1))
    assert again.ended and again.rows == end.rows
    assert same(again.last, end.last)


def test_a_longer_run_goes_on_as_if_it_had_been_so_long_from_the_start(tmp_path: Path) -> None:
    train(tmp_path, Options(epochs=2, scheduler="exponential"))
    longer = train(tmp_path, Options(epochs=3, scheduler="exponential"), longer=True)
    assert longer.same_as(whole(Options(epochs=3, scheduler="exponential")))


def test_the_newest_checkpoints_are_kept_by_step_and_last_is_the_newest(tmp_path: Path) -> None:
    train(tmp_path, Options(keep=3, every_n_steps=4, every_n_epochs=None, optimizer=partial(SGD, lr=0.1)))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [
        "best.ckpt",
        "last.ckpt",
        *(f"step-{step:09d}.ckpt" for step in (12, 16, 18)),
    ]
    assert (tmp_path / "last.ckpt").samefile(tmp_path / f"step-{18:09d}.ckpt")
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_newest_checkpoint_costs_no_more_than_its_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not train(tmp_path, HARD, ("on_train_batch_start", 11)).ended
    with (tmp_path / "last.ckpt").open("r+b") as file:
        file.truncate(1000)
    end = train(tmp_path, HARD)
    assert "(last.ckpt) is damaged" in caplog.text and "using the one before" in caplog.text
    assert_same(end, HARD)


def test_when_only_the_best_checkpoint_is_left_the_run_goes_on_from_there(tmp_path: Path) -> None:
    assert not train(tmp_path, HARD, ("on_train_batch_start", 15)).ended
    for path in tmp_path.glob("*.ckpt"):
        if path.name != "best.ckpt":
            path.write_bytes(path.read_bytes()[:-100])
    assert_same(train(tmp_path, HARD), HARD)
