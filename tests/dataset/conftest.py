"""Fixtures and helpers of the scans: a store of facts, what was opened, and comparing with a fresh look."""

from __future__ import annotations

import shutil
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from image_classifier.dataset import scan as facts_module
from image_classifier.dataset.discovery import Tree, find
from image_classifier.dataset.scan import Facts, read_facts
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


def read(tree: Tree, store: Path, **changes) -> Facts:
    return read_facts(
        tree, store, changes.get("limits", LIMITS), changes.get("background", WHITE), changes.get("workers", 2)
    )


def scanned(root: Path, store: Path) -> tuple[Tree, Facts]:
    time.sleep(0.03)  # longer than a tick of any file system that tests run on
    tree = find([root])
    return tree, read(tree, store)


def assert_same(one: Facts, other: Facts) -> None:
    for field in fields(Facts):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        else:
            assert a == b, field.name


def assert_fresh(tree: Tree, facts: Facts, folder: Path) -> None:
    """What was read step by step is what one look at everything tells."""
    new = folder / f"fresh-{time.time_ns()}"
    assert_same(facts, read(tree, new))
    shutil.rmtree(new)
