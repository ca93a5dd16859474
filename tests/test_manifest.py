from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.errors import DataError
from image_classifier.manifest import SPLITS, Manifest, Record
from image_classifier.predictions import Prediction, PredictionTable, softmax

# Any file name: spaces, quotes, newlines, and bytes that are not UTF-8 (lone surrogates \udc80..\udcff).
NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0")
    | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF, categories=["Cs"]),
    min_size=1,
)
GROUPS = st.integers(0, 2**64 - 1).map("{:016x}".format)
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
SIZES = st.integers(1, 10**6)
RECORDS = st.builds(Record, NAMES, NAMES, st.sampled_from(SPLITS), GROUPS, DIGESTS, SIZES, SIZES)


def record(path: str, label: str = "cat", split: str = "train", group: int = 0) -> Record:
    return Record(path, label, split, f"{group:016x}", "0" * 64, 1, 1)


@given(st.lists(RECORDS, max_size=5))
def test_a_manifest_reads_back_equal(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("manifest") / "manifest.csv"
    manifest = Manifest.of(Path("root"), records)
    manifest.write(path)
    twin = Manifest.read(path, Path("root"))
    assert twin == manifest
    assert twin.sha256 == manifest.sha256
    assert list(twin) == list(manifest) == [twin[row] for row in range(len(twin))] == records
    assert path.read_bytes() == manifest.to_csv().encode("utf-8", "surrogateescape")


@given(st.lists(RECORDS, max_size=8), st.data())
def test_taking_rows_is_taking_records(records, data):
    manifest = Manifest.of(Path("root"), records)
    rows = data.draw(st.lists(st.sampled_from(range(len(records))))) if records else []
    assert list(manifest.take(np.array(rows, dtype=np.int64))) == [records[row] for row in rows]
    assert [manifest.part(split).classes for split in SPLITS] == [
        tuple(sorted({r.label for r in records if r.split == split})) for split in SPLITS
    ]


def test_records_whose_group_is_in_train_have_leaked():
    groups = [("train", 1), ("test", 1), ("test", 2), ("val", 2), ("test", 1)]
    manifest = Manifest.of(
        Path(), [record(str(row), split=split, group=group) for row, (split, group) in enumerate(groups)]
    )
    assert manifest.leaked("test").tolist() == [True, False, True]
    assert manifest.leaked("val").tolist() == [False]


@pytest.mark.slow
def test_a_million_rows_take_little_memory():
    rows = 20_000
    tracemalloc.start()
    manifest = Manifest.of(Path(), (record(f"train/some_class/{row:08d}.jpg") for row in range(rows)))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(manifest) == rows
    assert held < 150 * rows
    assert peak < 400 * rows


def test_the_columns_are_the_stable_ones():
    assert Manifest.of(Path(), ()).to_csv() == "path,label,split,group,sha256,width,height\n"


def test_classes_are_sorted_and_targets_count_them():
    manifest = Manifest.of(Path(), [record(f"{label}/1.png", label) for label in ("dog", "Zebra", "cat")])
    assert manifest.classes == ("Zebra", "cat", "dog")
    assert manifest.targets.tolist() == [2, 0, 1]
    assert manifest.indices("train").tolist() == [0, 1, 2]
    assert manifest.indices("val").shape == (0,)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("path,label\na,b\n", "no column"),
        ("", "no column"),
        (f"path,label,split,group,sha256,width,height\na,b,train,{'0' * 16},{'0' * 64},wide,2\n", "line 2"),
        ("path,label,split,group,sha256,width,height\na,b,valid,g,s,1,2\n", "'valid'"),
        ("path,label,split,group,sha256,width,height\na,b,train\n", "line 2"),
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path, text, word):
    (tmp_path / "manifest.csv").write_text(text)
    with pytest.raises(DataError, match=word):
        Manifest.read(tmp_path / "manifest.csv", tmp_path)


def test_a_missing_manifest_is_one_line(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        Manifest.read(tmp_path / "manifest.csv", tmp_path)


def test_an_answer_has_the_stable_keys_most_probable_first():
    answer = Prediction("a.jpg", "dog", 0.7, {"cat": 0.3, "dog": 0.7}).answer()
    assert list(answer) == [
        "path",
        "predicted_class",
        "confidence",
        "all_predictions",
        "decision",
        "reason",
        "prediction_set",
    ]
    assert (answer["decision"], answer["reason"], answer["prediction_set"]) == ("label", "", None)
    assert json.dumps(answer["all_predictions"]) == '{"dog": 0.7, "cat": 0.3}'
    assert Prediction("a.jpg", "dog", 0.7, {"cat": 0.3, "dog": 0.7}).answer(top_k=1)["all_predictions"] == {"dog": 0.7}
    assert Prediction("a.jpg", error="cut short").answer() == {"path": "a.jpg", "error": "cut short"}


def test_predictions_are_written_with_their_logits(tmp_path):
    table = PredictionTable(
        ("a.png", "b.png"), np.array([0, 1]), np.array([[2.0, 0.0], [3.0, 1.0]], np.float32), ("cat", "dog")
    )
    table.write(tmp_path)
    assert (tmp_path / "predictions.csv").read_text().splitlines()[2] == "b.png,dog,cat,0.880797"
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), table.logits)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_large_table_is_written_by_pieces(tmp_path, mapped):
    logits = np.random.default_rng(0).normal(size=(30_000, 100)).astype(np.float32)
    if mapped:
        np.save(tmp_path / "given.npy", logits)
        logits = np.load(tmp_path / "given.npy", mmap_mode="r")
    targets = np.arange(30_000) % 100
    table = PredictionTable(("a",) * 30_000, targets, logits, tuple(map(str, range(100))))
    tracemalloc.start()
    try:
        table.write(tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < logits.nbytes  # 12 MB; all probabilities alone would be 24
    np.testing.assert_array_equal(np.load(tmp_path / "out/logits.npy"), logits)
    predicted, confidence = table.answers()
    np.testing.assert_array_equal(predicted, table.probabilities.argmax(axis=1))
    np.testing.assert_array_equal(confidence, table.probabilities.max(axis=1))
    lines = (tmp_path / "out/predictions.csv").read_text().splitlines()
    assert len(lines) == 30_001 and lines[-1] == f"a,99,{predicted[-1]},{confidence[-1]:.6f}"


def test_softmax_survives_large_logits():
    np.testing.assert_allclose(softmax(np.array([[1e4, 1e4, -1e4]])), [[0.5, 0.5, 0.0]])


def test_predictions_are_read_back_as_they_were(tmp_path):
    logits = np.array([[2.0, 0.5], [3.0, 1.0], [-1.0, 0.25]], np.float32)
    names, scores = ("a,b.png", 'c"d\r.png', "\udcff.png"), np.array([0.1, 3.25, -1.0], np.float32)
    table = PredictionTable(names, np.array([0, 1, 1]), logits, ("cat", "собака\udcff"), 1.75, scores)
    table.write(tmp_path)
    again = PredictionTable.read(tmp_path)
    assert (again.paths, again.classes, again.temperature) == (table.paths, table.classes, 1.75)
    np.testing.assert_array_equal(again.logits, logits)
    np.testing.assert_array_equal(again.targets, table.targets)
    np.testing.assert_array_equal(again.ood_scores, scores)
    np.testing.assert_allclose(again.probabilities, softmax(logits / 1.75), rtol=1e-6)


@pytest.mark.parametrize("name", ["predictions.csv", "logits.npy", "predictions.json"])
@pytest.mark.parametrize("damage", [None, b"", b"{}", b"path,label\n"])
def test_half_a_prediction_table_is_one_line(tmp_path, name, damage):
    PredictionTable(("a.png",), np.array([1]), np.array([[2.0, 0.5]], np.float32), ("cat", "dog")).write(tmp_path)
    (tmp_path / name).unlink() if damage is None else (tmp_path / name).write_bytes(damage)
    with pytest.raises(DataError, match="is missing or damaged"):
        PredictionTable.read(tmp_path)


def test_logits_of_another_table_are_noticed(tmp_path):
    PredictionTable(("a.png",), np.array([1]), np.array([[2.0, 0.5]], np.float32), ("cat", "dog")).write(tmp_path)
    np.save(tmp_path / "logits.npy", np.array([[0.5, 2.0]], np.float32))
    with pytest.raises(DataError, match="predictions.csv differ"):
        PredictionTable.read(tmp_path)
