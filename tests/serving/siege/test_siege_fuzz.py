"""Images as attackers send them: each has an answer or a reason, and nothing ends or grows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.siege.attackers import Victim, form
from tests.serving.siege.mutations import answered, mutated, oddities

_COUNT = 1000  # more of them by hand: mutations.py


def test_files_that_are_no_pictures_or_too_many_things_have_their_reason(besieged: Victim, seven: bytes) -> None:
    before = besieged.gauge("restarts")
    for name, content in oddities(seven).items():
        status, headers, said = besieged.ask("/predict", form(content))
        assert status in (200, 422) and headers["content-type"] == "application/json", (name, status, said)
        assert b"passwd" not in said and b"<script" not in said
    assert besieged.gauge("restarts") == before


@pytest.mark.slow
def test_no_mutated_picture_ends_or_fills_the_models_process(besieged: Victim, seven: bytes) -> None:
    before = besieged.gauge("restarts")
    answered(besieged, list(mutated(300, seed=1)))  # what is loaded once is loaded
    memory = besieged.memory()
    statuses = answered(besieged, list(mutated(_COUNT)))
    assert statuses[200] and statuses[422]
    assert besieged.gauge("restarts") == before and besieged.gauge("queue_images") == 0
    assert all(now - then < 60 for now, then in zip(besieged.memory(), memory, strict=True))
    assert besieged.predict(seven)["predictions"][0]["predicted_class"]


@pytest.mark.slow
def test_dirty_pictures_of_the_world_have_their_answer_or_reason(besieged: Victim, shared_data: Path) -> None:
    paths = [
        path
        for path in shared_data.rglob("*")
        if path.is_file() and path.stat().st_size < 2**22 and "dirty" in str(path)
    ][:300]
    if not paths:
        pytest.skip("no dirty images beside the repository")
    before = besieged.gauge("restarts")
    answered(besieged, [path.read_bytes() for path in paths])
    assert besieged.gauge("restarts") == before
