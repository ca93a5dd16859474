"""A loss or gradient that is not a finite number never reaches a checkpoint: it stops the run, saying how to find out
why, or is skipped.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.optim import SGD

from image_classifier.errors import ConfigError, TrainingError
from image_classifier.training.callbacks.nan_guard import NanGuard
from tests.conftest import QUICK, Command, MakeTree
from tests.training.short_runs import Options, same, train, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*LeafSpec.*:FutureWarning")
STEADY = Options(optimizer=partial(SGD, lr=0.01, momentum=0.9), scheduler="exponential", average="ema")


class Spoil(Callback):
    """Makes the loss, or only the gradients, of some steps not a number, as a picture with an impossible pixel
    would.
    """

    def __init__(self, *steps: int, gradients: bool = False) -> None:
        self.steps, self.gradients = steps, gradients
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        if not self.gradients and len(self.seen) in self.steps:
            with torch.no_grad():
                pl_module.classifier.scale.fill_(math.nan)  # a buffer: comes back only if buffers do

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.gradients and len(self.seen) in self.steps:
            next(pl_module.parameters()).grad[0] = math.inf


@pytest.mark.parametrize("gradients", [False, True], ids=["loss", "gradients"])
def test_a_skipped_step_changes_nothing(gradients: bool, tmp_path: Path) -> None:
    spoil = Spoil(5, gradients=gradients)
    end = train(tmp_path, Options(**(vars(STEADY) | {"on_nan": "skip"})), None, False, spoil)
    assert end.ended and same(spoil.seen[4], spoil.seen[5]) and not same(spoil.seen[3], spoil.seen[4])
    assert all(torch.isfinite(value).all() for value in end.last.values())
    assert all(math.isfinite(value) for row in end.rows for value in row.values())
    clean = train(tmp_path / "clean", STEADY)
    assert clean.rows[0]["train/loss"] != end.rows[0]["train/loss"]


def test_without_anything_bad_skip_is_stop(tmp_path: Path) -> None:
    stop, skip = (train(tmp_path / name, Options(**(vars(STEADY) | {"on_nan": name}))) for name in ("stop", "skip"))
    assert stop.same_as(skip)


def test_the_average_passes_over_a_skipped_step(tmp_path: Path) -> None:
    options = Options(**(vars(STEADY) | {"on_nan": "skip", "epochs": 1, "trainer": {"max_steps": 5}}))
    train(tmp_path / "a", options, None, False, Spoil(5))
    train(tmp_path / "b", Options(**(vars(options) | {"trainer": {"max_steps": 4}})), None, False, Spoil())
    one, other = (weights(tmp_path / name / "last.ckpt") for name in ("a", "b"))
    assert same(one, other)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ten_bad_steps_in_a_row_end_the_run(accumulate: int, tmp_path: Path) -> None:
    options = Options(**(vars(STEADY) | {"on_nan": "skip", "accumulate": accumulate, "epochs": 9}))
    with pytest.raises(TrainingError, match="10 steps in a row were skipped, and the loss became nan"):
        train(tmp_path, options, None, False, Spoil(*range(3, 99)))
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "last.ckpt").values())


def test_a_bad_loss_stops_the_run_and_names_step_rate_images_and_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        train(tmp_path, STEADY, None, False, Spoil(9))
    text = str(caught.value)
    assert "the loss became nan at epoch 2, step 9, learning rate 0.007" in text
    assert f"the last good checkpoint is {tmp_path}/step-000000006.ckpt" in text
    (listed,) = tmp_path.glob("bad_batch_*.txt")
    paths = listed.read_text().splitlines()
    assert len(paths) == 4 and all(path.endswith(".png") for path in paths) and paths[0] in text and str(listed) in text
    assert weights(tmp_path / "last.ckpt") and not (tmp_path / "step-000000008.ckpt").exists()


def test_bad_gradients_stop_the_run_one_step_later_and_name_their_own_batch(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"the loss became nan from the gradients of the step before at epoch 2, step 9"
    ) as caught:
        train(tmp_path / "gradients", STEADY, None, False, Spoil(8, gradients=True))
    with pytest.raises(TrainingError):
        train(tmp_path / "loss", STEADY, None, False, Spoil(8))
    (one,), (other,) = (list((tmp_path / name).glob("bad_batch_*.txt")) for name in ("gradients", "loss"))
    assert one.read_text() == other.read_text()
    assert "step-000000006" in str(caught.value)


def test_bad_gradients_in_the_last_step_of_an_epoch_reach_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match="the weights of the network became infinite or not a number at epoch 2, step 12"
    ):
        train(tmp_path, STEADY, None, False, Spoil(12, gradients=True))
    for path in tmp_path.glob("*.ckpt"):
        assert all(torch.isfinite(value).all() for value in weights(path).values())


def test_what_to_do_is_one_of_two(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use stop or skip"):
        NanGuard("ignore", tmp_path)


def test_on_the_command_line_it_is_one_line_and_the_list_of_images_stays(
    command: Command, make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(cat=10, dog=10)
    monkeypatch.chdir(tmp_path)
    line = (
        "train",
        "data=folder",
        "data.dir=tree",
        "data.image_size=16",
        "data.batch_size=4",
        *QUICK,
        "model.backbone.channels=[4,8]",
    )
    answer = command(*line, "trainer.on_nan=never")
    assert answer.code == 2 and "trainer.on_nan=never" in answer.err.splitlines()[-1] and not Path("data").exists()
    answer = command(*line, "optimizer=sgd", "optimizer.lr=1e38", "scheduler=constant", "name=hot")
    last = answer.err.splitlines()[-1]
    assert answer.code == 2 and last.startswith("error: the loss became") and "no checkpoint was written yet" in last
    assert len(next(Path("runs/hot").glob("bad_batch_*.txt")).read_text().splitlines()) == 4
