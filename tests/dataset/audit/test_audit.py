"""Every issue of an audit is true and about existing files; known problems of real data sets are found."""

from __future__ import annotations

import csv
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_classifier.dataset.audit.checks import Audit, AuditSettings, find_issues, issue_type_of
from image_classifier.dataset.audit.exclude import Exclusions, merge
from image_classifier.dataset.audit.issue_types import DUPLICATE_TYPES, EXCLUDABLE, ISSUE_TYPES, SEVERITIES, UNREADABLE
from image_classifier.dataset.discovery import FileTree, ImageFile, discover
from image_classifier.dataset.duplicates import DuplicateSettings, NearDuplicates, clusters, find_near_duplicates
from image_classifier.dataset.scan import FileMetadata, scan_files
from image_classifier.errors import ConfigError
from image_classifier.images import DecodeLimits
from tests.conftest import MakeTree, write_image

ALL = AuditSettings(exclude=list(EXCLUDABLE))


def audited(root: Path, store: Path, asked: AuditSettings | None = None, exclusions: Exclusions | None = None) -> Audit:
    """The audit of a folder, from its files on."""
    tree = discover([root])
    facts = scan_files(tree, store, DecodeLimits(), (255, 255, 255))
    twins = find_near_duplicates(facts.thumbnails, DuplicateSettings())
    return find_issues(tree, facts, twins, asked or AuditSettings(), exclusions)


def kinds_of(audit: Audit) -> dict[str, set[str]]:
    """Kind -> the paths it names."""
    return {kind: {path for finding in group for path in finding.paths} for kind, group in audit.by_type.items()}


def a_tree(
    images: list[tuple[str, str, int, str]], pairs: list[tuple[int, int]]
) -> tuple[FileTree, FileMetadata, NearDuplicates]:
    """A data set by hand: (label, split, content, error) of each image, and the rows of near-identical ones."""
    files = [
        ImageFile(f"{split or 'all'}/{label}/{row:02d}.jpg", label, split, 1, 1)
        for row, (label, split, _, _) in enumerate(images)
    ]
    order = sorted(range(len(files)), key=lambda row: files[row].path)
    count = len(files)
    digests = np.array([[images[row][2]] * 32 for row in order], dtype=np.uint8).reshape(count, 32)
    ones = np.ones(count, dtype=np.int32)
    facts = FileMetadata(
        digests=digests,
        widths=20 * ones,
        heights=20 * ones,
        formats=np.zeros(count, np.uint8),
        format_names=("JPEG",),
        modes=np.zeros(count, np.uint8),
        mode_names=("RGB",),
        orientation=np.ones(count, np.int8),
        frames=ones,
        bits=np.full(count, 8, np.int8),
        transparent=np.zeros(count, bool),
        thumbnails=np.zeros((count, 16, 16, 3), np.uint8),
        errors={place: images[row][3] for place, row in enumerate(order) if images[row][3]},
    )
    near = sorted(
        {(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1] and not {*pair} & facts.errors.keys()}
    )  # only what was read is compared
    first, second = (np.array([pair[side] for pair in near], dtype=np.int64) for side in (0, 1))
    twins = NearDuplicates(first, second, np.full(len(near), 0.99, np.float32), np.zeros(len(near), bool))
    return FileTree(Path("/data"), tuple(files[row] for row in order)), facts, twins


IMAGE = st.tuples(
    st.sampled_from(["cat", "dog", "Cat"]),
    st.sampled_from(["", "train", "val", "test"]),
    st.integers(0, 6),
    st.sampled_from(["", "", "", "the file is empty"]),
)
DATA = st.lists(IMAGE, min_size=1, max_size=16).flatmap(
    lambda images: st.tuples(st.just(images), st.lists(st.tuples(*[st.integers(0, len(images) - 1)] * 2), max_size=6))
)


@settings(deadline=None)  # the first call imports
@given(data=DATA)
def test_findings_are_facts(data: tuple[list[tuple[str, str, int, str]], list[tuple[int, int]]]) -> None:
    tree, facts, twins = a_tree(*data)
    audit = find_issues(tree, facts, twins, ALL)
    images = {image.path: image for image in tree.images}
    for finding in audit.issues:
        assert set(finding.paths) <= images.keys() and len(set(finding.paths)) == len(finding.paths)
        assert all(
            (item.label, item.split) == (images[item.path].label, images[item.path].split) for item in finding.items
        )
    order = list(ISSUE_TYPES)
    ranks = [(SEVERITIES.index(issue.severity), order.index(issue.issue_type)) for issue in audit.issues]
    assert ranks == sorted(ranks)
    assert json.loads(json.dumps(audit.as_dict())) == audit.as_dict()
    named = kinds_of(audit)
    assert named.get("empty_file", set()) == {tree.images[row].path for row in facts.errors}
    broken = {tree.images[row].path for row in facts.errors}
    assert not any(broken & paths for kind, paths in named.items() if kind not in UNREADABLE)


@settings(deadline=None)  # the first call imports
@given(data=DATA)
def test_duplicates_leaks_and_conflicts_are_all_there(
    data: tuple[list[tuple[str, str, int, str]], list[tuple[int, int]]],
) -> None:
    tree, facts, twins = a_tree(*data)
    named = kinds_of(find_issues(tree, facts, twins, ALL))
    rows = [row for row in range(len(tree.images)) if row not in facts.errors]
    pairs = {(a, b) for a in rows for b in rows if a < b and (facts.digests[a] == facts.digests[b]).all()}
    near = {(a, b) for a, b in zip(twins.first.tolist(), twins.second.tolist(), strict=True) if a in rows and b in rows}
    both = np.array(sorted(pairs | near), dtype=np.int64).reshape(-1, 2)
    cluster = clusters(len(tree.images), both[:, 0], both[:, 1])
    leaked = {
        tree.images[row].path
        for row in rows
        if tree.images[row].split
        and {tree.images[other].split for other in rows if cluster[other] == cluster[row]}
        - {"", tree.images[row].split}
    }
    assert named.get("leak", set()) == leaked
    conflicts = {
        tree.images[row].path
        for pair in pairs | near
        if len({tree.images[side].label for side in pair}) == 2
        for row in pair
    }
    assert conflicts <= named.get("label_conflict", set())
    assert bool(conflicts) == ("label_conflict" in named)
    place = [(image.label, image.split) for image in tree.images]
    exact = {tree.images[row].path for pair in pairs if place[pair[0]] == place[pair[1]] for row in pair}
    assert named.get("exact_duplicates", set()) == exact


@settings(deadline=None)  # the first call imports
@given(data=DATA, wanted=st.sets(st.sampled_from(EXCLUDABLE)))
def test_an_audit_repeats_itself_and_only_the_hand_silences_a_finding(
    data: tuple[list[tuple[str, str, int, str]], list[tuple[int, int]]], wanted: set[str]
) -> None:
    tree, facts, twins = a_tree(*data)
    asked = AuditSettings(exclude=sorted(wanted))
    first = find_issues(tree, facts, twins, asked)
    exclusions = Exclusions().updated(first)
    again = find_issues(tree, facts, twins, asked, exclusions)
    assert again.issues == first.issues  # an audit that is repeated says the same
    assert again.proposed == first.proposed == again.excluded
    assert exclusions.updated(again) == exclusions
    by_hand = merge(Exclusions(), dict.fromkeys(first.proposed, "no good"))
    assert not any(
        set(finding.paths) & first.proposed.keys() for finding in find_issues(tree, facts, twins, asked, by_hand).issues
    )
    assert not find_issues(tree, facts, twins, asked, by_hand).proposed.keys() & first.proposed.keys()


@settings(deadline=None)  # the first call imports
@given(data=DATA)
def test_one_of_each_group_of_duplicates_stays_and_the_test_part_stays_whole(
    data: tuple[list[tuple[str, str, int, str]], list[tuple[int, int]]],
) -> None:
    tree, facts, twins = a_tree(*data)
    kinds = ["exact_duplicates", "near_duplicates"]
    audit = find_issues(tree, facts, twins, AuditSettings(exclude=kinds))
    for kind in kinds:
        for finding in audit.by_type.get(kind, ()):
            assert set(finding.paths[1:]) <= audit.proposed.keys()
            reason = audit.proposed.get(
                finding.paths[0], ""
            )  # the first of some copies may itself be like a picture that stays
            assert kind == "exact_duplicates" and "near_duplicates" in reason if reason else True
            assert len({(item.label, item.split) for item in finding.items}) == 1
    leaks = find_issues(tree, facts, twins, AuditSettings(exclude=["leak"]))
    splits = {image.path: image.split for image in tree.images}
    assert "test" not in {splits[path] for path in leaks.proposed}
    by_hand = merge(Exclusions(), dict.fromkeys(leaks.proposed, "seen"))
    assert not any(
        finding.issue_type == "leak" for finding in find_issues(tree, facts, twins, AuditSettings(), by_hand).issues
    )


def test_a_clean_folder_is_said_to_be_clean(make_tree: MakeTree, tmp_path: Path) -> None:
    audit = audited(make_tree(cat=12, dog=12), tmp_path / "store")
    assert audit.issues == () and audit.table() == ["24 images in 2 classes: no issues"]
    assert audit.summary() == ["audit: no errors or warnings"]
    assert not audit.exceeds("info")


def test_the_checks_of_classes_and_names(tmp_path: Path) -> None:
    for label, count in {"Cat": 12, "cat ": 3, "dog": 130}.items():
        for number in range(count):
            write_image(tmp_path / "tree" / "train" / label / f"{number}.png", hash((label, number)) % 2**32)
    write_image(tmp_path / "tree/test/dog/t.png", 1)
    write_image(tmp_path / "tree/test/owl/t.png", 2)
    write_image(tmp_path / "tree/other/x/t.png", 3)
    (tmp_path / "tree/train/dog/Thumbs.txt").write_text("x")
    audit = audited(tmp_path / "tree", tmp_path / "store")
    details = {kind: [finding.detail for finding in group] for kind, group in audit.by_type.items()}
    assert details["imbalance"] == ["'dog' has 130 training images, 'cat ' has 3: 43.3 to 1"]
    assert details["few_images"] == ["'cat ' has 3 readable training images"]
    assert details["class_name_variants"] == ["'Cat' (12 images), 'cat ' (3 images)"]
    assert details["missing_in_train"] == ["'owl' is in test and not in train"]
    assert details["missing_in_test"] == ["'Cat' is in train and not in test", "'cat ' is in train and not in test"]
    named = kinds_of(audit)
    assert named["stray_files"] == {"train/dog/Thumbs.txt"} and named["ignored_folders"] == {"other"}
    assert audit.exceeds("error") and audit.exceeds("info") and not audit.exceeds(None)


def test_small_images_are_tiny_among_large_ones_only(tmp_path: Path) -> None:
    for number in range(12):
        write_image(tmp_path / "tree/a" / f"{number}.png", number, 8)
        write_image(tmp_path / "tree/b" / f"{number}.png", 100 + number, 8)
    assert "tiny" not in audited(tmp_path / "tree", tmp_path / "store").by_type
    for number in range(30):
        write_image(tmp_path / "tree/b" / f"large{number}.png", 200 + number, 40)
    assert audited(tmp_path / "tree", tmp_path / "store").counts["tiny"] == 24


def test_an_extreme_shape_and_a_mirrored_copy_are_found(make_tree: MakeTree, tmp_path: Path) -> None:
    root = make_tree(cat=12, dog=12)
    Image.new("RGB", (120, 20)).save(root / "cat/banner.png")
    with Image.open(root / "cat/003.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "cat/mirrored.png")
    audit = audited(root, tmp_path / "store")
    assert kinds_of(audit) == {
        "extreme_aspect": {"cat/banner.png"},
        "near_duplicates": {"cat/003.png", "cat/mirrored.png"},
    }
    assert all("mirrored" in finding.detail for finding in audit.by_type["near_duplicates"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fail_on", "fatal"),
        ("exclude", ["leaks"]),
        ("tiny", -1),
        ("aspect", 0.5),
        ("imbalance", 0.0),
        ("few_images", -1),
        ("max_listed", -1),
    ],
)
def test_a_wrong_setting_is_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"audit\.{key}"):
        AuditSettings(**{key: value})  # type: ignore[arg-type]


# What the audit must say of each file of dirty-images; of one with None, nothing but what it is.
EXPECTED = {
    "animated/blend_op_over.png": "animation",
    "animated/chi.gif": "animation",
    "animated/dispose_prev.gif": "animation",
    "cmyk/pil_sample_cmyk.jpg": "cmyk",
    "corrupt/badrle.bmp": "palette",
    "corrupt/hopper_bad_exif.jpg": "greyscale",
    "corrupt/broken_exif_dpi.jpg": None,
    "corrupt/photoshop-200dpi-broken.jpg": None,
    "corrupt/sugarshack_bad_mpo_header.jpg": None,
    "derived/bomb_400Mpx.png": "too_large",
    "derived/cut_2_bytes.jpg": "truncated",
    "derived/empty.jpg": "empty_file",
    "derived/float_nan.tiff": "corrupt",
    "derived/noextension": "stray_files",
    "derived/UPPER.JPG": "exact_duplicates",
    "derived/name with spaces.jpg": "exact_duplicates",
    "derived/percent%20,comma;semi.jpg": "exact_duplicates",
    "derived/quote'\".jpg": "exact_duplicates",
    "derived/ünïcødé-名前-😀.jpg": "exact_duplicates",
    "derived/trailing_garbage.jpg": "near_duplicates",
    "derived/png_bad_idat_crc.png": "near_duplicates",  # Pillow reads it right
    "palette_alpha_gray/hopper_gray.jpg": "greyscale",
    "palette_alpha_gray/p_trns_single.png": "palette",
    "palette_alpha_gray/rgb32bf-rgba.bmp": "transparency",
    "palette_alpha_gray/tRNS_null_1x1.png": "tiny",
    "palette_alpha_gray/tiny.png": "tiny",
    "palette_alpha_gray/transparent.gif": "transparency",
    "palette_alpha_gray/uncompressed_la.png": "transparency",
    "truncated/truncated_app14.jpg": None,
    "wrong_ext/cloudy71.jpg": "greyscale",
}
BY_FOLDER = {
    "bomb": {"too_large", "not_an_image"},
    "corrupt": set(UNREADABLE),
    "deep": {"deep_samples"},
    "exif": {"exif_rotation"},
    "extreme_aspect": {"extreme_aspect", *UNREADABLE},
    "formats": {"stray_files", ""},
    "junk": {"stray_files"},
    "tiny": {"tiny", *UNREADABLE},
    "truncated": {"truncated"},
    "wrong_ext": {"wrong_extension"},
    "derived": {"corrupt", ""},
}
OTHER_SUFFIXES = (".mpo", ".ico", ".j2k", ".pgm", ".ppm", ".zip", "noextension")


def unpacked(archive: Path, folder: Path) -> Path:
    """The one folder in an archive."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir()) if len(list(folder.iterdir())) == 1 else folder


def test_of_every_dirty_file_the_audit_says_what_the_manifest_knows(shared_data: Path, tmp_path: Path) -> None:
    root = unpacked(shared_data / "dirty-images.tar.gz", tmp_path / "dirty")
    audit = audited(root, tmp_path / "store", AuditSettings(few_images=0))
    named = kinds_of(audit)
    with (root / "MANIFEST.tsv").open(encoding="utf-8", newline="") as file:
        files = [row["file"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    assert len(files) == 79
    for path in files:
        kinds = {kind for kind, paths in named.items() if path in paths}
        if path.endswith(OTHER_SUFFIXES):
            assert kinds == {"stray_files"}, path
        elif path in EXPECTED:
            assert EXPECTED[path] is None or EXPECTED[path] in kinds, (path, kinds)
            assert (EXPECTED[path] in UNREADABLE) == bool(kinds & {*UNREADABLE}), (path, kinds)
        else:
            assert (kinds.difference(DUPLICATE_TYPES) or {""}) & BY_FOLDER[path.partition("/")[0]], (path, kinds)
    assert audit.proposed.keys() == {path for kind in UNREADABLE for path in named.get(kind, ())}
    assert named["empty_class"] == {"junk"} and "MANIFEST.tsv" in named["stray_files"]


@pytest.mark.slow
def test_the_simpsons_leak(shared_data: Path, tmp_path: Path) -> None:
    root = unpacked(shared_data / "simpsons-mnist.tar.gz", tmp_path / "simpsons")
    audit = audited(root, tmp_path / "store")
    leak = audit.data["leaked"]["test"]
    assert leak["images"] == 2000 and 260 <= leak["leaked"] <= 290
    test = {
        item.path
        for finding in audit.by_type["leak"]
        if "train" in finding.numbers
        for item in finding.items
        if item.split == "test"
    }
    assert len(test) == leak["leaked"]
    equal = Counter(finding.issue_type for finding in audit.issues if finding.detail.startswith("the same bytes"))
    assert equal == {"exact_duplicates": 4, "leak": 2}
    assert any(f"{leak['leaked']} of 2 000 test images" in line for line in audit.summary())


@pytest.mark.slow
def test_the_clothing_pair_under_two_labels(shared_data: Path, tmp_path: Path) -> None:
    audit = audited(unpacked(shared_data / "clothing.tar", tmp_path / "clothing"), tmp_path / "store")
    (conflict,) = audit.by_type["label_conflict"]
    assert [path.split("/", 1)[1][:15] for path in conflict.paths] == ["shorts/6075b4a5", "skirt/637a56e4-"]
    assert "correlation 0.99" in conflict.detail and not audit.proposed


def test_reasons_of_the_operating_system_and_of_limits_have_their_kind() -> None:
    assert issue_type_of("Permission denied") == "no_permission"
    assert issue_type_of("larger than 50 MiB") == "too_large"
    assert issue_type_of("5000 x 50000 pixels, more than the 50 megapixels allowed") == "too_large"
    assert issue_type_of("no such file") == "not_an_image"
    assert issue_type_of("holds samples that are not numbers") == "corrupt"
