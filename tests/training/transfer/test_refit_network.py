"""The delivered network is trained on with the val images too: from kept activations or pixels, and each time alike."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from image_classifier.training.builders import build_datamodule
from image_classifier.training.datamodule import Batch
from image_classifier.training.module import ClassifierModule
from image_classifier.training.transfer.activations import keep_activations, remove_activations
from image_classifier.training.transfer.candidates import (
    PROBE,
    Candidate,
    CandidateChoice,
    interpolated,
    start_from_probe,
)
from image_classifier.training.transfer.probe import install
from image_classifier.training.transfer.refit import refit, refit_probe
from image_classifier.training.transfer.refit_network import refit_network
from tests.training.transfer.small_inputs import small_inputs, small_module

CUT, VIEWS = "finetune.cut=_0_2", 3


@pytest.mark.parametrize("keeps", [True, False])
def test_only_trained_layers_move_and_the_same_way_each_time(keeps: bool, tmp_path: Path) -> None:
    inputs = small_inputs(tmp_path, f"finetune.views={VIEWS}", CUT, "trainer.accelerator=cpu")
    module = small_module(inputs)
    kept = keep_activations(inputs, module, build_datamodule(inputs), tmp_path) if keeps else None
    before = copy.deepcopy(module.classifier.state_dict())
    found = []
    for _ in range(2):
        module.classifier.load_state_dict(before)
        assert refit_network(module, inputs, kept, 3, tmp_path) == 2
        assert not module.classifier.training
        found.append(copy.deepcopy(module.classifier.state_dict()))
    parameters = [name for name, _ in module.classifier.named_parameters()]
    moved = {name for name in parameters if not torch.equal(found[0][name], before[name])}
    trained = {name for name, _ in module.named_parameters()} - {f"classifier.{name}" for name in module.frozen}
    assert {f"classifier.{name}" for name in moved} <= trained and len(moved) >= 4
    assert any("backbone.0." in name for name in moved) != keeps
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    remove_activations(tmp_path)
    assert not list(tmp_path.glob("activations*"))


def test_an_epoch_has_the_images_of_both_splits_with_the_activations_of_their_own_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = small_inputs(tmp_path, f"finetune.views={VIEWS}", CUT, "augment=none", "data.batch_size=7")
    module, datamodule = small_module(inputs), build_datamodule(inputs)
    kept = keep_activations(inputs, module, datamodule, tmp_path)
    assert kept is not None
    seen: list[Batch] = []
    step = ClassifierModule.training_step
    monkeypatch.setattr(
        ClassifierModule, "training_step", lambda self, batch, idx: (seen.append(batch), step(self, batch, idx))[1]
    )
    assert refit_network(module, inputs, kept, 2, tmp_path) == 1
    values, targets = (torch.cat(column) for column in zip(*seen, strict=True))
    manifest = inputs.manifest
    assert len(manifest) == len(values) == 49  # 37 of train and 12 of val, in 7 batches of 7
    rows = np.concatenate([manifest.indices("train"), manifest.indices("val")])
    expected = torch.cat([kept.of_train(manifest.indices("train"), 0), kept.of_val(manifest.indices("val"))])

    def in_order(table: torch.Tensor, labels: np.ndarray) -> list[tuple[float, ...]]:
        return sorted(
            (float(label), *row) for row, label in zip(table.float().flatten(1).tolist(), labels, strict=True)
        )

    assert in_order(values, targets.numpy()) == in_order(expected, manifest.targets[rows])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_weights_are_interpolated_at_the_chosen_share_with_a_new_probe(share: float, tmp_path: Path) -> None:
    inputs = small_inputs(tmp_path, "finetune.views=null", "trainer.accelerator=cpu")
    module = small_module(inputs)
    classifier = module.classifier
    start = start_from_probe(inputs, classifier)
    start.trained = {name: value + 0.01 * (value.dtype == torch.float32) for name, value in start.weights.items()}
    val = start.fitted.tables["val"]
    chosen = Candidate(PROBE if share == 0 else "fine-tuned", "", 1.0, val, share)
    found = refit(start, CandidateChoice((chosen,), chosen), module, classifier, inputs, None, 2, tmp_path)
    delivered = copy.deepcopy(classifier.state_dict())

    probe = refit_probe(start.fitted, inputs.manifest, inputs.config.run.seed)
    assert probe is not None and found is not None
    classifier.load_state_dict(start.trained)
    if share:
        refit_network(module, inputs, None, 2, tmp_path)
    end = copy.deepcopy(classifier.state_dict())
    classifier.load_state_dict(start.weights)
    install(probe.model, classifier)
    expected = interpolated(classifier.state_dict(), end, share)
    assert all(torch.allclose(delivered[name], value) for name, value in expected.items())
    # Scores on val are of models that had not seen it.
    assert (found.folds, found.epochs) == ((5, 0) if share == 0 else (0, 1))
    assert np.array_equal(found.val_logits, val.logits if share else probe.val_logits)


@pytest.mark.parametrize("ruin", [float("nan"), 5.0])
def test_a_second_fit_that_ruins_the_network_is_not_delivered(
    ruin: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = small_inputs(tmp_path, "finetune.views=null", "trainer.accelerator=cpu")
    module = small_module(inputs)
    start = start_from_probe(inputs, module.classifier)
    start.trained = start.weights
    chosen = Candidate("fine-tuned", "", 1.0, start.fitted.tables["val"], 1.0)
    assert chosen.accuracy > 0.5

    def ruined(module: ClassifierModule, *_: object) -> int:
        with torch.no_grad():
            module.classifier.head[-1].bias[0] += ruin * 1000  # one class for all images
        return 1

    monkeypatch.setattr("image_classifier.training.transfer.refit.refit_network", ruined)
    choice = CandidateChoice((chosen,), chosen)
    assert refit(start, choice, module, module.classifier, inputs, None, 2, tmp_path) is None
    assert "worse on val" in caplog.text
    assert all(torch.equal(value, start.weights[name]) for name, value in module.classifier.state_dict().items())
