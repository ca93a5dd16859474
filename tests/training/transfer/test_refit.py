"""The delivered probe is fitted to all images, and no val image is scored by a regression that has seen it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from image_classifier.manifest import Manifest
from image_classifier.modeling.embeddings import EmbeddingStore
from image_classifier.training.transfer import refit as tested
from image_classifier.training.transfer.probe import Probe
from image_classifier.training.transfer.refit import ProbeRefit, refit_probe
from tests.training.transfer.small_inputs import small_inputs


def made(folder: Path, manifest: Manifest, features: np.ndarray) -> ProbeRefit | None:
    """The regression on these embeddings, float [N, D]."""
    store = EmbeddingStore(folder / "store")
    store.add(manifest.digests, features)
    probe = Probe(model=None, strength=1.0, tables={}, curve=None, store=store, seconds=0.0)  # type: ignore[arg-type]
    return refit_probe(probe, manifest, seed=0)


def test_no_val_image_is_scored_by_a_regression_that_has_seen_it_or_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = small_inputs(tmp_path).manifest
    # Each val image is in the group of a training image.
    groups = manifest.groups.copy()
    train, val = manifest.indices("train"), manifest.indices("val")
    groups[val] = groups[train[: len(val)]]
    manifest = replace(manifest, groups=groups)
    fitted: list[set[int]] = []
    scored: list[np.ndarray] = []
    fit, score = tested.fit_logistic, tested.logits_of
    monkeypatch.setattr(
        tested,
        "fit_logistic",
        lambda store, of, seed, rows, c: (fitted.append({*rows}), fit(store, of, seed, rows, c))[1],
    )
    monkeypatch.setattr(tested, "logits_of", lambda *a: (scored.append(a[3]), score(*a))[1])
    features = np.random.default_rng(0).normal(size=(len(manifest), 5)).astype(np.float32)
    found = made(tmp_path, manifest, features)
    assert found is not None and sorted(np.concatenate(scored).tolist()) == val.tolist()
    for rows, seen in zip(scored, fitted, strict=False):
        assert not {*groups[rows].tolist()} & {*groups[sorted(seen)].tolist()}
    assert fitted[-1] == {*train.tolist(), *val.tolist()}  # the delivered one
    assert np.isfinite(found.val_logits).all() and found.val_logits.any(axis=1).all()


def test_labels_without_a_pattern_are_not_known_by_heart(tmp_path: Path) -> None:
    manifest = small_inputs(tmp_path, num_train=150, num_val=60).manifest
    features = np.random.default_rng(0).normal(size=(len(manifest), 400)).astype(np.float32)
    found = made(tmp_path, manifest, features)
    assert found is not None
    val = manifest.indices("val")
    by_heart = found.model.logits(features[val]).argmax(axis=1) == manifest.targets[val]
    out_of_fold = found.val_logits.argmax(axis=1) == manifest.targets[val]
    assert by_heart.all() and out_of_fold.mean() < 0.6


def test_images_of_one_group_make_no_folds(tmp_path: Path) -> None:
    manifest = small_inputs(tmp_path).manifest
    manifest = replace(manifest, groups=np.zeros_like(manifest.groups))
    assert made(tmp_path, manifest, np.zeros((len(manifest), 2), np.float32)) is None
