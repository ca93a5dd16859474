"""pip (requirements.txt) and Poetry (poetry.lock) install the same set, and the Dockerfile parts of it."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import tomllib
from importlib import metadata
from itertools import product
from pathlib import Path

import pytest
from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
RELOCK = (
    "run `make lock` and commit pyproject.toml, poetry.lock, requirements.txt and deploy/requirements-*.txt together"
)
MACHINES = {
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"},
    "linux-arm": {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "aarch64",
        "os_name": "posix",
    },
    "macos": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64", "os_name": "posix"},
    "windows": {"sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64", "os_name": "nt"},
}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
LOCK = tomllib.loads((ROOT / "poetry.lock").read_text(encoding="utf-8"))


def lines_of(name: str) -> list[str]:
    return (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ").splitlines()


REQUIREMENTS = lines_of("requirements.txt")
SERVE, BUILD = lines_of("deploy/requirements-serve.txt"), lines_of("deploy/requirements-build.txt")


def environment(python: str, machine: str) -> dict[str, str]:
    return {
        **default_environment(),
        **MACHINES[machine],
        "python_version": python,
        "python_full_version": f"{python}.0",
    }


def from_poetry(
    target: dict[str, str], only: str | None = None, extras: tuple[str, ...] = tuple(EXTRAS)
) -> dict[str, str]:
    """Return name and version of what `poetry install --all-extras` installs, of every group or of `only` one."""
    chosen = {}
    for package in LOCK["package"]:
        groups = [group for group in package["groups"] if only in (None, group)]
        markers = package.get("markers", "")  # one text, or one per group; a group without one always wants the package
        markers = [markers.get(group, "") if isinstance(markers, dict) else markers for group in groups]
        if any(
            not marker or Marker(marker).evaluate({**target, "extra": extra})
            for marker in markers
            for extra in ("", *extras)
        ):
            chosen[canonicalize_name(package["name"])] = package["version"]
    return chosen


def from_pip(target: dict[str, str], lines: list[str] = REQUIREMENTS) -> dict[str, str]:
    """What `pip install -r requirements.txt` (or another list) puts on the `target` environment, name to version."""
    chosen = {}
    for line in lines:
        requirement = Requirement(line.split(" --hash", 1)[0])
        if requirement.marker is None or requirement.marker.evaluate(target):
            (pin,) = requirement.specifier
            assert pin.operator == "==", f"{line!r} is not pinned: {RELOCK}"
            chosen[canonicalize_name(requirement.name)] = pin.version
    return chosen


def test_the_lock_was_made_from_this_pyproject() -> None:
    """The same digest that Poetry 2 computes (poetry.packages.locker.Locker._get_content_hash)."""
    relevant_keys = ("requires-python", "dependencies", "optional-dependencies")
    poetry = PYPROJECT["tool"]["poetry"]
    relevant = {
        "project": {key: PYPROJECT["project"][key] for key in relevant_keys if key in PYPROJECT["project"]},
        "dependency-groups": PYPROJECT["dependency-groups"],
        "tool": {
            "poetry": {
                key: poetry[key]
                for key in ("dependencies", "source", "extras", "dev-dependencies", "group")
                if key in poetry
            }
        },
    }
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
    assert digest == LOCK["metadata"]["content-hash"], f"pyproject.toml changed after poetry.lock was made: {RELOCK}"


@pytest.mark.parametrize(("python", "machine"), list(product(PYTHONS, MACHINES)))
def test_pip_and_poetry_choose_the_same_versions(python: str, machine: str) -> None:
    target = environment(python, machine)
    assert from_pip(target) == from_poetry(target), f"requirements.txt and poetry.lock differ: {RELOCK}"


@pytest.mark.parametrize(("python", "machine"), list(product(PYTHONS, MACHINES)))
def test_the_image_holds_what_poetry_would_give_it(python: str, machine: str) -> None:
    target = environment(python, machine)
    assert from_pip(target, SERVE) == from_poetry(target, only="main", extras=("serve",)), (
        f"deploy/requirements-serve.txt: {RELOCK}"
    )
    assert from_pip(target, BUILD) == from_poetry(target, only="build", extras=()), (
        f"deploy/requirements-build.txt: {RELOCK}"
    )


def test_the_image_is_built_by_what_pyproject_asks_for() -> None:
    pinned = from_pip(environment("3.13", "linux"), BUILD)
    for requirement in map(Requirement, PYPROJECT["build-system"]["requires"]):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), f"{requirement}: {RELOCK}"


def test_pip_accepts_no_file_that_poetry_does_not_know() -> None:
    known = {
        (canonicalize_name(package["name"]), package["version"]): {file["hash"] for file in package["files"]}
        for package in LOCK["package"]
    }
    for line in (*REQUIREMENTS, *SERVE, *BUILD):
        requirement = Requirement(line.split(" --hash", 1)[0])
        (pin,) = requirement.specifier
        hashes = set(re.findall(r"--hash=(\S+)", line))
        assert hashes, f"{requirement.name} has no hash: {RELOCK}"
        assert hashes <= known[canonicalize_name(requirement.name), pin.version], (
            f"{requirement.name}: unknown hashes: {RELOCK}"
        )


def test_every_declared_dependency_is_pinned_within_its_bounds() -> None:
    groups = [PYPROJECT["project"]["dependencies"], *EXTRAS.values(), *PYPROJECT["dependency-groups"].values()]
    declared = [line for group in groups for line in group]
    pinned = from_pip(environment("3.11", "linux"))
    for requirement in map(Requirement, declared):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}: {RELOCK}"


def test_this_environment_holds_the_locked_versions() -> None:
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip(f"{sys.executable} is not the project's own .venv: its versions are its owner's affair")
    locked = from_poetry(dict(default_environment()))
    held = {canonicalize_name(found.name): found.version for found in metadata.distributions()}
    wrong = {name: (version, held.get(name)) for name, version in locked.items() if held.get(name) != version}
    assert not wrong, (
        f"locked, installed on Python {platform.python_version()}: {wrong}; run `rm -f .venv/.installed && make setup`"
    )
