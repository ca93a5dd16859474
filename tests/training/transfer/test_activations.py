"""Kept activations are what the lower layers answer for each epoch's views, in the order of the sampler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from image_classifier.errors import ConfigError
from image_classifier.modeling.classifier import in_evaluation
from image_classifier.training.builders import TrainingInputs, build_datamodule
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.module import ClassifierModule
from image_classifier.training.transfer import activations as tested
from image_classifier.training.transfer.activations import (
    ActivationLoader,
    KeptActivations,
    keep_activations,
    remove_activations,
)
from image_classifier.training.transfer.split_network import split
from tests.training.transfer.small_inputs import small_inputs, small_module

CUT, VIEWS = "finetune.cut=_0_2", 3
Made = tuple[TrainingInputs, ClassifierModule, ImageDataModule]


def made(folder: Path, *overrides: str, num_train: int = 37) -> Made:
    inputs = small_inputs(folder, f"finetune.views={VIEWS}", *overrides, num_train=num_train)
    return inputs, small_module(inputs), build_datamodule(inputs)


@pytest.fixture
def parts(tmp_path: Path) -> Made:
    return made(tmp_path, CUT)


@pytest.fixture
def kept(parts: Made, tmp_path: Path) -> KeptActivations:
    found = keep_activations(*parts, tmp_path)
    assert found is not None and found.cut.name == "_0_2"
    return found


def lower_answers(parts: Made, kept: KeptActivations, pixels: torch.Tensor) -> torch.Tensor:
    """What the layers below the cut answer for pixels uint8 [n, 3, S, S]."""
    classifier = parts[1].classifier
    lower, _ = split(classifier.backbone, kept.cut)
    with in_evaluation(classifier), torch.no_grad():
        return lower(torch.addcmul(classifier.shift, pixels.float(), classifier.scale))


def test_without_augmentation_every_view_is_what_the_lower_layers_answer(tmp_path: Path) -> None:
    parts = made(tmp_path, CUT, "augment=none")
    kept = keep_activations(*parts, tmp_path)
    rows = parts[0].manifest.indices("train")
    assert kept is not None and kept.train.shape == (VIEWS, len(rows), kept.cut.numbers)
    expected = lower_answers(parts, kept, parts[2].batches[rows][0])
    for epoch in range(VIEWS):
        found = kept.of_train(rows, epoch)
        assert found.dtype == torch.bfloat16 and found.shape == (len(rows), *kept.cut.shape)
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-5)


def test_the_val_images_are_kept_as_they_are(parts: Made, kept: KeptActivations) -> None:
    rows = parts[0].manifest.indices("val")
    expected = lower_answers(parts, kept, parts[2].batches[rows][0])
    torch.testing.assert_close(kept.of_val(rows).float(), expected, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(kept.of_val(rows[[3, 1]]), kept.of_val(rows)[[3, 1]])
    loader = parts[2].val_dataloader()
    assert isinstance(loader, ActivationLoader)
    values, targets = (torch.cat(column) for column in zip(*loader, strict=True))
    assert torch.equal(values, kept.of_val(rows)) and targets.tolist() == parts[0].manifest.targets[rows].tolist()


def test_each_epoch_shows_the_next_view_and_then_the_first_again(parts: Made, kept: KeptActivations) -> None:
    rows = parts[0].manifest.indices("train")[[5, 0, 9]]
    views = [kept.of_train(rows, epoch) for epoch in range(2 * VIEWS)]
    assert all(torch.equal(views[epoch], views[epoch + VIEWS]) for epoch in range(VIEWS))
    assert all(not torch.equal(views[one], views[other]) for one in range(VIEWS) for other in range(one))


@pytest.mark.parametrize("num_train", [12, 32, 37])
def test_no_two_views_of_an_image_are_the_same(num_train: int, tmp_path: Path) -> None:
    parts = made(tmp_path, CUT, num_train=num_train)
    kept = keep_activations(*parts, tmp_path)
    assert kept is not None
    same = [(kept.train[one] == kept.train[other]).all(axis=1) for one in range(VIEWS) for other in range(one)]
    assert np.mean(same) < 0.1


def test_the_batches_are_those_of_the_sampler(parts: Made, kept: KeptActivations) -> None:
    loader = parts[2].train_dataloader()
    assert isinstance(loader, ActivationLoader)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        order = list(loader.sampler)
        batches = list(loader)
        assert len(batches) == len(order) == len(loader)
        for rows, (values, targets) in zip(order, batches, strict=True):
            assert torch.equal(values, kept.of_train(rows, epoch))
            assert targets.tolist() == parts[0].manifest.targets[rows].tolist()


def test_a_resumed_epoch_goes_on_with_the_next_batch(parts: Made, kept: KeptActivations) -> None:
    whole, resumed = parts[2].train_dataloader(), parts[2].train_dataloader()
    for loader in (whole, resumed):
        loader.sampler.set_epoch(4)
    resumed.load_state_dict({"first": 2})
    assert resumed.state_dict() == {"first": 2}
    expected, found = list(whole)[2:], list(resumed)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert len(list(resumed)) == len(resumed)  # the epoch after it is whole


def test_whole_activations_of_an_interrupted_run_are_read_and_others_computed_anew(
    parts: Made, kept: KeptActivations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = np.array(kept.train)

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(tested, "fast_function", refuse)
        again = keep_activations(*made(tmp_path, CUT), tmp_path)
        assert again is not None and np.array_equal(again.train, before)
        (tmp_path / "activations.json").unlink()
        with pytest.raises(AssertionError, match="computed again"):
            keep_activations(*made(tmp_path, CUT), tmp_path)
    again = keep_activations(*made(tmp_path, CUT), tmp_path)
    assert again is not None and np.array_equal(again.train, before)


def test_at_the_end_nothing_is_left(kept: KeptActivations, tmp_path: Path) -> None:
    assert {path.name for path in tmp_path.glob("activations*")} == {"activations.bf16", "activations.json"}
    remove_activations(tmp_path)
    remove_activations(tmp_path)
    assert not list(tmp_path.glob("activations*"))


@pytest.mark.parametrize("wanted", [CUT, "finetune.cut=null"])
def test_keeping_and_measuring_leave_the_weights_and_the_batch_statistics(tmp_path: Path, wanted: str) -> None:
    parts = made(tmp_path, wanted, "finetune.cost=100")
    module = parts[1].train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [one.training for one in module.modules()]
    assert keep_activations(*parts, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [one.training for one in module.modules()] == modes
    assert all(value.grad is None for value in module.parameters())


def test_layers_below_the_cut_are_frozen_and_the_logits_above_are_the_networks(
    parts: Made, kept: KeptActivations
) -> None:
    module = parts[1]
    frozen = {name for name, value in module.classifier.named_parameters() if not value.requires_grad}
    assert frozen == {f"backbone.{name}" for name in kept.cut.lower} == set(module.frozen)
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    values = lower_answers(parts, kept, pixels).bfloat16()
    with in_evaluation(module), torch.no_grad():
        torch.testing.assert_close(module._embed(values), module._embed(pixels), rtol=0.02, atol=0.02)
    module.train()
    module.training_step((values, torch.tensor([0, 1, 2, 0])), 0).backward()
    trained = {name for name, value in module.classifier.named_parameters() if value.grad is not None}
    assert trained == set(dict(module.classifier.named_parameters())) - frozen


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("augment=mix",), "compares or mixes views"),
        (("data.progressive_sizes=[8,16]",), "changes the size"),
        (("finetune.max_gb=0",), "is 0 GB; free some space, or raise the limit"),
    ],
)
def test_where_none_can_be_kept_the_log_says_why(
    overrides: tuple[str, ...], says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = made(tmp_path, *overrides)
    with caplog.at_level("INFO"):
        assert keep_activations(*parts, tmp_path) is None
    assert "activations: none are kept" in caplog.text and says in caplog.text
    assert not list(tmp_path.glob("activations*")) and not parts[1].frozen
    assert not isinstance(parts[2].train_dataloader(), ActivationLoader)


def test_none_are_kept_of_a_network_that_cannot_be_traced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Branching(nn.Module):
        def __init__(self, whole: nn.Module) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.whole(pixels if pixels.mean() > 0 else -pixels)

    inputs, module, datamodule = made(tmp_path)
    module.classifier.backbone = Branching(module.classifier.backbone)
    with caplog.at_level("INFO"):
        assert keep_activations(inputs, module, datamodule, tmp_path) is None
    assert "cannot trace the network" in caplog.text


def test_the_chosen_cut_is_the_lowest_that_is_cheap_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget for everything the lowest of the measured ones, with one for nothing the highest."""
    names = []
    for cost in (1e6, 1e-6):
        inputs, module, datamodule = made(tmp_path)
        finetune = replace(inputs.config.finetune, cost=cost, cut=None)
        inputs = replace(inputs, config=replace(inputs.config, finetune=finetune))
        kept = keep_activations(inputs, module, datamodule, tmp_path)
        assert kept is not None
        names.append(kept.cut)
        remove_activations(tmp_path)
    assert len(names[0].lower) < len(names[1].lower)


def test_a_cut_that_would_fill_the_disk_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    parts = made(tmp_path, CUT, "finetune.max_gb=1e-6")
    with pytest.raises(ConfigError, match=r"finetune.cut=_0_2 need .* GB, and finetune.max_gb is 1e-06"):
        keep_activations(*parts, tmp_path)
    assert not list(tmp_path.glob("activations*"))
