"""Access control: keys that change while the server runs, clients that guess keys, headers of proxies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from image_classifier.errors import ConfigError
from image_classifier.serving.auth import AccessPolicy, AccessSettings
from image_classifier.serving.request_limits import Refusal
from tests.serving.conftest import start_server

OLD, NEW = "0123456789abcdef-old", "0123456789abcdef-new"


def asked(access: AccessPolicy, key: str = "", client: str = "192.0.2.1", path: str = "/predict") -> str | int:
    """What the log calls the key, or the status of the refusal."""
    try:
        return access.check("POST", path, {b"host": b"localhost", b"x-api-key": key.encode()}, client)
    except Refusal as refusal:
        return refusal.status


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys.txt"
    file.write_text(f"# who\nthe lab  {OLD}\n\n{NEW}\n")
    return file


def test_a_key_has_the_name_before_it_or_one_that_does_not_tell_it(keys: Path) -> None:
    access = AccessPolicy(AccessSettings(keys_file=str(keys)), "127.0.0.1")
    assert asked(access, OLD) == "the lab"
    unnamed = asked(access, NEW)
    assert isinstance(unnamed, str) and unnamed.startswith("key-") and NEW not in unnamed
    assert asked(access, "the lab") == asked(access, f"the lab {OLD}") == asked(access) == 401
    assert asked(access, path="/healthz") == ""


def test_keys_are_exchanged_while_the_server_runs(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    access = AccessPolicy(AccessSettings(keys_file=str(keys)), "127.0.0.1")
    keys.write_text(f"the lab {NEW}\n")
    access.reload_keys()
    assert asked(access, NEW) == "the lab" and asked(access, OLD) == 401
    for broken in ("", "short\n"):
        keys.write_text(broken)
        access.reload_keys()
        access.reload_keys()
        assert asked(access, NEW) == "the lab"
    keys.unlink()
    access.reload_keys()
    assert asked(access, NEW) == "the lab" and access.needs_key
    assert caplog.text.count("the API keys were not changed") == 3 and NEW not in caplog.text


def test_whoever_tries_keys_is_stopped_and_nobody_else(keys: Path) -> None:
    access = AccessPolicy(AccessSettings(keys_file=str(keys), per_minute=1, burst=3), "127.0.0.1")
    assert [asked(access, f"guess-{number}-0123456789") for number in range(5)] == [401, 401, 401, 429, 429]
    assert asked(access, OLD) == "the lab"  # from the same address
    assert asked(access, "guess", client="192.0.2.2") == 401


@pytest.mark.parametrize(
    "wrong", [{"proxies": ["proxy.example"]}, {"proxies": ["10.0.0.1/8"]}, {"keys_file": "/nowhere/keys"}]
)
def test_settings_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        AccessPolicy(AccessSettings(**wrong), "127.0.0.1")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("proxies", "status"), [("[]", 429), ("[127.0.0.0/8]", 200)])
def test_only_proxies_of_ours_say_who_asks(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxies: str, status: int
) -> None:
    monkeypatch.setitem(os.environ, "FORWARDED_ALLOW_IPS", "*")
    server = start_server(tmp_path, digits_bundle, "access.per_minute=1", "access.burst=1", f"access.proxies={proxies}")
    try:
        assert server.ask("GET", "/models", headers={"X-Forwarded-For": "192.0.2.1"}).status == 200
        assert server.ask("GET", "/models", headers={"X-Forwarded-For": "192.0.2.2"}).status == status
        assert ('"client": "192.0.2.2"' in _log_of(server.log, '"path": "/models"', 2)) == (status == 200)
    finally:
        assert server.end() == 0


@pytest.mark.slow
def test_a_running_server_looks_at_its_keys_again(digits_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(f"old {OLD}\n")
    server = start_server(tmp_path, digits_bundle, "access.keys_file=keys.txt", "reload_s=0")
    try:
        file.write_text(f"new\t{NEW}\n")
        assert server.ask("GET", "/models", headers={"X-API-Key": OLD}).status == 200
        server.process.send_signal(signal.SIGHUP)
        _log_of(server.log, "the API keys have changed", 1)
        assert server.ask("GET", "/models", headers={"X-API-Key": OLD}).status == 401
        assert server.ask("GET", "/models", headers={"X-API-Key": NEW}).status == 200
        assert '"key": "new"' in _log_of(server.log, '"path": "/models"', 3)
    finally:
        assert server.end() == 0


def _log_of(log: Path, word: str, times: int) -> str:
    end = time.monotonic() + 30
    while (text := log.read_text()).count(word) < times:
        assert time.monotonic() < end, text
        time.sleep(0.01)
    return text
