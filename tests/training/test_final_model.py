"""Predictions from embeddings that are known already are those of the whole network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from image_classifier.evaluation.reliability.abstention import DecisionSettings
from image_classifier.inference.checkpoint import CheckpointBackend
from image_classifier.training.baseline import embeddings_of
from image_classifier.training.builders import build_datamodule
from image_classifier.training.calibrate import fit_detector
from image_classifier.training.final_model import predict_known, predict_split
from tests.training.transfer.small_inputs import small_inputs, small_module


@pytest.mark.parametrize("ood_rate", [0.0, 0.01])
def test_known_embeddings_give_the_tables_of_the_whole_network(ood_rate: float, tmp_path: Path) -> None:
    inputs = small_inputs(tmp_path)
    manifest, classifier, settings = (
        inputs.manifest,
        small_module(inputs).classifier.eval(),
        DecisionSettings(ood_rate=ood_rate),
    )
    known, backend = embeddings_of(inputs.network, classifier), CheckpointBackend(classifier)
    expected_detector = fit_detector(lambda: backend, manifest, inputs.cache, settings)
    expected = predict_split(backend, expected_detector, build_datamodule(inputs), manifest, "val")
    with pytest.MonkeyPatch.context() as patch:
        # Nothing goes through the network again.
        patch.setattr(type(classifier), "embed", None)
        detector = fit_detector(lambda: pytest.fail("a backend was made"), manifest, inputs.cache, settings, known)
        found = predict_known(classifier, known, detector, inputs.cache, manifest, "val")
    assert found.paths == expected.paths and np.array_equal(found.targets, expected.targets)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)
    if ood_rate:
        assert found.ood_scores is not None and expected.ood_scores is not None
        np.testing.assert_allclose(found.ood_scores, expected.ood_scores, atol=1e-2, rtol=1e-2)
    else:
        assert found.ood_scores is None and expected.ood_scores is None
