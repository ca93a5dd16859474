"""Embeddings are what the network says of each image, computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from image_classifier.errors import StorageError, TrainingError
from image_classifier.modeling import embeddings
from image_classifier.modeling.classifier import Classifier
from image_classifier.modeling.embeddings import EmbeddingStore, embed, fingerprint, known_embeddings

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
DIGESTS = np.random.default_rng(1).integers(0, 256, (40, 32), dtype=np.uint8)


def network(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    backbone = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return Classifier(backbone, nn.Linear(5, 2), [0.5] * 3, [0.25] * 3)


def gather(rows: np.ndarray) -> np.ndarray:
    return PIXELS[rows]


def whole(store: EmbeddingStore, digests: np.ndarray = DIGESTS) -> np.ndarray:
    found = np.full((len(digests), 5), np.nan, dtype=np.float32)
    for rows, part in store.parts(digests):
        assert np.isnan(found[rows]).all()  # each row once
        found[rows] = part
    return found


@pytest.mark.parametrize("batch", [1, 7, 40, 256])
@pytest.mark.parametrize("channels_last", [False, True])
def test_embeddings_are_those_of_the_network_in_use(
    batch: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "_MAX_BATCH", batch)
    model = network().train()
    rows = np.arange(39, -1, -1)
    found = np.concatenate(list(embed(model, rows, gather, channels_last=channels_last)))
    assert all(module.training for module in model.modules())  # as it was
    with torch.inference_mode():
        expected = model.eval().embed(torch.from_numpy(PIXELS[rows]).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_float32() -> None:
    exact, rounded = (
        np.concatenate(list(embed(network(), np.arange(40), gather, precision)))
        for precision in ("32-true", "bf16-mixed")
    )
    assert rounded.dtype == np.float32
    assert 0 < np.abs(exact - rounded).max() < 0.05


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = network()
    nn.init.constant_(model.backbone[0].bias, torch.inf)
    with pytest.raises(TrainingError, match="not finite"):
        list(embed(model, np.arange(3), gather))


@settings(max_examples=12, deadline=None)
@given(
    known=st.lists(st.integers(0, 39), max_size=30),
    asked=st.lists(st.integers(0, 39), min_size=1, max_size=30),
    part=st.sampled_from([1, 3, 100]),
)
def test_only_what_is_missing_is_computed(
    known: list[int], asked: list[int], part: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, folder = network(), tmp_path_factory.mktemp("store")
    computed: list[int] = []

    def counted(rows: np.ndarray) -> np.ndarray:
        return np.array([]) if len(rows) == 0 else PIXELS[rows]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "_IMAGES_PER_FILE", part)
        add = EmbeddingStore.add
        patch.setattr(
            EmbeddingStore,
            "add",
            lambda self, digests, rows: (computed.append(len(digests)), add(self, digests, rows))[1],
        )
        for rows in filter(None, (known, asked)):  # a content may come twice
            positions = np.array(rows)
            store = known_embeddings(
                lambda chosen, of=positions: embed(model, of[chosen], counted), DIGESTS[positions], folder
            )
            expected = np.concatenate(list(embed(model, positions, gather)))
            np.testing.assert_allclose(whole(store, DIGESTS[positions]), expected, rtol=1e-4, atol=1e-5)
    assert sum(computed) == len({*known, *asked})
    assert max(computed) <= part


def test_a_second_call_computes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = whole(known_embeddings(lambda rows: embed(network(), rows, gather), DIGESTS, tmp_path))
    with caplog.at_level("INFO"):
        again = known_embeddings(lambda _: pytest.fail("computed again"), DIGESTS, tmp_path)
    assert np.array_equal(whole(again), first)
    assert "40 of 40 images are in" in caplog.text


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    known_embeddings(lambda rows: embed(network(), rows, gather), DIGESTS, tmp_path)
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(StorageError, match=r"000000\.npz.*computed again"):
        EmbeddingStore(tmp_path).missing(DIGESTS)


def test_a_fingerprint_names_all_that_decides() -> None:
    first = fingerprint(network(), {"a": 1}, "32-true")
    assert first == fingerprint(network(), {"a": 1}, "32-true")
    other_norm = network()
    other_norm.scale *= 2
    statistics = network()
    statistics.backbone[1].running_mean += 1
    others = [
        fingerprint(network(), {"a": 2}, "32-true"),
        fingerprint(network(), {"a": 1}, "bf16-mixed"),
        fingerprint(network(1), {"a": 1}, "32-true"),
    ]
    others += [fingerprint(model, {"a": 1}, "32-true") for model in (other_norm, statistics)]
    assert len({first, *others}) == 6
    head = network()
    nn.init.zeros_(head.head.weight)
    assert fingerprint(head, {"a": 1}, "32-true") == first  # no part of an embedding
