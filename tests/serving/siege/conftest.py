"""A server that the tests of this folder may mistreat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.siege.attackers import Victim, victim


@pytest.fixture(scope="session")
def besieged(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """The digits, as served by default but for how long half a request is waited for."""
    with victim(tmp_path_factory.mktemp("besieged"), digits_bundle, "request.headers_s=2", "request.body_s=2") as found:
        yield found


@pytest.fixture(scope="session")
def seven(digits_bundle: Path) -> bytes:
    """A real seven."""
    return next(path for path in sorted((digits_bundle.parents[1] / "data/digits/test/7").iterdir())).read_bytes()
