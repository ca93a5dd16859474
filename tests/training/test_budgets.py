"""Epochs, steps, minutes and patience bound a run together; whichever ends it, its last step is validated and there
is a bundle.
"""

import csv
from pathlib import Path

import pytest

from tests.conftest import QUICK, Command, MakeTree

SMALL = (
    "data=folder",
    "data.dir=tree",
    "data.image_size=16",
    "data.batch_size=4",
    *QUICK,
    "model.backbone.channels=[4,8]",
    "name=run",
)


@pytest.fixture(autouse=True)
def in_a_folder_with_a_tree(tmp_path: Path, make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(cat=20, dog=20)  # 8 steps an epoch
    monkeypatch.chdir(tmp_path)


def rows() -> list[dict[str, str]]:
    with Path("runs/run/metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_steps_that_end_within_an_epoch_end_with_a_validation(command: Command) -> None:
    answer = command("train", *SMALL, "trainer.max_steps=11", "trainer.check_val_every_n_epoch=5")
    assert answer.code == 0, answer.err
    assert [(row["step"], bool(row["val/loss"])) for row in rows()] == [("8", False), ("11", True)]
    assert Path("models/run/bundle.json").is_file()


@pytest.mark.slow
def test_time_that_ends_within_an_epoch_ends_with_a_validation(command: Command) -> None:
    limits = (
        "trainer.max_time=00:00:00:01",
        "trainer.max_epochs=1000000",
        "trainer.check_val_every_n_epoch=1000",
        "scheduler=constant",
    )
    answer = command("train", *SMALL, *limits)
    assert answer.code == 0, answer.err
    assert rows()[-1]["val/loss"] and Path("models/run/bundle.json").is_file()


@pytest.mark.slow
def test_patience_counts_validations(command: Command) -> None:
    still = (
        "optimizer=sgd",
        "optimizer.lr=1e-12",
        "scheduler=constant",
        "trainer.check_val_every_n_epoch=2",
        "callbacks.early_stopping.patience=1",
    )
    answer = command("train", *SMALL, *still, "trainer.max_epochs=9")
    assert answer.code == 0, answer.err
    assert [bool(row["val/loss"]) for row in rows()] == [False, True, False, True]
