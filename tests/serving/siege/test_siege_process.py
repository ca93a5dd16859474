"""A worker process that dies, hangs or stops reading: every request gets its answer or its own error."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from image_classifier.serving.worker import handle
from image_classifier.serving.worker.handle import DeadlineExceeded, WorkerCrash, WorkerHandle, WorkerProcess

Scenario = Callable[[WorkerHandle], Awaitable[None]]


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen

    def start(line: list[str], **options: Any) -> Any:
        return real([*line[:2], "tests.serving.siege.fake_model", line[-1]], **options)

    # Only there: another thread of a test run may be starting a program of its own.
    monkeypatch.setattr(handle, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))


@asynccontextmanager
async def fake(hang_s: float = 20.0) -> AsyncIterator[WorkerHandle]:
    handle = WorkerHandle(WorkerProcess({"name": "fake"}), 256, hang_s)
    await handle.start()
    try:
        yield handle
    finally:
        await handle.stop()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await scenario

    asyncio.run(limited())


async def pid_of(handle: WorkerHandle) -> int:
    return int((await handle.request({"do": "answer"}))[0]["pid"])


def test_who_kills_the_process_is_told_so_and_the_neighbours_have_their_answers() -> None:
    async def scenario() -> None:
        async with fake() as handle:
            first = await pid_of(handle)
            deadly = asyncio.create_task(handle.request({"do": "die"}))
            neighbours = [
                asyncio.create_task(handle.request({"do": "wait"}, b"%d" % number * 100)) for number in range(16)
            ]
            answers = await asyncio.gather(*neighbours)
            with pytest.raises(WorkerCrash):
                await deadly
            assert {answer["bytes"] for answer, _ in answers} == {100, 200}
            assert handle.restarts == 3 and await pid_of(handle) != first and not handle._pending

    run(scenario())


def test_what_the_process_had_not_read_when_it_died_is_answered_by_the_next() -> None:
    """Megabytes wait for a process that has stopped reading; the next process gets its file descriptor."""

    async def scenario() -> None:
        async with fake() as handle:
            first = await pid_of(handle)
            os.kill(first, signal.SIGSTOP)
            asked = [asyncio.create_task(handle.request({"do": "answer"}, bytes(2**21))) for _ in range(8)]
            await asyncio.sleep(0.2)
            os.kill(first, signal.SIGKILL)
            assert [answer["bytes"] for answer, _ in await asyncio.gather(*asked)] == [2**21] * 8

    run(scenario())


def test_a_process_that_hangs_is_replaced_also_where_few_ask() -> None:
    async def scenario() -> None:
        async with fake(hang_s=0.8) as handle:
            first = await pid_of(handle)
            os.kill(first, signal.SIGSTOP)
            for _ in range(4):
                with pytest.raises(DeadlineExceeded):
                    await handle.request({"do": "answer"}, timeout_s=0.1)
                await asyncio.sleep(0.1)
            assert await pid_of(handle) != first and handle.restarts == 1

    run(scenario())


@pytest.mark.slow
def test_a_process_that_is_asked_nothing_hangs_not() -> None:
    async def scenario() -> None:
        async with fake(hang_s=0.4) as handle:
            first = await pid_of(handle)
            await asyncio.sleep(1.2)
            assert await pid_of(handle) == first

    run(scenario())


@pytest.mark.slow
def test_a_request_outlives_processes_that_are_killed_from_outside() -> None:
    async def scenario() -> None:
        async with fake() as handle:
            asked = [asyncio.create_task(handle.request({"do": "wait"})) for _ in range(40)]
            for _ in range(2):
                await asyncio.sleep(0.3)
                os.kill(handle.worker.process.pid, signal.SIGKILL)
            assert len(await asyncio.gather(*asked)) == 40

    run(scenario())
