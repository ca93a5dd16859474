"""Shared fixtures: tiny folder-per-class trees and the real images beside the repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
MakeTree = Callable[..., Path]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images, `../shared/data` from the repository's root."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("../shared/data is not here: no real images to test on")
    return path


def write_image(path: Path, seed: int, size: int = 12) -> Path:
    """A small PNG whose content is decided by `seed`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """`make_tree(cat=5, dog=5)` writes that many different images a class and returns the root; keys may hold slashes."""

    def make(name: str = "tree", /, **counts: int) -> Path:
        root = tmp_path / name
        seed = 0
        for label, count in counts.items():
            for number in range(count):
                seed += 1
                write_image(root / label / f"{number:03d}.png", seed)
        return root

    return make


@pytest.fixture
def tree(make_tree: MakeTree) -> Path:
    """Two classes of ten images."""
    return make_tree(cat=10, dog=10)
