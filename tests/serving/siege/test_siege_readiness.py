"""A model is ready only if it answers correctly: not while it hangs or restarts. A start may take long."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from image_classifier.errors import CheckpointError, ServerError
from image_classifier.images import DecodeLimits
from image_classifier.serving import registry
from image_classifier.serving.async_log import AsyncStream
from image_classifier.serving.registry import ModelRegistry, Reloader
from image_classifier.serving.worker import main
from image_classifier.serving.worker.batching import BatchSettings
from image_classifier.serving.worker.handle import WorkerHandle, WorkerProcess
from image_classifier.serving.worker.main import Worker
from image_classifier.serving.worker.model import LoadedModel
from image_classifier.serving.worker.spec import ModelSpec
from tests.serving.siege.attackers import Victim, until, victim
from tests.serving.siege.test_siege_process import _fake, run  # noqa: F401  # the fixture that starts the stand-in

SPEC: Any = SimpleNamespace(name="fake", path="nowhere")


def handle_of(tmp_path: Path, hang_s: float, **spec: float) -> WorkerHandle:
    return WorkerHandle(WorkerProcess({"name": "fake", "starts": str(tmp_path / "starts"), **spec}), 256, hang_s)


@pytest.mark.slow
def test_a_start_that_takes_longer_than_a_hang_is_let_be_though_probes_come(tmp_path: Path) -> None:
    async def scenario() -> None:
        handle = handle_of(tmp_path, 0.5, slow_s=2.0)
        await handle.start()
        os.kill(handle.worker.process.pid, signal.SIGKILL)
        asked = asyncio.create_task(handle.request({"do": "answer"}))
        while not handle.starting:
            await asyncio.sleep(0.01)
        while handle.starting:
            with pytest.raises(ServerError, match="being restarted"):
                await handle.request({"do": "canary"}, retry=False)
            await asyncio.sleep(0.1)
        assert (await asked)[0]["bytes"] == 0 and handle.restarts == 1
        await handle.stop()

    run(scenario())


def test_what_is_started_again_must_answer_the_known_image_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        handle = handle_of(tmp_path, 20, wrong=2)
        await handle.start()
        os.kill(handle.worker.process.pid, signal.SIGKILL)
        assert (await handle.request({"do": "answer"}))[0]["bytes"] == 0
        assert handle.restarts == 3  # two that answered otherwise, and one that did not
        await handle.stop()

    run(scenario())


@pytest.mark.slow
def test_a_probe_that_goes_away_leaves_the_verdict_to_the_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        served = ModelRegistry([(SPEC, WorkerProcess({"name": "fake"}))], 256, 20, 0.6)
        await served.start()
        (one,) = served
        assert one.last_problem == ""
        os.kill(one.handle.worker.process.pid, signal.SIGSTOP)
        await asyncio.sleep(registry._FRESH_S)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(served.probe(one), 0.1)  # as a probe with less patience than the canary
        await asyncio.sleep(0.8)
        assert "no answer within" in one.last_problem
        await served.stop()

    run(scenario())


def test_figures_are_true_where_nobody_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PROBE_S", 0.2)
    monkeypatch.setattr(registry, "_FRESH_S", 0.1)

    async def scenario() -> None:
        served = ModelRegistry([(SPEC, WorkerProcess({"name": "fake"}))], 256, 20, 0.3)
        await served.start()
        (one,) = served
        asking = asyncio.create_task(served.probe_regularly())
        os.kill(one.handle.worker.process.pid, signal.SIGSTOP)
        while not one.last_problem:
            await asyncio.sleep(0.05)
        os.kill(one.handle.worker.process.pid, signal.SIGCONT)
        while one.last_problem:
            await asyncio.sleep(0.05)
        asking.cancel()
        await served.stop()

    run(scenario())


@pytest.fixture
def probed(digits_bundle: Path, tmp_path: Path) -> Iterator[Victim]:
    with victim(tmp_path, digits_bundle, "canary_s=1") as found:
        yield found


@pytest.mark.slow
def test_probes_say_what_the_process_does_while_it_stands_still_and_after(probed: Victim) -> None:
    ready, (pid,) = ("/readyz", "/v2/health/ready", "/v2/models/digits/ready"), probed.model_pids
    assert [probed.ask(path)[0] for path in ready] == [200] * 3 and probed.gauge("ready{") == 1
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(registry._FRESH_S)  # an answer is as old at most
        start = time.monotonic()
        status, _, content = probed.ask("/readyz")
        assert status == 503 and b"no answer within 1 s" in content, content
        assert time.monotonic() - start < 10  # a second, and not the half a minute of requests
        assert [probed.ask(path)[0] for path in ready] == [503] * 3 and probed.gauge("ready{") == 0
        assert probed.ask("/healthz")[0] == 200
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: probed.ask("/readyz")[0] == 200, "it is ready again")
    assert probed.gauge("restarts") == 0 and probed.model_pids == [pid] and probed.gauge("ready{") == 1


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set where a process would have ended itself."""
    event = threading.Event()

    def end(code: int) -> None:
        assert code == main._HUNG_EXIT_CODE
        event.set()
        time.sleep(3600)

    monkeypatch.setattr(main.os, "_exit", end)
    return event


@pytest.mark.parametrize("hangs", ["decoder", "model"])
def test_a_decoder_or_a_model_that_hangs_ends_its_process(hangs: str, ended: threading.Event) -> None:
    go_on, spec = (
        threading.Event(),
        SimpleNamespace(batch=BatchSettings(), limits=DecodeLimits(), decode_s=0.4, hang_s=0.4),
    )

    def wait(*_: object) -> np.ndarray:
        go_on.wait(30)
        return np.zeros((8, 8, 3), np.uint8)

    quick = lambda *_: np.zeros((8, 8, 3), np.uint8)  # noqa: E731
    preprocess = SimpleNamespace(read=wait if hangs == "decoder" else quick)
    backend = SimpleNamespace(logits=wait)
    predictor = SimpleNamespace(detector=None, limits=DecodeLimits(), backend=backend, preprocess=preprocess)
    model: Any = SimpleNamespace(predictor=predictor)
    process = Worker(model, spec, lambda message: None, AsyncStream(2))  # type: ignore[arg-type]
    process.take({"do": "image", "id": 1, "name": "a.png"}, main._png(np.zeros((3, 8, 8), np.uint8)))
    assert ended.wait(10)
    go_on.set()


def test_a_known_image_with_another_answer_is_told(digits_bundle: Path) -> None:
    model = LoadedModel.load(ModelSpec("digits", str(digits_bundle)))
    right = model.predictor.backend.logits(model.golden_pixels())
    assert model.check_golden(right) == ""
    assert "differs from the one in the bundle" in model.check_golden(-right)
    assert "not finite" in model.check_golden(np.full_like(right, np.nan)) and "the wrong shape" in model.check_golden(
        right[:, :3]
    )


def test_a_version_that_failed_once_is_tried_again_later_and_at_once_when_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tries: list[float] = []

    async def reload(self: ModelRegistry, name: str, spec: ModelSpec) -> None:
        tries.append(time.monotonic())
        if len(tries) < 4:
            raise CheckpointError("a reason that passes")

    monkeypatch.setattr(ModelRegistry, "reload", reload)
    monkeypatch.setattr(registry, "version_of", lambda path: "2")
    spec: Any = ModelSpec("fake", str(tmp_path))
    one = SimpleNamespace(spec=spec, handle=SimpleNamespace(metadata={"version": "1"}))
    place: Any = SimpleNamespace(find=lambda: tmp_path)

    class Few(ModelRegistry):
        def __init__(self) -> None:
            self._served = {"fake": one}  # type: ignore[dict-item]

    async def scenario() -> None:
        reloader = Reloader(Few(), {"fake": place}, 0.05)
        looking = asyncio.create_task(reloader.run())
        while len(tries) < 2:
            await asyncio.sleep(0.05)
        assert tries[1] - tries[0] >= 0.9  # not before the pause is over
        reloader.check_now()
        while len(tries) < 3:
            await asyncio.sleep(0.01)
        assert tries[2] - tries[1] < 1.5  # twice the pause would be two seconds
        looking.cancel()

    run(scenario())
