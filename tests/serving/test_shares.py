"""What requests hold together has a limit, and a body that does not go on gives way to one that does."""

from __future__ import annotations

import asyncio

import pytest

from image_classifier.serving import request_limits
from image_classifier.serving.request_limits import MemoryBudget, MemoryLease, Refusal


def test_a_body_that_does_not_go_on_gives_way_and_is_refused_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "_STALLED_S", 0.0)

    async def scenario() -> None:
        memory = MemoryBudget(100)
        stalled, other = MemoryLease(memory), MemoryLease(memory)
        with pytest.raises(TimeoutError):
            async with stalled.of_body(60):
                stalled.take_for_body(80)
                async with other.of_body(60):
                    other.take_for_body(50)
                    assert memory.held == 50
                with pytest.raises(Refusal):
                    stalled.take_for_body(1)  # its next block was there before it heard of it
                await asyncio.sleep(30)
        other.end()
        assert memory.held == 0 and not memory.coming

    asyncio.run(scenario())


def test_a_lone_body_that_is_too_much_is_refused() -> None:
    async def scenario() -> None:
        memory = MemoryBudget(100)
        share = MemoryLease(memory)
        async with share.of_body(60):
            share.take_for_body(100)
            with pytest.raises(Refusal):
                share.take_for_body(1)
        share.end()
        assert memory.held == 0

    asyncio.run(scenario())
