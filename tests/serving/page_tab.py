"""The page in a tab of its own, and what is asked of it there in JavaScript."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_REFUSED = re.compile(
    r"Failed to load resource: the server responded with a status of (401|422|503)"
)  # the browser's own line for each

FOCUSED = """((e) => e === document.body ? "BODY" : e.dataset.key ?? e.dataset.language ?? e.dataset.filter
    ?? (e.id || e.className || e.tagName))(document.activeElement)"""
# What a finger cannot hit. A link within a line of text may be as low as the line.
SMALL = """[...document.querySelectorAll("button, select, input")]
    .filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 32).map((e) => e.outerHTML)"""
# Texts whose contrast to their background is below 4.5. As in WCAG, disabled controls are exempt.
UNREADABLE = """() => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
        .getContext("2d", { willReadFrequently: true });
    const rgba = (text) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = text;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const behind = (e) => {
        for (; e; e = e.parentElement) {
            const colour = rgba(getComputedStyle(e).backgroundColor);
            if (colour[3] > 200) return colour;
        }
        return rgba("white");
    };
    const poor = [];
    for (const e of document.querySelectorAll("body *")) {
        const own = [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!own || !e.checkVisibility() || e.closest(":disabled")) continue;
        const [more, less] = [luminance(rgba(getComputedStyle(e).color)), luminance(behind(e))].sort((x, y) => y - x);
        const ratio = (more + 0.05) / (less + 0.05);
        if (ratio < 4.5) poor.push(`${e.tagName}.${e.className} ${e.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
    }
    return poor;
}"""


class Tab:
    """The page, with all that it complained of and asked for."""

    def __init__(self, browser: Any, address: str, width: int = 1280, **context: Any) -> None:
        self.address = address
        self.context = browser.new_context(viewport={"width": width, "height": 800}, **{"locale": "en-US", **context})
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)

    def send(self, *files: Path) -> None:
        self.page.set_input_files("#files", [str(file) for file in files])

    def wait(self, selector: str, count: int) -> Any:
        from playwright.sync_api import expect  # here: only who has a browser needs it

        found = self.page.locator(selector)
        expect(found).to_have_count(count)
        return found

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_text_contents()]

    def quiet(self) -> bool:
        said = [text for text in self.complaints if not _REFUSED.match(text)]
        away = [url for url in self.requests if not url.startswith((self.address, f"blob:{self.address}"))]
        return not said and not away


Open = Callable[..., Tab]
