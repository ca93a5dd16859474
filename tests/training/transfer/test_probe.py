"""The regression in the last layer of the network is the regression."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from image_classifier.modeling.classifier import build_classifier, in_evaluation
from image_classifier.training.baseline import LinearModel
from image_classifier.training.transfer.probe import fit_probe, install
from tests.training.transfer.small_inputs import SIZE, small_backbone, small_inputs, small_module


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_classifier_with_it_gives_the_regressions_logits(classes: int, dropout: float) -> None:
    generator = np.random.default_rng(classes)
    mean, std, weights, bias = (
        generator.normal(size=shape).astype(np.float32) for shape in ((12,), (12,), (12, classes), (classes,))
    )
    model = LinearModel(mean, np.abs(std) + np.float32(0.01), weights, bias)
    classifier = build_classifier(small_backbone(), classes, SIZE, [0.5] * 3, [0.25] * 3, dropout)
    install(model, classifier)
    pixels = torch.randint(0, 256, (16, 3, SIZE, SIZE), dtype=torch.uint8)
    with in_evaluation(classifier), torch.no_grad():
        expected = model.logits(classifier.embed(pixels).numpy())
        torch.testing.assert_close(classifier(pixels), torch.from_numpy(expected), rtol=1e-4, atol=1e-3)


def test_its_predictions_of_val_are_those_of_the_network_it_is_written_into(tmp_path: Path) -> None:
    inputs = small_inputs(tmp_path, num_train=60, num_val=15)
    classifier = small_module(inputs).classifier
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    probe = fit_probe(inputs.network, classifier)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    install(probe.model, classifier)
    rows = inputs.manifest.indices("val")
    pixels = torch.from_numpy(inputs.cache.gather(rows)).permute(0, 3, 1, 2).contiguous()
    with in_evaluation(classifier), torch.no_grad():
        logits = classifier(pixels)
    torch.testing.assert_close(logits, torch.from_numpy(probe.tables["val"].logits), rtol=1e-3, atol=2e-3)
    changed = {name for name, value in classifier.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.1.weight", "head.1.bias"}
    assert probe.strength > 0 and probe.about.endswith("on 12 frozen features") and probe.seconds > 0
    assert probe.curve.points[-1][0] == 60 and set(probe.tables) == {"val"}
    assert probe.as_baseline().scores["val"]["accuracy"] > 0.9
