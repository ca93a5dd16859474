"""The table of backends: each row opens by a function that is there, and answers the golden images."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from image_classifier.bundle import read_bundle
from image_classifier.inference.backends import BACKENDS
from image_classifier.inference.verify import verify_backend


@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_names_a_function_that_opens_it(name: str) -> None:
    module, _, function = BACKENDS[name].opener.partition(":")
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_gives_the_golden_answers(name: str, digits_bundle: Path) -> None:
    bundle = read_bundle(digits_bundle)
    if name.startswith("openvino"):
        pytest.skip("OpenVINO answers in processes of their own: see tests/exporting/test_export.py")
    if not BACKENDS[name].fits(bundle):
        pytest.skip(f"{name} is not installed, or the bundle has no file for it")
    assert verify_backend(bundle, name).agreement == 1.0
