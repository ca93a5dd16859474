"""Freezing: what is frozen does not move, neither weights nor statistics; layers join from the head down, exactly
after a resume too.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from image_classifier.errors import ConfigError
from image_classifier.training.callbacks.averaging import EMA
from image_classifier.training.callbacks.unfreeze import Unfreeze
from image_classifier.training.module import ClassifierModule
from image_classifier.training.optimizers.freezing import describe, freeze
from image_classifier.training.optimizers.schedules import SchedulerSettings
from tests.conftest import QUICK, Command
from tests.training.small_fits import SaveAt, equal_states, fit, small_module


def frozen_module(wanted: Any, **arguments: Any) -> ClassifierModule:
    module = small_module(**arguments)
    module.frozen = freeze(module.classifier, wanted)
    return module


def moved(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def test_a_linear_probe_moves_the_head_alone_and_not_the_norms_statistics(tmp_path: Path) -> None:
    module = frozen_module("backbone")
    before = copy.deepcopy(module.classifier.state_dict())
    fit(module, tmp_path)
    assert moved(before, module.classifier) == {"head.weight", "head.bias"}
    assert not module.classifier.backbone.training


def test_a_frozen_backbone_records_nothing_to_differentiate() -> None:
    module = frozen_module("backbone")
    embeddings = module.classifier.embed(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert not embeddings.requires_grad
    assert embeddings.grad_fn is None


def test_prefixes_freeze_what_is_below_them_and_the_rest_goes_on_learning(tmp_path: Path) -> None:
    module = frozen_module(["0", "backbone.1.0"])
    before = copy.deepcopy(module.classifier.state_dict())
    fit(module, tmp_path)
    still = {name for name in before if name.startswith(("backbone.0.", "backbone.1.0"))} | {"scale", "shift"}
    assert moved(before, module.classifier) == set(before) - still


def test_a_prefix_is_whole_between_dots() -> None:
    classifier = nn.ModuleDict(
        {"backbone": nn.Sequential(*(nn.Linear(2, 2) for _ in range(12))), "head": nn.Linear(2, 2)}
    )
    assert freeze(classifier, ["1"]) == {"backbone.1.weight", "backbone.1.bias"}


def test_an_unknown_prefix_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="starts with 'bakbone'") as refused:
        freeze(small_module().classifier, "bakbone")
    assert "did you mean backbone?" in refused.value.hint


def test_the_log_says_how_many_parameters_learn() -> None:
    module = frozen_module("backbone")
    head = 8 * 3 + 3
    total = sum(parameter.numel() for parameter in module.classifier.parameters())
    assert describe(module.classifier, module.frozen).startswith(f"{total:,} parameters, {head} trained (")
    assert describe(small_module().classifier, ()) == f"{total:,} parameters, all trained"


class Watch(pl.Callback):
    """Which parameters each epoch moved, and which norms were in training mode in it."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.norms: list[list[bool]] = []
        self._before: dict[str, torch.Tensor] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self._before = copy.deepcopy(dict(pl_module.get_submodule("classifier").named_parameters()))
            self.norms.append([one.training for one in pl_module.modules() if isinstance(one, nn.BatchNorm2d)])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = dict(pl_module.get_submodule("classifier").named_parameters())
        self.moved.append(
            {
                name.rpartition(".")[0].rpartition(".")[0] or "head"
                for name, value in now.items()
                if not torch.equal(value, self._before[name])
            }
        )


def test_layers_join_from_the_head_down_with_their_norms(tmp_path: Path) -> None:
    watch = Watch()
    fit(small_module(), tmp_path, [Unfreeze(every_n_epochs=2), watch], max_epochs=8)
    blocks = ["head", "backbone.2", "backbone.1", "backbone.0"]
    assert watch.moved == [set(blocks[: 1 + epoch // 2]) for epoch in range(8)]
    assert watch.norms == [[number >= 3 - epoch // 2 for number in range(3)] for epoch in range(8)]


def test_what_model_freeze_names_never_joins(tmp_path: Path) -> None:
    watch = Watch()
    fit(frozen_module(["1"]), tmp_path, [Unfreeze(every_n_epochs=1), watch], max_epochs=4)
    assert watch.moved == [
        {"head"},
        {"head", "backbone.2"},
        {"head", "backbone.2", "backbone.0"},
        {"head", "backbone.2", "backbone.0"},
    ]


def test_without_a_number_of_epochs_nothing_is_frozen(tmp_path: Path) -> None:
    modules = [small_module(), small_module()]
    fit(modules[0], tmp_path)
    fit(modules[1], tmp_path, [Unfreeze()])
    assert equal_states(*modules)


@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(epoch: int, averaging: bool, tmp_path: Path) -> None:
    settings = SchedulerSettings(partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.002), "step", "total_steps")
    modules = [small_module(partial(torch.optim.AdamW, lr=0.002), settings, layer_decay=0.9) for _ in range(2)]
    callbacks = [[Unfreeze(every_n_epochs=1), *([EMA()] if averaging else [])] for _ in range(2)]
    fit(modules[0], tmp_path, [*callbacks[0], SaveAt(tmp_path / "stopped.ckpt", epoch)], max_epochs=4)
    fit(modules[1], tmp_path, callbacks[1], max_epochs=4, ckpt_path=tmp_path / "stopped.ckpt")
    assert equal_states(*modules)


@pytest.mark.parametrize("arguments", [{"every_n_epochs": 0}, {"layers_at_once": 0}])
def test_impossible_numbers_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.unfreeze"):
        Unfreeze(**arguments)


LINE = ("train", "trainer.max_epochs=1", "+trainer.limit_train_batches=2", *QUICK, "name=probe")


@pytest.mark.slow
def test_a_linear_probe_from_the_command_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(*LINE, "model.freeze=backbone")
    assert done.code == 0, done.err
    assert "frozen by model.freeze" in done.err


@pytest.mark.slow
def test_a_prefix_that_no_parameter_has_is_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = command(*LINE, "model.freeze=[blocks]")
    assert refused.code == 2
    assert "no parameter of the network starts with 'blocks'" in refused.err
    assert "Traceback" not in refused.err
