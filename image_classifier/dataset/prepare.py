"""The data stage: scan a tree, deal the splits, write `manifest.csv`."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections import Counter
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from image_classifier.dataset.cache import CacheSettings
from image_classifier.dataset.scan import load_test_manifest, scan
from image_classifier.dataset.split import SplitSettings, assign_splits
from image_classifier.errors import ConfigError
from image_classifier.images import Preprocess
from image_classifier.records import SPLITS, Manifest

__all__ = ["DataSettings", "load_test_manifest", "manifest_path", "prepare"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSettings:
    """The config group `data`: which images, at which size, split how; `source` is the node that fetches them.

    Raises:
        ConfigError: A value that cannot be, named by its key.
    """

    name: str | None = None
    image_size: int = 64
    batch_size: int = 64
    resize: str = "crop"
    interpolation: str = "bilinear"
    crop_fraction: float = 1.0
    flip: bool = True
    dir: str | None = None
    archive: str | None = None
    manifest_path: str | None = None
    split: SplitSettings = field(default_factory=SplitSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    source: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise ConfigError(f"data.batch_size must be at least 1, not {self.batch_size}")
        _ = self.preprocess

    @property
    def preprocess(self) -> Preprocess:
        """The evaluation path that these settings ask for; ConfigError where they cannot be."""
        return Preprocess(self.image_size, self.resize, self.interpolation, self.crop_fraction)


def manifest_path(root: Path, settings: DataSettings) -> Path:
    """Where the manifest of these images under these split settings lies: `data.manifest_path`, else a name of its own."""
    if settings.manifest_path:
        return Path(settings.manifest_path)
    identity = hashlib.sha256(repr((str(root), astuple(settings.split))).encode("utf-8", "surrogateescape")).hexdigest()
    name = (settings.name or root.resolve().name or "data").replace("/", "_")
    return Path("data/manifests") / f"{name}-{identity[:8]}.csv"


def prepare(root: Path, settings: DataSettings) -> Manifest:
    """Scan `root`, deal the splits and write the manifest; images that an earlier manifest knows keep their split.

    Raises:
        DataError: The tree cannot be trained on.
        StorageError: The manifest cannot be written.
    """
    path = manifest_path(root, settings)
    previous = Manifest.read(path, root) if path.exists() else None
    manifest = assign_splits(scan(root, progress=sys.stderr.isatty()), settings.split, previous)
    if previous is None or previous.records != manifest.records:  # an untouched file keeps its date, and a read-only one its peace
        manifest.write(path)
    if previous is not None:
        _warn_of_kept_split(manifest, settings, path)
    _report(manifest, path)
    return manifest


def _warn_of_kept_split(manifest: Manifest, settings: DataSettings, path: Path) -> None:
    known = len(manifest.indices("train")) + len(manifest.indices("val"))
    share = len(manifest.indices("val")) / max(1, known)
    given = (manifest.root / "train").is_dir()  # then a val part may be the folder's own, of any size
    if not given and abs(share - settings.split.val) > 0.05:
        log.warning("%s keeps its split: %.0f %% are val, not %.0f %%; delete it to deal anew", path, 100 * share, 100 * settings.split.val)


def _report(manifest: Manifest, path: Path) -> None:
    counts = Counter(record.split for record in manifest)
    parts = ", ".join(f"{split} {counts[split]}" for split in SPLITS)
    log.info("%d images, %d classes: %s (%s)", len(manifest), len(manifest.classes), parts, path)
    shared = _train_twins(manifest)
    if shared:
        log.warning("%d images of the test and val parts are also, byte for byte, in the train part: their figures are flattered", shared)


def _train_twins(manifest: Manifest) -> int:
    train = {record.sha256 for record in manifest if record.split == "train"}
    return sum(record.split != "train" and record.sha256 in train for record in manifest)
