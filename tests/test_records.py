from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.errors import DataError
from image_classifier.records import SPLITS, Manifest, Prediction, PredictionTable, Record, softmax

# Any name a file system can give: spaces, quotes, newlines, and bytes that are not UTF-8 (lone surrogates \udc80..\udcff).
NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\r") | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF, categories=["Cs"]), min_size=1
)
RECORDS = st.builds(Record, NAMES, NAMES, st.sampled_from(SPLITS), NAMES, NAMES, st.integers(1, 10**6), st.integers(1, 10**6))


@given(st.lists(RECORDS, max_size=5))
def test_a_manifest_reads_back_equal(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("manifest") / "manifest.csv"
    manifest = Manifest(Path("root"), tuple(records))
    manifest.write(path)
    twin = Manifest.read(path, Path("root"))
    assert twin == manifest
    assert twin.sha256 == manifest.sha256


def test_the_columns_are_the_stable_ones():
    assert Manifest(Path(), ()).to_csv() == "path,label,split,group,sha256,width,height\n"


def test_classes_are_sorted_and_targets_count_them():
    records = tuple(Record(f"{label}/1.png", label, "train", "g", "s", 1, 1) for label in ("dog", "Zebra", "cat"))
    manifest = Manifest(Path(), records)
    assert manifest.classes == ("Zebra", "cat", "dog")
    assert manifest.targets.tolist() == [2, 0, 1]
    assert manifest.indices("train").tolist() == [0, 1, 2]
    assert manifest.indices("val").shape == (0,)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("path,label\na,b\n", "no column"),
        ("", "no column"),
        ("path,label,split,group,sha256,width,height\na,b,train,g,s,wide,2\n", "line 2"),
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
    assert list(answer) == ["path", "predicted_class", "confidence", "all_predictions"]
    assert json.dumps(answer["all_predictions"]) == '{"dog": 0.7, "cat": 0.3}'
    assert Prediction("a.jpg", "dog", 0.7, {"cat": 0.3, "dog": 0.7}).answer(top_k=1)["all_predictions"] == {"dog": 0.7}
    assert Prediction("a.jpg", error="cut short").answer() == {"path": "a.jpg", "error": "cut short"}


def test_predictions_are_written_with_their_logits(tmp_path):
    table = PredictionTable(("a.png", "b.png"), np.array([0, 1]), np.array([[2.0, 0.0], [3.0, 1.0]], np.float32), ("cat", "dog"))
    table.write(tmp_path)
    assert (tmp_path / "predictions.csv").read_text().splitlines()[2] == "b.png,dog,cat,0.880797"
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), table.logits)


def test_softmax_survives_large_logits():
    np.testing.assert_allclose(softmax(np.array([[1e4, 1e4, -1e4]])), [[0.5, 0.5, 0.0]])
