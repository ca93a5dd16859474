"""The memory of all requests is limited, and a stalled upload is dropped when others need its memory."""

from __future__ import annotations

import asyncio

import pytest

from image_classifier.serving import request_limits
from image_classifier.serving.request_limits import MemoryBudget, MemoryLease, Refusal


def test_a_stalled_upload_is_evicted_and_refused_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "_STALLED_S", 0.0)

    async def scenario() -> None:
        memory = MemoryBudget(100)
        stalled, other = MemoryLease(memory), MemoryLease(memory)
        with pytest.raises(TimeoutError):
            async with stalled.upload(60):
                stalled.take_for_upload(80)
                async with other.upload(60):
                    other.take_for_upload(50)
                    assert memory.used == 50
                with pytest.raises(Refusal):
                    stalled.take_for_upload(1)  # its next block was there before it heard of it
                await asyncio.sleep(30)
        other.end()
        assert memory.used == 0 and not memory.uploads

    asyncio.run(scenario())


def test_a_lone_body_that_is_too_much_is_refused() -> None:
    async def scenario() -> None:
        memory = MemoryBudget(100)
        lease = MemoryLease(memory)
        async with lease.upload(60):
            lease.take_for_upload(100)
            with pytest.raises(Refusal):
                lease.take_for_upload(1)
        lease.end()
        assert memory.used == 0

    asyncio.run(scenario())
