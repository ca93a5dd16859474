"""A bundle is replaced under load: both versions answer, and no request is lost or delayed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from image_classifier.bundle import INFO_NAME
from tests.serving.siege.attackers import Victim, form, head, keep_asking, until, victim

_EVERY = "reload_s=0.3"


@pytest.fixture
def bundle(digits_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(digits_bundle, tmp_path / "served")
    return tmp_path / "served"


def another(bundle: Path, place: Path, damaged: bool = False) -> Path:
    """The same model with another history, and so another version; damaged: its network is none."""
    shutil.copytree(bundle, place)
    info = json.loads((place / INFO_NAME).read_text())
    info["provenance"] = {**info.get("provenance", {}), "git": place.name}
    (place / INFO_NAME).write_text(json.dumps(info))
    if damaged:
        (place / "model.onnx").write_bytes(b"no network")
    return place


def exchange_folders(bundle: Path, fresh: Path) -> None:
    """As people do it: for a moment there is nothing in its place."""
    os.rename(bundle, bundle.with_name(f"{bundle.name}-of-before-{fresh.name}"))
    os.rename(fresh, bundle)


def versions_under_load(
    found: Victim, image: bytes, change: Callable[[], None], done: Callable[[], bool]
) -> Counter[str]:
    """Return the versions that answered sixteen busy clients during a change; check that all were answered."""
    body = form(image)
    request = head("POST", "/predict", body, more=b"Connection: close\r\n") + body

    async def scenario() -> Counter[str]:
        going = True
        asking = asyncio.create_task(keep_asking(found.port, request, 16, lambda: going))
        await asyncio.sleep(0.5)
        change()
        await asyncio.to_thread(until, done, "the change has its effect")
        await asyncio.sleep(0.5)
        going = False
        replies = await asking
        assert {status for status, _ in replies} == {200}, Counter(status for status, _ in replies)
        return Counter(json.loads(content)["model_version"] for _, content in replies)

    return asyncio.run(scenario())


def version(found: Victim) -> str:
    return str(json.loads(found.ask("/model")[2])["version"])


@pytest.mark.slow
def test_a_new_version_takes_over_without_a_lost_request(bundle: Path, tmp_path: Path, seven: bytes) -> None:
    fresh = another(bundle, tmp_path / "fresh")
    with victim(tmp_path, bundle, _EVERY) as found:
        before, (old,) = version(found), found.model_pids
        seen = versions_under_load(
            found, seven, lambda: exchange_folders(bundle, fresh), lambda: version(found) != before
        )
        assert set(seen) == {before, version(found)}
        until(lambda: len(found.model_pids) == 1 and old not in found.model_pids, "the old process is gone")
        assert found.gauge("queue_images") == 0 and found.ask("/readyz")[0] == 200


@pytest.mark.slow
def test_a_hangup_is_the_time_to_look_where_there_is_no_other(bundle: Path, tmp_path: Path, seven: bytes) -> None:
    fresh = another(bundle, tmp_path / "fresh")
    with victim(tmp_path, bundle, "reload_s=0") as found:
        before = version(found)

        def hang_up() -> None:
            found.process.send_signal(signal.SIGHUP)

        exchange_folders(bundle, fresh)
        time.sleep(1)
        assert version(found) == before
        seen = versions_under_load(found, seven, hang_up, lambda: version(found) != before)
        assert set(seen) == {before, version(found)} and found.ask("/readyz")[0] == 200


@pytest.mark.slow
def test_an_alias_that_points_elsewhere_is_followed(bundle: Path, tmp_path: Path, seven: bytes) -> None:
    alias, fresh = tmp_path / "production", another(bundle, tmp_path / "fresh")
    alias.symlink_to(bundle)

    def point() -> None:
        (tmp_path / "next").symlink_to(fresh)
        os.replace(tmp_path / "next", alias)

    with victim(tmp_path, alias, _EVERY) as found:
        before = version(found)
        assert len(versions_under_load(found, seven, point, lambda: version(found) != before)) == 2
        assert json.loads(found.ask("/model")[2])["name"] == "production"


@pytest.mark.slow
def test_a_broken_version_is_said_once_and_the_old_one_stays(bundle: Path, tmp_path: Path, seven: bytes) -> None:
    broken, mended = another(bundle, tmp_path / "broken", damaged=True), another(bundle, tmp_path / "mended")
    with victim(tmp_path, bundle, _EVERY) as found:
        before, (old,) = version(found), found.model_pids

        def complaints() -> list[str]:
            return [line for line in found.words() if "stays at version" in line]

        seen = versions_under_load(found, seven, lambda: exchange_folders(bundle, broken), lambda: bool(complaints()))
        assert set(seen) == {before} and found.model_pids[:1] == [old]
        said = versions_under_load(found, seven, lambda: None, lambda: True)
        assert set(said) == {before}
        assert len(set(complaints())) == len(complaints()), complaints()
        seen = versions_under_load(
            found, seven, lambda: exchange_folders(bundle, mended), lambda: version(found) != before
        )
        assert version(found) in seen


@pytest.mark.slow
def test_a_bundle_that_is_gone_stops_nothing(bundle: Path, tmp_path: Path, seven: bytes) -> None:
    with victim(tmp_path, bundle, _EVERY) as found:
        moved = bundle.with_name("moved")
        versions_under_load(
            found,
            seven,
            lambda: os.rename(bundle, moved),
            lambda: any("stays at version" in line for line in found.words()),
        )
        os.rename(moved, bundle)
        assert len([line for line in found.words() if "stays at version" in line]) == 1
