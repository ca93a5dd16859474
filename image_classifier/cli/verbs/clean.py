"""The verb `clean`: remove everything that can be computed again from the images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from image_classifier.cli import hydra_app
from image_classifier.dataset.cache_dir import cache_bytes, remove_cache


@dataclass(frozen=True)
class CleanSettings:
    """The keys of conf/clean.yaml."""

    cache_dir: str = "data/cache"
    dry_run: bool = False
    trusted_packages: list[str] = field(default_factory=list)


def clean(config: Any) -> None:
    """Remove decoded pixels and file metadata, and print how much space that frees."""
    settings = hydra_app.typed(CleanSettings, config, "")
    directory = Path(settings.cache_dir)
    if not directory.exists():
        print(f"nothing to remove: there is no {directory}")
        return
    size = f"{cache_bytes(directory) / 1e6:,.1f} MB"
    if settings.dry_run:
        print(f"would remove {size} from {directory}")
        return
    remove_cache(directory)
    print(f"removed {size} from {directory}")
