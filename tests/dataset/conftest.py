"""Fixtures and helpers of the scans: a store of facts, what was opened, and comparing with a fresh look."""

from __future__ import annotations

import shutil
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from image_classifier.dataset import scan as facts_module
from image_classifier.dataset.discovery import FileTree, discover
from image_classifier.dataset.scan import FileMetadata, scan_files
from image_classifier.images import DecodeLimits

LIMITS = DecodeLimits()
WHITE = (255, 255, 255)


@pytest.fixture
def facts_store(tmp_path) -> Path:
    return tmp_path / "cache" / "facts"


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The files that were opened, by name."""
    names: list[str] = []
    real = facts_module.load_bytes
    monkeypatch.setattr(facts_module, "load_bytes", lambda path, limits: names.append(path.name) or real(path, limits))
    return names


@pytest.fixture
def fine_clock(monkeypatch) -> None:
    """The file system here has a fine clock: what was written a moment ago is settled."""
    monkeypatch.setattr(facts_module, "_TICK_NS", 0)


def read(tree: FileTree, store: Path, **changes) -> FileMetadata:
    return scan_files(
        tree, store, changes.get("limits", LIMITS), changes.get("background", WHITE), changes.get("workers", 2)
    )


def scanned(root: Path, store: Path) -> tuple[FileTree, FileMetadata]:
    time.sleep(0.03)  # longer than a tick of any file system that tests run on
    tree = discover([root])
    return tree, read(tree, store)


def assert_same(one: FileMetadata, other: FileMetadata) -> None:
    for field in fields(FileMetadata):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        else:
            assert a == b, field.name


def assert_fresh(tree: FileTree, facts: FileMetadata, folder: Path) -> None:
    """What was read step by step is what one look at everything tells."""
    new = folder / f"fresh-{time.time_ns()}"
    assert_same(facts, read(tree, new))
    shutil.rmtree(new)
