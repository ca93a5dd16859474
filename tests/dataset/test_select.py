from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from image_classifier.dataset.select import ClassSettings, Selection, select
from image_classifier.errors import ConfigError
from image_classifier.manifest import SPLITS

CLASSES = ("ant", "bee", "cat", "dog", "eel")
Image = tuple[str, str, int]  # label, split, content
IMAGES = st.lists(
    st.tuples(st.sampled_from(CLASSES), st.sampled_from(["", "", "train", "val", "test"]), st.integers(0, 10**6)),
    min_size=1,
    max_size=80,
)
NAMES = st.lists(st.sampled_from(CLASSES), unique=True, max_size=3)
LIMIT = st.none() | st.integers(1, 12)
UNTIMED = hypothesis_settings(deadline=None)


def chosen(images: list[Image], settings: ClassSettings, seed: int = 0) -> Selection:
    targets = np.array([CLASSES.index(label) for label, _, _ in images], np.int64)
    splits = np.array([SPLITS.index(split) if split else -1 for _, split, _ in images], np.int8)
    content = b"".join(hashlib.sha256(str(content).encode()).digest() for _, _, content in images)
    return select(targets, CLASSES, splits, np.frombuffer(content, np.uint8).reshape(-1, 32), settings, seed)


def kept(images: list[Image], settings: ClassSettings, seed: int = 0) -> list[Image]:
    return [images[row] for row in chosen(images, settings, seed).rows]


def images_of(split: str = "", **counts: int) -> list[Image]:
    return [
        (label, split, 1000 * CLASSES.index(label) + number)
        for label, count in counts.items()
        for number in range(count)
    ]


@UNTIMED
@given(IMAGES, NAMES, NAMES, LIMIT, LIMIT, LIMIT)
def test_what_stays_is_what_the_settings_say(images, include, exclude, top, max_images, min_images):
    known = {label for label, _, _ in images}
    assume({*include, *exclude} <= known and not set(include) & set(exclude))
    settings = ClassSettings(top, include or None, exclude, max_images, min_images)
    counts = Counter(label for label, split, _ in images if split != "test")
    expected = [
        label for label in sorted(include or known) if label not in exclude and counts[label] >= (min_images or 0)
    ]
    expected = sorted(expected, key=lambda label: -counts[label])[:top]
    if len(expected) < 2 and set(expected) != known:
        with pytest.raises(ConfigError, match="data.classes leaves"):
            chosen(images, settings)
        return
    selection = chosen(images, settings)
    rows = selection.rows.tolist()
    assert rows == sorted(rows)
    assert bool(selection.summary) == (len(rows) < len(images))
    stays = Counter((images[row][0], images[row][1] in ("", "train")) for row in rows)
    for label in CLASSES:
        given_ = sum(image[0] == label and image[1] in ("val", "test") for image in images)
        free = sum(image[0] == label and image[1] in ("", "train") for image in images)
        assert stays[label, False] == (given_ if label in expected else 0)
        assert stays[label, True] == (min(free, max_images or free) if label in expected else 0)


@UNTIMED
@given(IMAGES, st.integers(1, 5), st.integers(0, 3), st.randoms(use_true_random=False))
def test_a_cap_depends_on_content_only_and_an_added_image_replaces_one_at_most(images, cap, seed, shuffler):
    images = list(dict.fromkeys(images))
    assume(len({content for _, _, content in images}) == len(images))
    settings = ClassSettings(max_images=cap)
    before = set(kept(images, settings, seed))
    shuffled = list(images)
    shuffler.shuffle(shuffled)
    assert set(kept(shuffled, settings, seed)) == before
    added = ("ant", "", 10**7)
    after = set(kept([added, *images], settings, seed))
    assert len(before - after) <= 1
    assert after - before <= {added}


def test_another_seed_keeps_other_images():
    images = images_of(ant=40, bee=40)
    assert kept(images, ClassSettings(max_images=10), 0) != kept(images, ClassSettings(max_images=10), 1)


def test_nothing_asked_leaves_everything_in():
    selection = chosen(images_of(ant=2, bee=1), ClassSettings())
    assert selection.rows.tolist() == [0, 1, 2]
    assert selection.summary == ""


def test_the_summary_says_which_step_left_what_out():
    images = images_of(ant=9, bee=5, cat=5, dog=2, eel=7)
    settings = ClassSettings(top=2, exclude=["ant"], max_images=4, min_images=3)
    assert chosen(images, settings).summary == (
        "data.classes keeps 2 of 5 classes, 8 of 28 images: exclude drops ant; min_images=3 drops dog; "
        "top=2 drops cat; "
        "max_images=4 drops 4 images of 2 classes"
    )


def test_the_test_part_has_no_say_and_is_never_cut():
    images = images_of(ant=3, bee=2, cat=1) + images_of("test", cat=50, ant=9) + images_of("val", bee=9)
    assert Counter(image[:2] for image in kept(images, ClassSettings(top=2, max_images=1))) == {
        ("ant", ""): 1,
        ("ant", "test"): 9,
        ("bee", ""): 1,
        ("bee", "val"): 9,
    }


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"include": ["ant", "bea"]},
            r"data\.classes\.include names 'bea', which is not a class: "
            r"did you mean bee\? the classes are ant, bee, cat$",
        ),
        (
            {"exclude": ["zebra"]},
            r"data\.classes\.exclude names 'zebra', which is not a class: the classes are ant, bee, cat$",
        ),
        ({"exclude": ["ant", "bee"]}, "leaves one class only, 'cat'"),
        ({"min_images": 99}, "leaves no class"),
        ({"top": 1}, r"leaves one class only, 'ant' \(top=1 drops bee, cat\)"),
    ],
)
def test_a_choice_that_cannot_be_made_is_one_line(values, words):
    with pytest.raises(ConfigError, match=words):
        chosen(images_of(ant=3, bee=2, cat=1), ClassSettings(**values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"top": 0}, r"data\.classes\.top must be at least 1, not 0"),
        ({"max_images": -1}, r"data\.classes\.max_images"),
        ({"min_images": 0}, r"data\.classes\.min_images"),
        ({"include": []}, r"data\.classes\.include"),
        ({"include": ["ant"], "exclude": ["ant"]}, "includes and excludes 'ant'"),
    ],
)
def test_settings_that_cannot_be(values, words):
    with pytest.raises(ConfigError, match=words):
        ClassSettings(**values)
