"""What messages say to install is what pyproject.toml offers."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from image_classifier.extras import EXTRA_OF, install, install_package

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
OTHER_NAMES = {"sklearn": "scikit-learn", "grpc": "grpcio"}


@pytest.mark.parametrize("package", sorted(EXTRA_OF.keys() - {"starlette"}))  # which fastapi brings
def test_an_extra_brings_the_package_that_is_said_to_lack(package: str) -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in EXTRAS[EXTRA_OF[package]]}
    assert canonicalize_name(OTHER_NAMES.get(package, package)) in declared


def test_every_extra_that_is_named_is_there() -> None:
    named = set()
    for path in (*ROOT.glob("image_classifier/**/*.py"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("conf/**/*.yaml")):
        text = path.read_text(encoding="utf-8")
        named |= set(re.findall(r"""\binstall\(["'](\w+)["']\)""", text))
        named |= {name for names in re.findall(r"image-classifier\[([\w,]+)\]", text) for name in names.split(",")}
        named |= set(re.findall(r"\bextra \[(\w+)\]", text))
    assert {"ray", "launchers", "hf"} <= named <= set(EXTRAS)


def test_a_package_of_no_extra_is_named_itself() -> None:
    assert install_package("dvc-s3") == install("s3") == "pip install 'image-classifier[s3]'"
    assert install_package("dvc-gs") == "pip install dvc-gs"
