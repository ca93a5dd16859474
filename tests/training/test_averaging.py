"""Averaged weights: what is averaged, that it is the average which is judged and kept, and that a stopped run goes on
to the last bit.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from image_classifier.errors import ConfigError
from image_classifier.training.callbacks.averaging import EMA, SWA
from image_classifier.training.module import ClassifierModule
from tests.training.small_fits import SaveAt, equal_states, fit, images, small_module

BOTH = [lambda: EMA(decay=0.9), lambda: SWA(start=0.5)]


class Watch(pl.Callback):
    """Copies of the learning weights after each step, and of those that each validation judged."""

    def __init__(self) -> None:
        self.learning: list[dict[str, torch.Tensor]] = []
        self.judged: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        self.learning.append(copy.deepcopy(pl_module.state_dict()))

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        self.judged.append(copy.deepcopy(pl_module.state_dict()))


def weighted(states: list[dict[str, torch.Tensor]], shares: list[float]) -> dict[str, torch.Tensor]:
    """The running average in float64; what is no fraction is the newest."""
    average = {name: value.double() if value.is_floating_point() else value for name, value in states[0].items()}
    for state, share in zip(states[1:], shares, strict=True):
        for name, value in state.items():
            average[name] = (
                average[name] + share * (value.double() - average[name]) if value.is_floating_point() else value
            )
    return average


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=0, atol=1e-6, msg=name)


def test_ema_is_the_moving_average_that_starts_warm_and_it_is_what_is_judged_and_left(tmp_path: Path) -> None:
    watch, module = Watch(), small_module()
    fit(module, tmp_path, [watch, EMA(decay=0.5)])
    shares = [1 - min(0.5, (1 + number) / (10 + number)) for number in range(1, 12)]
    for epoch, judged in enumerate(watch.judged):
        steps = 4 * (epoch + 1)
        assert_same(judged, weighted(watch.learning[:steps], shares[: steps - 1]))
    assert_same(module.state_dict(), watch.judged[-1])
    assert len(watch.judged) == 3


def test_the_decay_holds_in_the_long_run_and_the_first_weights_are_soon_forgotten() -> None:
    ema = EMA(decay=0.99)
    assert ema.weight_of_newest(10_000) == pytest.approx(0.01)
    kept = 1.0
    for number in range(1, 100):
        kept *= 1 - ema.weight_of_newest(number)
    assert kept < 1e-6


def test_swa_judges_the_learning_weights_before_it_starts_and_the_equal_average_after(tmp_path: Path) -> None:
    watch, module = Watch(), small_module(norm=False)
    fit(module, tmp_path, [watch, SWA(start=0.5)], max_epochs=4)
    assert_same(watch.judged[0], watch.learning[3])
    ends = [watch.learning[number] for number in (7, 11, 15)]
    assert_same(watch.judged[1], ends[0])
    assert_same(watch.judged[3], weighted(ends, [1 / 2, 1 / 3]))
    assert_same(module.state_dict(), watch.judged[3])


def test_swa_takes_norm_statistics_anew_from_the_training_images(tmp_path: Path) -> None:
    watch, module = Watch(), small_module()
    fit(module, tmp_path, [watch, SWA(start=0.5)], max_epochs=4)
    weights = weighted([watch.learning[number] for number in (7, 11, 15)], [1 / 2, 1 / 3])
    names = {name for name, _ in module.named_parameters()}
    assert_same(watch.judged[3], {name: value for name, value in weights.items() if name in names})
    found = []
    module.eval().classifier.backbone[0][0].register_forward_hook(
        lambda layer, inputs, output: found.append(output.detach())
    )
    module.classifier(images(48).tensors[0])
    norm = module.classifier.backbone[0][1]
    torch.testing.assert_close(norm.running_mean, found[0].mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(norm.running_var, found[0].var(dim=(0, 2, 3)), rtol=0.05, atol=1e-3)
    assert norm.momentum == 0.1


def test_norm_statistics_are_of_the_images_whatever_an_answer_is_averaged_over(tmp_path: Path) -> None:
    found = []
    for tta in ("none", "flip_shift"):
        module = small_module()
        module.classifier.tta = tta
        fit(module, tmp_path / tta, [SWA(start=0.5)], max_epochs=4)
        found.append({name: value for name, value in module.state_dict().items() if "running" in name})
    assert_same(*found)


def test_norms_that_are_frozen_keep_their_statistics(tmp_path: Path) -> None:
    module = small_module(
        frozen=frozenset(
            name for name, _ in small_module().classifier.named_parameters() if name.startswith("backbone")
        )
    )
    module.classifier.backbone.requires_grad_(False)
    before = copy.deepcopy(module.classifier.backbone.state_dict())
    fit(module, tmp_path, [SWA(start=0.5)], max_epochs=4)
    assert_same(module.classifier.backbone.state_dict(), before)


def test_the_averaged_network_answers_as_well_as_the_learning_one(tmp_path: Path) -> None:
    accuracies = []
    for callbacks in ([], [SWA(start=0.5)], [EMA()]):
        trainer = fit(small_module(), tmp_path, callbacks, max_epochs=8)
        accuracies.append(float(trainer.callback_metrics["val/accuracy"]))
    assert min(accuracies) > 0.9


def test_learning_itself_is_not_touched(tmp_path: Path) -> None:
    alone, beside = Watch(), Watch()
    fit(small_module(), tmp_path, [alone])
    fit(small_module(), tmp_path, [beside, EMA()])
    assert all(
        torch.equal(value, other[name])
        for one, other in zip(alone.learning, beside.learning, strict=True)
        for name, value in one.items()
    )


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(make: Any, epoch: int, tmp_path: Path) -> None:
    path, whole, resumed = tmp_path / "stopped.ckpt", small_module(), small_module()
    first, second = Watch(), Watch()
    fit(whole, tmp_path, [first, make(), SaveAt(path, epoch)], max_epochs=4)
    fit(resumed, tmp_path, [second, make()], max_epochs=4, ckpt_path=path)
    assert equal_states(whole, resumed)
    for one, other in zip(first.judged[epoch:], second.judged, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("make", BOTH)
def test_a_checkpoint_holds_the_average_to_use_and_the_learning_weights_to_go_on_from(
    make: Any, tmp_path: Path
) -> None:
    class SaveAfterValidation(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "best.ckpt")

    watch = Watch()
    fit(small_module(), tmp_path, [watch, SaveAfterValidation(), make()])
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert_same(saved["state_dict"], watch.judged[-1])
    assert_same(saved["current_model_state"], watch.learning[-1])


@pytest.mark.parametrize("first", [True, False], ids=["saved before", "saved after"])
def test_a_checkpoint_of_the_end_is_one_to_go_on_from_wherever_its_callback_stands(first: bool, tmp_path: Path) -> None:
    class SaveAtEnd(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    watch, callbacks = Watch(), [SaveAtEnd(), EMA()]
    fit(small_module(), tmp_path, [watch, *(callbacks if first else callbacks[::-1])])
    assert_same(torch.load(tmp_path / "last.ckpt", weights_only=True)["current_model_state"], watch.learning[-1])


def test_an_error_within_a_validation_leaves_the_learning_weights_to_be_saved(tmp_path: Path) -> None:
    class Broken(ClassifierModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("no more")

    class SaveOnException(pl.Callback):
        def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    module, watch = small_module(), Watch()
    module.__class__ = Broken
    with pytest.raises(RuntimeError, match="no more"):
        fit(module, tmp_path, [watch, EMA(decay=0.5), SaveOnException()])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_same(saved["current_model_state"], watch.learning[-1])
    assert not torch.equal(saved["state_dict"]["classifier.head.weight"], watch.learning[-1]["classifier.head.weight"])


def test_with_accumulated_gradients_the_average_moves_once_a_step(tmp_path: Path) -> None:
    ema = EMA(every_n_steps=2)
    fit(small_module(), tmp_path, [ema], accumulate_grad_batches=2, max_epochs=2)
    assert ema.num_averaged == 2


@pytest.mark.slow
def test_a_compiled_backbone_is_averaged_in_place(tmp_path: Path) -> None:
    class Compile(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.get_submodule("classifier.backbone").compile(backend="eager")

    watch, plain = Watch(), small_module()
    compiled = small_module()
    fit(plain, tmp_path, [EMA(decay=0.9)])
    fit(compiled, tmp_path, [watch, EMA(decay=0.9), Compile()])
    assert_same(compiled.state_dict(), plain.state_dict())


def test_swa_of_a_run_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a run of known length"):
        fit(small_module(), tmp_path, [SWA()], max_epochs=-1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EMA(decay=1.0),
        lambda: EMA(decay=0.0),
        lambda: EMA(every_n_steps=0),
        lambda: SWA(start=1.0),
        lambda: SWA(start=-0.1),
    ],
)
def test_impossible_settings_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.averaging"):
        make()
