"""Manifests that never were images, for tests of dealing them."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, assume
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from image_classifier.dataset.split import SplitSettings, assign_splits
from image_classifier.errors import DataError
from image_classifier.manifest import SPLITS, Manifest, Record

RATIOS = st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.33, 0.45])
SETTINGS = st.builds(SplitSettings, val=RATIOS, test=RATIOS, seed=st.integers(0, 5))
LABELS = st.sampled_from(["ant", "bee", "cat"])
# Per class the sizes of its clusters: many with single images among them, or few and all large.
CLUSTERS = st.lists(st.integers(1, 9), min_size=2, max_size=40) | st.lists(st.integers(3, 9), min_size=2, max_size=6)
SIZES = st.dictionaries(LABELS, CLUSTERS, min_size=1)
# Images as (label, cluster): clusters may show several classes.
MIXED = st.lists(st.tuples(LABELS, st.integers(0, 30)), min_size=2, max_size=120)
PARTS = st.sampled_from([("", "train"), ("train", "test"), ("train", "val"), ("", "test"), ("", *SPLITS)])
GIVEN = PARTS.flatmap(
    lambda parts: st.lists(st.tuples(LABELS, st.integers(0, 12), st.sampled_from(parts)), min_size=1, max_size=60)
)

# The first call imports SciPy; and tables that cannot be split are left out, sometimes many in a row.
UNTIMED = hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
ZERO = np.empty(0, np.int64)


def image(label: str, content: str, group: str = "", split: str = "", folder: str = "") -> Record:
    """A record whose content is decided by `content`, in the cluster called `group`, else in one of its own."""
    digest = hashlib.sha256(content.encode()).hexdigest()
    name = hashlib.sha256(group.encode()).hexdigest()[:16] if group else digest[:16]
    return Record(f"{folder}{label}/{content}.png", label, split, name, digest, 1, 1)


def manifest_of(sizes: dict[str, list[int]], tag: str = "", split: str = "") -> Manifest:
    """Per class the sizes of its clusters of near-duplicates."""
    return Manifest.of(
        Path("root"),
        (
            image(
                label,
                f"{label}{tag}{cluster}-{copy}",
                f"{label}{tag}{cluster}" if size > 1 else "",
                split,
                f"{split}/" if split else "",
            )
            for label, clusters in sizes.items()
            for cluster, size in enumerate(clusters)
            for copy in range(size)
        ),
    )


def mixed(images: Iterable[tuple[str, int]]) -> Manifest:
    return Manifest.of(
        Path("root"), (image(label, f"{label}{row}", f"group{cluster}") for row, (label, cluster) in enumerate(images))
    )


def joined(*manifests: Manifest) -> Manifest:
    return Manifest.of(Path("root"), (record for manifest in manifests for record in manifest))


def clusters_of(manifest: Manifest) -> dict[str, list[Record]]:
    members = defaultdict(list)
    for record in manifest:
        members[record.group].append(record)
    return members


def assert_whole(dealt: Manifest) -> None:
    assert all(len({record.split for record in members}) == 1 for members in clusters_of(dealt).values())


def trained_clusters(dealt: Manifest) -> Counter[str]:
    return Counter(label for label, _ in {(record.label, record.group) for record in dealt if record.split == "train"})


def deal(manifest: Manifest, settings: SplitSettings, **more) -> Manifest:
    """As assign_splits; data that cannot be split at all are not what a test is about."""
    try:
        return assign_splits(manifest, settings, **more)
    except DataError:
        assume(False)
        raise
