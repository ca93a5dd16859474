"""exclude.csv: what the hand wrote stays, what the audit wrote comes and goes with its finding."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classifier.dataset.audit.exclude import AUDIT, Exclusions, merge, read_exclusions
from image_classifier.errors import DataError

# Any name that a POSIX file system may hold; a surrogate stands for a byte that is no UTF-8.
NAMES = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.sampled_from("\udc80\udcff,\"';#*?[\r\n "),
    min_size=1,
    max_size=8,
)
REASONS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
PROPOSED = st.dictionaries(NAMES, REASONS.map(AUDIT.__add__), max_size=5)


def written(path: Path, text: str) -> Exclusions:
    path.write_text(text, encoding="utf-8", newline="")
    return read_exclusions(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "exclude.csv"


@settings(max_examples=40)  # each writes a file
@given(proposed=PROPOSED)
def test_any_file_name_comes_back(proposed: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("exclude") / "exclude.csv"
    merge(Exclusions(path), proposed).write()
    back = read_exclusions(path)
    assert {line.path: line.reason for line in back.lines} == proposed
    assert back.covers([*proposed]).all() and not back.by_hand([*proposed]).any()
    assert not back.write()


@given(
    first=PROPOSED,
    second=PROPOSED,
    by_hand=st.dictionaries(NAMES, REASONS.filter(lambda reason: not reason.startswith(AUDIT)), max_size=4),
)
def test_merging_is_idempotent_and_follows_the_findings(
    first: dict[str, str], second: dict[str, str], by_hand: dict[str, str]
) -> None:
    hand = merge(Exclusions(), {}).lines + tuple(
        line for name, reason in by_hand.items() for line in merge(Exclusions(), {name: reason}).lines
    )
    start = Exclusions(lines=hand)
    once = merge(merge(start, first), second)
    assert merge(once, second) == once
    assert once == merge(merge(start, second), second) or set(once.lines) == set(merge(start, second).lines)
    assert [line for line in once.lines if not line.by_audit] == list(hand)
    assert {line.path for line in once.lines if line.by_audit} <= second.keys()
    assert merge(once, {}) == start


def test_what_a_person_wrote_stays_letter_by_letter(path: Path) -> None:
    text = (
        '\ufeffPath,Reason\r\n# by Anna\r\n\r\n"a, b.jpg",  too dark \r\nold.jpg,audit: truncated: gone\r\nc.jpg,keep'
    )
    exclusions = merge(
        written(path, text), {"c.jpg": "audit: tiny: 1 × 1", "a, b.jpg": "audit: tiny", "new.jpg": "audit: empty_file"}
    )
    exclusions.write()
    expected = '\ufeffPath,Reason\r\n# by Anna\r\n\r\n"a, b.jpg",  too dark \r\nc.jpg,keep\nnew.jpg,audit: empty_file\n'
    assert path.read_bytes().decode() == expected


def test_a_row_of_the_audit_keeps_its_place_and_takes_the_reason_of_now(path: Path) -> None:
    exclusions = written(path, "path,reason\na,audit: tiny: 1 × 1\nb,mine\n")
    assert [(line.path, line.reason) for line in merge(exclusions, {"a": "audit: leak: x"}).lines] == [
        ("a", "audit: leak: x"),
        ("b", "mine"),
    ]


def test_keep_overrules_every_other_row(path: Path) -> None:
    exclusions = written(path, "path,reason\nblurry/*.jpg,blurry\nblurry/7.jpg,Keep\nx.jpg,audit: tiny\nx.jpg,keep\n")
    paths = ["blurry/1.jpg", "blurry/deep/2.jpg", "blurry/7.jpg", "x.jpg", "sharp/1.jpg"]
    assert exclusions.covers(paths).tolist() == [True, True, False, False, False]
    assert not any(line.by_audit for line in merge(exclusions, {"x.jpg": "audit: tiny"}).lines)
    assert exclusions.reason("blurry/1.jpg") == "blurry"


def test_a_name_with_brackets_is_itself_and_the_audit_writes_no_patterns(path: Path) -> None:
    exclusions = written(path, "path,reason\na[1].jpg,mine\nb[2].jpg,audit: tiny\n")
    assert exclusions.covers(["a[1].jpg", "a1.jpg", "b[2].jpg", "b2.jpg"]).tolist() == [True, True, True, False]


def test_rows_that_match_nothing_are_named(path: Path) -> None:
    exclusions = written(path, "path,reason\ngone.jpg,x\nhere.jpg,x\nno/*,x\nhe*,keep\nold,audit: tiny\n")
    assert exclusions.unmatched(["here.jpg"]) == ["gone.jpg", "no/*"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("file,why\na,b\n", "line 1 "),
        ("a.jpg,blurry\n", "line 1 "),
        ("path,reason\na,b\nc\n", "line 3 "),
        ("path,reason\n\n# note\na,b,c\n", "line 4 "),
        ('path,reason\n"a\nb",x\n,y\n', "line 4 "),
        ('path,reason\nok,fine\n"never closed,x\n', "line 3 "),
    ],
)
def test_a_wrong_line_is_named(text: str, line: str, path: Path) -> None:
    with pytest.raises(DataError) as raised:
        written(path, text)
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_semicolons_of_a_spreadsheet_are_read_and_written(path: Path) -> None:
    exclusions = written(path, "path;reason\r\na,1.jpg;bad\r\n")
    assert exclusions.covers(["a,1.jpg"]).all()
    merge(exclusions, {"b;c": "audit: tiny"}).write()
    assert read_exclusions(path).covers(["a,1.jpg", "b;c"]).all()


@pytest.mark.parametrize("text", ["", "\n", "\ufeff\r\n"])
def test_no_file_and_an_empty_file_leave_nothing_out(text: str, path: Path) -> None:
    assert not read_exclusions(path).covers(["a"]).any()
    assert not written(path, text).covers(["a"]).any()


def test_a_file_that_says_the_same_is_not_written_again(path: Path) -> None:
    exclusions = merge(read_exclusions(path), {"a": "audit: tiny"})
    assert exclusions.write()
    before = path.stat()
    assert not merge(read_exclusions(path), {"a": "audit: tiny"}).write()
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize("row", ["roses", "roses/", "./roses", "./roses/", "./roses/*.jpg", "roses/1.jpg"])
def test_a_folder_leaves_out_all_that_is_below_it(tmp_path, row):
    (tmp_path / "exclude.csv").write_text(f"path,reason\n{row},bad\n")
    exclusions = read_exclusions(tmp_path / "exclude.csv")
    paths = ["roses/1.jpg", "rosesx/1.jpg", "wild/roses/1.jpg"]
    assert exclusions.covers(paths).tolist() == [True, False, False]
    assert exclusions.reason("roses/1.jpg") == "bad"
    assert exclusions.unmatched(paths) == []
    assert exclusions.unmatched(paths[1:]) == [row]


def test_an_image_of_a_folder_that_is_left_out_can_be_kept(tmp_path):
    (tmp_path / "exclude.csv").write_text("path,reason\nroses,bad\nroses/2.jpg,keep\n")
    assert read_exclusions(tmp_path / "exclude.csv").covers(["roses/1.jpg", "roses/2.jpg"]).tolist() == [True, False]
