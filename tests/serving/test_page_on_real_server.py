"""The page and the server as they are delivered, together, in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import Server
from tests.serving.page_tab import Tab

pytestmark = pytest.mark.browser


def test_real_digits_get_the_servers_answers_and_heat_maps(
    chromium: Any, server: Server, digits_bundle: Path, tmp_path: Path
) -> None:
    digits = sorted((digits_bundle.parents[1] / "data/digits/test").rglob("*.png"))[:30]
    (bad := tmp_path / "note.png").write_text("no picture")
    tab = Tab(chromium, f"http://127.0.0.1:{server.port}")
    tab.send(*digits[:3], bad)
    tab.wait(".entry.done", 3)
    assert "not a JPEG" in tab.page.locator(".entry:not(.done)").first.text_content()
    assert set(tab.texts(".verdict bdi")) <= set(map(str, range(10)))
    tab.page.locator(".entry.done [data-key=explain]").first.click()
    tab.wait(".picture canvas", 1)
    tab.send(*digits[3:])
    tab.page.locator(".entry.done").nth(29).wait_for(timeout=60_000)
    assert tab.quiet(), tab.complaints
    tab.page.goto(f"http://127.0.0.1:{server.port}/docs")
    assert tab.page.locator(".operation").count() > 10 and tab.quiet(), tab.complaints
    tab.context.close()
