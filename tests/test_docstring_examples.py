"""The examples in docstrings run, and there are enough of them."""

from __future__ import annotations

import doctest
import importlib

import pytest

from image_classifier.paths import PACKAGE_DIR

MODULES = [
    ".".join(path.relative_to(PACKAGE_DIR.parent).with_suffix("").parts)
    for path in sorted(PACKAGE_DIR.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
FEWEST = 45


def _examples(module: str) -> list[doctest.DocTest]:
    """Return the public functions, classes and methods of a module that have an example."""
    tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module))
    return [test for test in tests if test.examples and "._" not in test.name]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted and not result.failed


def test_many_public_functions_have_an_example() -> None:
    names = [test.name for module in MODULES for test in _examples(module)]
    assert len(names) >= FEWEST, names
