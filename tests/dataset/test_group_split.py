from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.dataset.split import content_names, group_keys, join_groups
from image_classifier.errors import ConfigError
from image_classifier.manifest import Manifest
from tests.dataset.manifests import UNTIMED, ZERO, image, manifest_of

PAIRS = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)).filter(lambda pair: pair[0] != pair[1]), max_size=8)


@UNTIMED
@given(
    st.lists(st.integers(0, 8), min_size=12, max_size=12),
    PAIRS,
    st.lists(st.sampled_from(["", "a", "b"]), min_size=12, max_size=12),
    st.randoms(),
)
def test_a_cluster_is_all_that_content_twins_and_keys_link(contents, pairs, keys, shuffler):
    records = [replace(image("ant", str(content)), path=str(row)) for row, content in enumerate(contents)]
    first, second = np.array(pairs, np.int64).reshape(-1, 2).T
    groups = join_groups(Manifest.of(Path(), records), first, second, keys).groups.tolist()
    linked = [{row} for row in range(12)]
    edges = pairs + [
        (a, b) for a in range(12) for b in range(a) if contents[a] == contents[b] or (keys[a] and keys[a] == keys[b])
    ]
    for a, b in edges * 12:
        linked[a] |= linked[b]
        linked[b] |= linked[a]
    for row in range(12):
        assert groups[row] == min(int(records[member].sha256[:16], 16) for member in linked[row])
    order = list(range(12))
    shuffler.shuffle(order)
    place = np.argsort(order)
    shuffled = Manifest.of(Path(), [replace(records[row], path=f"z{row}") for row in order])
    again = join_groups(shuffled, place[second], place[first], [keys[row] for row in order])
    assert [groups[row] for row in order] == again.groups.tolist()


def test_an_image_that_is_like_no_other_keeps_its_own_name():
    manifest = manifest_of({"ant": [1] * 5})
    assert (join_groups(manifest, ZERO, ZERO).groups == manifest.groups).all()
    assert content_names(manifest.digests).tolist() == [int(record.sha256[:16], 16) for record in manifest]
    assert len(join_groups(Manifest.of(Path(), ()), ZERO, ZERO, [])) == 0


def test_a_pattern_finds_the_key_in_the_path(caplog):
    caplog.set_level(logging.INFO)
    paths = ["cat/tom_1.png", "cat/tom_2.png", "dog/tom_1.png", "dog/rex.png"]
    assert group_keys(paths, r"(\w+)/(\w+)_\d") == ["cat", "cat", "dog", ""]
    assert group_keys(paths, r"[a-z]+_") == ["tom_", "tom_", "tom_", ""]
    assert group_keys(paths, r"(tom)|rex") == ["tom", "tom", "tom", ""]
    assert caplog.text.count("1 of 4 images have no key") == 3


@pytest.mark.parametrize(
    ("pattern", "words"), [("(", "not a regular expression"), ("season", "finds no group in any of the 1 paths")]
)
def test_a_pattern_that_finds_nothing_is_refused(pattern, words):
    with pytest.raises(ConfigError, match=rf"data\.split\.group='.*' .*{words}"):
        group_keys(["cat/1.png"], pattern)
