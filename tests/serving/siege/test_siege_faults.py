"""Killed and stopped processes, shutdown, full disks, a wall clock that jumps: every accepted request is answered."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest

import image_classifier.serving
from tests.conftest import ROOT
from tests.serving.siege.attackers import (
    HANG_S,
    Victim,
    begun,
    exchange,
    form,
    head,
    keep_asking,
    until,
    victim,
    wait_until_ready,
)

_CLIENTS = 16
Fault = Callable[[], None]
Replies = list[tuple[int, bytes]]


def loaded(found: Victim, image: bytes, faults: Iterable[tuple[float, Fault]], after_s: float = 1.0) -> Replies:
    """What sixteen clients get that ask all the time while, after so many seconds each, these things happen."""
    body = form(image)
    request = head("POST", "/predict", body, more=b"Connection: close\r\n") + body

    async def scenario() -> Replies:
        going = True
        asking = asyncio.create_task(keep_asking(found.port, request, _CLIENTS, lambda: going))
        for wait_s, fault in faults:
            await asyncio.sleep(wait_s)
            fault()
        await asyncio.sleep(after_s)
        going = False
        return await asking

    return asyncio.run(scenario())


def send(pid: int, number: int) -> Fault:
    def fault() -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    return fault


def only_200(replies: Replies) -> bool:
    statuses = Counter(status for status, _ in replies)
    assert set(statuses) == {200}, (statuses, [reply for reply in replies if reply[0] != 200][:3])
    return True


@pytest.mark.slow
def test_no_request_is_lost_when_the_models_process_is_killed(
    digits_bundle: Path, tmp_path: Path, seven: bytes
) -> None:
    with victim(tmp_path, digits_bundle) as found:

        def kill() -> None:
            for pid in found.model_pids:
                send(pid, signal.SIGKILL)()

        chance = random.Random(1)
        replies = loaded(found, seven, [(chance.uniform(1.5, 2.5), kill) for _ in range(4)])
        assert only_200(replies) and len(replies) > 4 * _CLIENTS
        assert found.gauge("restarts") >= 3 and found.gauge("queue_images") == 0


@pytest.mark.slow
def test_no_request_is_lost_when_the_models_process_stands_still(
    digits_bundle: Path, tmp_path: Path, seven: bytes
) -> None:
    with victim(tmp_path, digits_bundle, "canary_s=1", "hang_s=2") as found:
        assert only_200(loaded(found, seven, [(1, lambda: send(found.model_pids[0], signal.SIGSTOP)())], after_s=5))
        assert found.gauge("restarts") == 1 and found.ask("/readyz")[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]],
    ids=str,
)
@pytest.mark.parametrize("killed", ["", "before", "after"])
def test_what_was_begun_is_answered_before_the_end(
    digits_bundle: Path, tmp_path: Path, seven: bytes, numbers: list[int], killed: str
) -> None:
    found = begun(tmp_path, digits_bundle)
    try:
        wait_until_ready(found)
        ends: list[tuple[float, Fault]] = [(0.01, send(found.process.pid, number)) for number in numbers]
        death = (0.0, send(found.model_pids[0], signal.SIGKILL))
        order = {"": ends, "before": [death, *ends], "after": [*ends, death]}[killed]
        replies = loaded(found, seven, [(1, lambda: None), *order])
        code = found.process.wait(HANG_S)
        assert code == 0 or (code == 130 and numbers[1:] == [signal.SIGINT]), (
            found.words()
        )  # a Ctrl-C after that ends it at once
    finally:
        found.end(signal.SIGKILL)
    statuses = Counter(status for status, _ in replies)
    assert statuses[200] and set(statuses) <= {200, 503, 0, -1}, statuses
    assert all(b"stopping" in content for status, content in replies if status == 503)
    logged = Counter(request["status"] for request in found.requests() if request["path"] == "/predict")
    assert logged == Counter(
        {status: count for status, count in statuses.items() if status > 0}
    )  # those of 0 were never taken
    assert "Traceback" not in "\n".join(found.words()), found.words()


@pytest.mark.slow
def test_what_cannot_be_finished_in_time_is_told_so(digits_bundle: Path, tmp_path: Path, seven: bytes) -> None:
    with victim(tmp_path, digits_bundle, "drain_s=1") as found:
        os.kill(found.model_pids[0], signal.SIGSTOP)
        body = form(seven)
        request = head("POST", "/predict", body, more=b"Connection: close\r\n") + body

        async def scenario() -> Replies:
            asked = [asyncio.create_task(exchange(found.port, request)) for _ in range(4)]
            await asyncio.sleep(1)
            found.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*asked)

        replies = asyncio.run(scenario())
        assert [status for status, _ in replies] == [503] * 4 and all(b"stopping" in content for _, content in replies)


@pytest.mark.slow
@pytest.mark.parametrize("wait_s", [0.7, 1.2, 2.0])
def test_it_ends_at_once_while_it_starts(digits_bundle: Path, tmp_path: Path, wait_s: float) -> None:
    """A model may take minutes to load; here its process does not even begin."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import sys, time\nif any('worker.main' in word for word in sys.orig_argv): time.sleep(60)\n"
    )
    found = begun(tmp_path, digits_bundle, env={**os.environ, "PYTHONPATH": str(slow)})
    try:
        time.sleep(wait_s)
        assert found.end(signal.SIGTERM) in (0, -signal.SIGTERM)  # the latter before anything was begun
        assert wait_s < 2 or found.process.returncode == 0
    finally:
        found.end(signal.SIGKILL)
    assert "Traceback" not in "\n".join(found.words()), found.words()


@pytest.mark.slow
def test_a_full_disk_costs_no_request(digits_bundle: Path, tmp_path: Path, seven: bytes) -> None:
    """Nothing can be written anywhere: no log, no temporary file; a large upload is kept in memory."""

    def no_file() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    with victim(
        tmp_path,
        digits_bundle,
        preexec_fn=no_file,
        env={**os.environ, "TMPDIR": "/nowhere", "PYTHONDONTWRITEBYTECODE": "1"},
    ) as found:
        assert only_200(loaded(found, seven, []))
        assert found.ask("/predict", form(seven, bytes(30 * 2**20)))[0] == 200


@pytest.mark.slow
def test_a_log_that_cannot_be_written_costs_no_request(digits_bundle: Path, tmp_path: Path, seven: bytes) -> None:
    with Path("/dev/full").open("w") as full, victim(tmp_path, digits_bundle, stderr=full) as found:
        assert only_200(loaded(found, seven, []))


@pytest.mark.slow
def test_a_log_that_nobody_reads_costs_no_request(digits_bundle: Path, tmp_path: Path, seven: bytes) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    try:
        with victim(tmp_path, digits_bundle, stderr=writing) as found:  # it also ends when it is told to
            replies = loaded(found, seven, [], after_s=2)
            assert only_200(replies) and len(replies) > 50
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.slow
def test_a_registry_that_does_not_answer_holds_up_no_end(digits_bundle: Path, tmp_path: Path, seven: bytes) -> None:
    """The folder of the model is looked for where nothing comes back."""
    stuck = tmp_path / "stuck"
    stuck.mkdir()
    (stuck / "sitecustomize.py").write_text(
        "import sys, time\n"
        "if 'serve' in sys.orig_argv:\n"
        "    from image_classifier.serving import model_sources\n"
        "    real, began = model_sources.LocalModel.find, time.monotonic()\n"
        "    def find(self):\n"
        "        return real(self) if time.monotonic() - began < 4 else time.sleep(600)\n"
        "    model_sources.LocalModel.find = find\n"
    )
    with victim(tmp_path, digits_bundle, "reload_s=0.2", env={**os.environ, "PYTHONPATH": f"{stuck}:{ROOT}"}) as found:
        assert only_200(loaded(found, seven, [], after_s=6))
        start = time.monotonic()
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_a_wall_clock_that_jumps_changes_nothing(digits_bundle: Path, tmp_path: Path, seven: bytes) -> None:
    """Each look at it is up to a year away from the one before, in the server and in the model's process."""
    jumping = tmp_path / "jumping"
    jumping.mkdir()
    (jumping / "sitecustomize.py").write_text(
        "import random, time\nreal = time.time\ntime.time = lambda: real() + random.uniform(-3e7, 3e7)\n"
        "time.time_ns = lambda: int(1e9 * time.time())\n"
    )
    line = ("canary_s=1", "hang_s=2", "reload_s=0.2", "access.per_minute=1000000", "access.burst=1000000")
    with victim(tmp_path, digits_bundle, *line, env={**os.environ, "PYTHONPATH": str(jumping)}) as found:
        assert only_200(loaded(found, seven, [], after_s=4))
        assert found.ask("/readyz")[0] == 200 and found.gauge("restarts") == 0


def test_no_time_is_measured_with_the_wall_clock() -> None:
    folder = Path(image_classifier.serving.__file__).parent
    texts = {path.name: path.read_text() for path in folder.rglob("*.py")}
    known = {
        "metrics.py": {"time.time()"},
        "request_log.py": {"time.gmtime()"},
        "drift_window.py": {"time.time()"},
    }  # stamps
    for name, text in texts.items():
        found = set(re.findall(r"(?:time\.(?:time|gmtime|localtime)|datetime\.now|utcnow)\(\)", text))
        assert found <= known.get(name, set()), name


@pytest.mark.slow
def test_a_killed_server_leaves_no_process_behind(digits_bundle: Path, tmp_path: Path) -> None:
    found = begun(tmp_path, digits_bundle)
    wait_until_ready(found)
    (pid,) = found.model_pids
    found.end(signal.SIGKILL)
    until(
        lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes(),
        "the model's process ends",
    )
