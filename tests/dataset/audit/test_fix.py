"""fix.csv: its rows correct labels and exclude images, a person's text stays, and a deleted row has no effect."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from image_classifier.dataset.audit.fix import Correction, Fix, Fixes, read_fixes
from image_classifier.dataset.audit.issues import AuditSettings
from image_classifier.dataset.discovery import FileTree, ImageFile
from image_classifier.dataset.excluded_records import excluded_records_path, split_excluded, with_excluded
from image_classifier.dataset.prepare import DatasetScan, all_folds, manifest_path
from image_classifier.dataset.prepare import prepare as prepare_and_examine
from image_classifier.dataset.settings import DataSettings
from image_classifier.dataset.split import SplitSettings, assign_splits
from image_classifier.errors import DataError
from image_classifier.manifest import Manifest
from tests.conftest import write_image
from tests.dataset.manifests import SETTINGS, SIZES, UNTIMED, deal, joined, manifest_of

HEADER = "path,label,action,new_label,reason\n"
NAMES = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.sampled_from("\udc80\udcff,\"';#*?[\r\n "),
    min_size=1,
    max_size=8,
).filter(lambda name: not name.startswith("./"))
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
PROPOSALS = st.dictionaries(NAMES, st.tuples(TEXTS, TEXTS.map(str.strip), TEXTS), max_size=5)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)


def tree_of(**labels: str) -> FileTree:
    return FileTree(
        Path("root"), tuple(ImageFile(f"{name}.png", label, "", 1, 0) for name, label in sorted(labels.items()))
    )


def fixes(*rows: str) -> Fixes:
    Path("fix.csv").write_text(HEADER + "".join(f"{row}\n" for row in rows))
    return read_fixes(Path("fix.csv"))


def prepared(root: Path, **changes: object) -> tuple[Manifest, DatasetScan]:
    return prepare_and_examine(
        [root], DataSettings(fix_path="fix.csv", exclude_path="exclude.csv", **changes), AuditSettings()
    )  # type: ignore[arg-type]


@hypothesis_settings(max_examples=40, deadline=None)  # each writes a file
@given(proposals=PROPOSALS)
def test_any_file_name_comes_back(
    proposals: dict[str, tuple[str, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [Fix(name, label, "", new, reason) for name, (label, new, reason) in proposals.items()]
    path = tmp_path_factory.mktemp("fix") / "fix.csv"
    written = Fixes(path).proposing(rows)
    written.write()
    back = read_fixes(path)
    assert [row for _, row in back.lines] == rows
    assert not back.decided and not back.write()


def test_decisions_stay_letter_by_letter_and_proposals_are_renewed() -> None:
    text = (
        "\ufeff" + HEADER + '# by Anna\n"a,1.jpg",cat, Relabel ,dog,  a dog! \nb.jpg,cat,,dog,old\nc.jpg,dog,keep,,\n'
    )
    Path("fix.csv").write_text(text, encoding="utf-8")
    read_fixes(Path("fix.csv")).proposing(
        [Fix("a,1.jpg", "cat", "", "cow", "new"), Fix("d.jpg", "dog", "", "cat", "new")]
    ).write()
    expected = (
        "\ufeff" + HEADER + '# by Anna\n"a,1.jpg",cat, Relabel ,dog,  a dog! \nc.jpg,dog,keep,,\nd.jpg,dog,,cat,new\n'
    )
    assert Path("fix.csv").read_text(encoding="utf-8") == expected
    assert set(read_fixes(Path("fix.csv")).decided) == {"a,1.jpg", "c.jpg"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a.png,cat,relable,dog,", "use one of relabel, exclude, keep"),
        ("a.png,cat,relabel,,", "without a new label"),
        ("a.png,cat,exclude", "has 3 columns"),
        ("a.png,cat,exclude,,\na.png,cat,keep,,", "decides twice on 'a.png'"),
    ],
)
def test_a_wrong_row_is_one_line_that_names_it(row: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        fixes(row)


def test_labels_change_and_what_does_not_fit_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tree = tree_of(a="cat", b="cat", c="dog", d="dog", e="dog")
    found = fixes(
        "a.png,cat,relabel,dog,x",
        "c.png,dog,exclude,,blurred",
        "d.png,cat,relabel,cat,stale",
        "gone.png,cat,exclude,,",
        "e.png,,keep,,",
    )
    correction = found.applied(tree)
    assert [image.label for image in correction.tree.images] == ["dog", "cat", "dog", "dog", "dog"]
    assert correction.excluded == {"c.png": "blurred"} and correction.counts == {"relabelled": 1, "excluded": 1}
    assert [record.message for record in caplog.records] == [
        "fix.csv: 1 row skipped, the image does not exist: 'gone.png'",
        "fix.csv: 1 row skipped, the image has another label now: 'd.png'",
    ]
    assert fixes("a.png,cat,,dog,only proposed").applied(tree) == Correction(tree)


def test_a_label_that_is_no_class_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'dgo', which is not a class: did you mean dog\?"):
        fixes("a.png,cat,relabel,dgo,").applied(tree_of(a="cat", b="dog"))


@UNTIMED
@given(sizes=SIZES, settings=SETTINGS, draw=st.integers(0, 2**32 - 1), grown=SIZES)
def test_what_was_left_out_and_relabelled_comes_back_to_its_part(
    sizes: dict[str, list[int]], settings: SplitSettings, draw: int, grown: dict[str, list[int]]
) -> None:
    """After a correction is undone, the splits of all images are those before it, even if the data set has grown."""
    old = manifest_of(sizes)
    before = deal(joined(old, manifest_of(grown, "new")), settings, previous=deal(old, settings))
    undealt = replace(before, splits=np.full(len(before), -1, np.int8))
    random = np.random.default_rng(draw)
    gone = {path: "" for path in before.paths if random.random() < 0.2}
    targets = np.where(
        random.random(len(before)) < 0.1, random.integers(0, len(before.classes), len(before)), before.targets
    )
    corrected = deal(replace(undealt, targets=targets), settings, previous=before)
    if any((targets[before.splits == 0] == code).sum() == 0 for code in np.unique(targets).tolist()):
        return  # a class without a training image takes one back, which is said in the log
    kept, left_out = split_excluded(corrected, Correction(FileTree(Path("root"), ()), 0, gone))
    assert (left_out is None) == (not gone)
    memory = joined(kept, left_out) if left_out is not None else kept
    assert assign_splits(undealt, settings, memory).sha256 == before.sha256


def test_applying_and_taking_back_gives_the_same_manifest(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, _ = prepared(tree)
    parts = {record.path: record.split for record in before}
    held = [path for path, split in parts.items() if split == "val"]
    fixes(f"{held[0]},cat,relabel,dog,a dog", f"{held[1]},,exclude,,blurred", "dog/003.png,dog,exclude,,blurred")
    corrected, found = prepared(tree)
    assert len(corrected) == 18 and dict(corrected.corrected) == {"relabelled": 1, "excluded": 2}
    assert {record.path: record.split for record in corrected}.items() <= parts.items()
    assert next(record for record in corrected if record.path == held[0]).label == "dog"
    assert "fix.csv: 1 label changed, 2 images excluded" in caplog.text
    assert "audit: after fix.csv: 1 label changed, 2 images excluded" in found.audit.summary()
    assert found.audit.excluded[held[1]] == "fix.csv: blurred"
    path = manifest_path(tree, [tree], DataSettings(fix_path="fix.csv", exclude_path="exclude.csv"))
    assert {record.path for record in Manifest.read(excluded_records_path(path), tree)} == {held[1], "dog/003.png"}
    memory = with_excluded(Manifest.read(path, tree), path)
    assert memory is not None and {record.path for record in memory} == set(parts)
    assert Path("exclude.csv").read_text() == "path,reason\n"  # the correction is fix.csv's alone
    fixes()
    assert prepared(tree)[0].sha256 == before.sha256 and not excluded_records_path(path).exists()


def test_an_unreadable_image_may_be_left_out_by_either_file(tree: Path) -> None:
    (tree / "cat/000.png").write_bytes(b"no image")
    fixes("cat/000.png,cat,exclude,,broken")
    manifest, found = prepared(tree)
    assert len(manifest) == 19 and dict(manifest.corrected) == {"relabelled": 0, "excluded": 1}
    assert not found.exclusions.lines and "not_an_image" not in found.audit.by_type


def test_folds_are_those_that_each_run_deals(tree: Path) -> None:
    fixes("cat/001.png,cat,exclude,,x", "dog/001.png,dog,relabel,cat,x")
    _, found = prepared(tree, folds=3, fold=0)
    folds = all_folds(found, DataSettings(folds=3, fold=0))
    assert [fold.sha256 for fold in folds] == [prepared(tree, folds=3, fold=number)[0].sha256 for number in range(3)]
    held = [fold.paths[row] for fold in folds for row in fold.indices("val").tolist()]
    assert sorted(held) == sorted(folds[0].paths) and len(held) == 19


def test_a_settled_conflict_is_not_reported_again(tree: Path) -> None:
    write_image(tree / "cat" / "twin.png", 77)
    shutil.copy(tree / "cat/twin.png", tree / "dog/twin.png")

    def kinds() -> set[str]:
        return {issue.issue_type for issue in prepared(tree)[1].audit.issues}

    assert "label_conflict" in kinds()
    fixes("dog/twin.png,dog,relabel,cat,same picture")
    assert "label_conflict" not in kinds() and "exact_duplicates" in kinds()
    fixes("dog/twin.png,dog,exclude,,same picture")
    assert not {"label_conflict", "exact_duplicates"} & kinds()
    fixes("dog/twin.png,dog,,cat,only proposed")
    assert "label_conflict" in kinds()
