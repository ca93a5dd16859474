"""The config group `data` as one frozen value: which images, at which size, split how."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from image_classifier.dataset.duplicates import DuplicateSettings
from image_classifier.dataset.pixel_cache import CacheSettings
from image_classifier.dataset.select import ClassSettings
from image_classifier.dataset.split import SplitSettings, check_folds
from image_classifier.errors import ConfigError
from image_classifier.images import DecodeLimits, Preprocess
from image_classifier.sources.archive import UnpackLimits
from image_classifier.sources.download import DownloadSettings

BALANCES = ("none", "sampler", "weights")
AUTO = "auto"
NO_WEIGHTS: Mapping[str, Any] = {"image_size": 128, "interpolation": "bilinear", "crop_fraction": 1.0}


@dataclass(frozen=True)
class DataSettings:
    """The config group `data`: which images, at which size, split how; `source` is the node that fetches them.

    Raises:
        ConfigError: An invalid value, named by its key.
    """

    name: str | None = None
    dir: Any = None
    archive: Any = None
    sha256: Any = None
    dvc: bool | None = None
    image_size: Any = 64
    batch_size: Any = 64
    progressive_sizes: list[int] | None = None
    resize: str = "crop"
    interpolation: str = "bilinear"
    crop_fraction: Any = 1.0
    background: tuple[int, int, int] = (255, 255, 255)
    scaled_decoding: bool = True
    flip: bool = True
    balance: str = "none"
    rename: dict[str, str] = field(default_factory=dict)
    classes: ClassSettings = field(default_factory=ClassSettings)
    exclude_path: str | None = None
    fix_path: str | None = None
    manifest_path: str | None = None
    unpack: UnpackLimits = field(default_factory=UnpackLimits)
    download: DownloadSettings = field(default_factory=DownloadSettings)
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    duplicates: DuplicateSettings = field(default_factory=DuplicateSettings)
    split: SplitSettings = field(default_factory=SplitSettings)
    folds: int | None = None
    fold: Any = None
    cache: CacheSettings = field(default_factory=CacheSettings)
    source: Any = None

    def __post_init__(self) -> None:
        if self.batch_size != "auto" and (isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int)):
            raise ConfigError(f"data.batch_size must be an int, or auto, got {self.batch_size!r}")
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise ConfigError(f"data.batch_size must be at least 1, not {self.batch_size}")
        for name, kind, words in (("image_size", int, "an int"), ("crop_fraction", int | float, "a number")):
            if (value := getattr(self, name)) != AUTO and (isinstance(value, bool) or not isinstance(value, kind)):
                raise ConfigError(f"data.{name} must be {words}, got {value!r}")
        if isinstance(self.progressive_sizes, list) and self.image_size != AUTO:
            _check_sizes(self.progressive_sizes, self.image_size)
        if isinstance(self.balance, str) and self.balance not in BALANCES:
            raise ConfigError(f"data.balance must be one of {', '.join(BALANCES)}, not {self.balance!r}")
        check_folds(self.fold, self.folds)
        _ = self.preprocess

    def settled(self, found: Mapping[str, Any] = NO_WEIGHTS) -> DataSettings:
        """Return the settings with what was found in place of each `auto`: what the pretrained weights want, if any."""
        return replace(self, **{name: value for name, value in found.items() if getattr(self, name) == AUTO})

    @property
    def preprocess(self) -> Preprocess:
        """The evaluation preprocessing of these settings, without pretrained weights; ConfigError for invalid ones."""
        given = {name: getattr(self, name) for name in NO_WEIGHTS}
        size, interpolation, fraction = (NO_WEIGHTS[name] if value == AUTO else value for name, value in given.items())
        resize = "crop" if self.resize == AUTO else self.resize
        return Preprocess(size, resize, interpolation, fraction, self.background, self.scaled_decoding)

    def unique_name(self, root: Path, paths: Sequence[Path], *more: Any) -> str:
        """Return the data set's name and 8 hex digits of its folders, its tables and of `more`."""
        name = (self.name or root.resolve().name or "data").replace("/", "_")
        identity = repr(([os.path.realpath(path) for path in paths], more))
        return f"{name}-{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _check_sizes(sizes: Sequence[int], image_size: int) -> None:
    """Check that progressive sizes grow and end with the size that the network is validated and used at."""
    if not sizes or min(sizes) < 1 or list(sizes) != sorted(sizes) or sizes[-1] != image_size:
        given = ",".join(map(str, sizes))
        fact = f"data.progressive_sizes=[{given}] must grow, and end with data.image_size, {image_size}"
        raise ConfigError(fact, f"such as [{image_size * 3 // 4},{image_size}]")
