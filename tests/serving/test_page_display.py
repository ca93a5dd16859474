"""How the page looks and is operated: small screens, the keyboard, dark mode, Russian."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.serving.page_stub import CLASSES, StubServer
from tests.serving.page_tab import FOCUSED, SMALL, UNREADABLE, Open

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(("width", "locale"), [(320, "ru-RU"), (320, "en-US"), (360, "ru-RU"), (768, "en-US")])
def test_nothing_reaches_over_the_edge(width: int, locale: str, opened: Open, picture: Any, stub: StubServer) -> None:
    stub.stub.names, stub.stub.urls = ("flowers", "a-model-with-a-rather-long-name-2026-11-22"), True
    tab = opened(width=width, locale=locale, has_touch=True, is_mobile=True)
    assert tab.wait("#model-choice:visible", 1) and tab.page.locator("#photo").is_visible()
    over = "document.documentElement.scrollWidth"
    assert tab.page.evaluate(over) <= width
    tab.send(picture("roses.png", 200), picture("unsure.png"), picture("bad.png"), picture(f"{'long' * 40}.png"))
    tab.wait("#progress:visible", 0)
    tab.page.locator(".entry.done [data-key=explain]").first.click()
    tab.wait("canvas", 1)
    assert tab.page.evaluate(over) <= width
    assert tab.page.evaluate(SMALL) == []


def test_the_keyboard_reaches_everything(opened: Open, picture: Any) -> None:
    tab = opened()
    tab.wait("#classes li", len(CLASSES))
    tab.send(picture("roses.png"))
    tab.wait(".entry.done", 1)
    tab.page.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(30):
        tab.page.keyboard.press("Tab")
        seen.append(tab.page.evaluate(FOCUSED))
        assert (
            tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none" or seen[-1] == "BODY"
        )
    for name in (
        "about",
        "ru",
        "choose",
        "photo",
        "folder",
        "all",
        "save",
        "clear",
        "remove",
        "bar roses",
        "explain",
        "expand",
        "A",
    ):
        assert name in seen, (name, seen)
    tab.page.locator("#about").press("Enter")
    assert (
        tab.wait("#card[open]", 1)
        .locator("dd", has_text="97.1% (95 % confidence: 95.1% to 98.3%, on the test images)")
        .count()
        == 1
    )
    tab.page.keyboard.press("Escape")
    tab.wait("#card[open]", 0)
    assert tab.page.evaluate("document.activeElement.id") == "about"


def test_dark_is_dark_and_every_text_can_be_read(opened: Open, picture: Any) -> None:
    background = (
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b)"
    )
    for scheme in ("light", "dark"):
        tab = opened(color_scheme=scheme)
        tab.wait("#classes li", len(CLASSES))
        assert (tab.page.evaluate(background) > 600) == (scheme == "light") and tab.page.evaluate(UNREADABLE) == []
        tab.send(picture("roses.png"), picture("unsure.png"), picture("bad.png"))
        tab.wait("#progress:visible", 0)
        tab.page.locator(".entry.done [data-key=explain]").first.click()
        tab.wait("canvas", 1)
        assert tab.page.evaluate(UNREADABLE) == []


def test_russian_is_whole_and_remembered(opened: Open, picture: Any) -> None:
    tab = opened(locale="ru-RU")
    tab.wait("#classes li", len(CLASSES))
    assert (
        tab.page.locator("html").get_attribute("lang") == "ru"
        and tab.texts("h1") == ["Что на картинке?"]
        and "8 классов" in tab.texts("#lead")[0]
    )
    tab.send(picture("roses.png"), picture("unsure.png"))
    tab.wait(".entry.done", 2)
    assert (
        re.fullmatch(r"9\d,\d\s%", tab.texts(".verdict b")[0])
        and "для ответа нужно не меньше 62,0" in tab.texts(".unsure .words")[0]
    )
    tab.page.click("[data-language=en]")
    assert tab.page.locator("html").get_attribute("lang") == "en" and tab.texts(".unsure .verdict") == ["Not sure"]
    assert not re.search("[а-яё]", " ".join(tab.texts("header, main, footer")), re.IGNORECASE)
    tab.page.reload()
    assert tab.wait("#classes li", len(CLASSES)) and tab.texts("h1") == ["What is in the picture?"]
