"""The page of an audit: self-contained, bounded, safe whatever files are called, and working in a real browser."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from image_classifier.dataset.audit import html_report as audit_page
from image_classifier.dataset.audit.checks import Audit, AuditSettings
from image_classifier.dataset.audit.exclude import Exclusions, merge
from image_classifier.dataset.audit.html_report import render, write_audit
from image_classifier.dataset.audit.issue_types import ISSUE_TYPES
from image_classifier.dataset.audit.issues import Issue, IssueItem
from image_classifier.errors import StorageError
from image_classifier.html import document, thumbnails
from tests.conftest import write_image
from tests.dataset.audit.test_audit import audited

HOSTILE = (
    "img onerror=x>.png",
    '"><img src=x onerror=window.hacked=1>.png',
    "&lt;b&gt;{{ 7*7 }}.png",
    "a\u202eb\n\udcff.png",
)
DATA = {
    "images": 3,
    "unreadable": 0,
    "left_out": 0,
    "splits": {"undealt": 3},
    "formats": {},
    "modes": {},
    "sizes": {},
    "fingerprint": "0",
    "leaked": {},
}


@pytest.fixture
def messy(tmp_path: Path) -> Audit:
    """The audit of a tree with duplicates, a leak, an empty file, a misnamed file and file names that would be code."""
    root = tmp_path / "<script>window.hacked=1<" / "script> & odd"
    for split, count in {"train": 14, "test": 4}.items():
        for label in ("cat", "<b>dog</b>"):
            for number in range(count):
                write_image(root / split / label / f"{number:02d}.png", hash((split, label, number)) % 2**32, 40)
    for number, name in enumerate(HOSTILE):
        write_image(root / "train/cat" / name, 50 + number, 60)
        shutil.copy(root / "train/cat" / name, root / "train/cat" / f"copy of {name}")
    shutil.copy(root / "train/cat/00.png", root / "test/cat/leak.png")
    (root / "train/cat/empty.png").touch()
    Image.new("RGB", (640, 90), "red").save(root / "train/cat/banner.jpg", "PNG")
    exclusions = merge(Exclusions(), {"train/cat/13.png": 'too <dark> & "blurred"'})
    return audited(root, tmp_path / "store", exclusions=exclusions)


class _Reader(HTMLParser):
    """Every tag with its attributes, and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text.append(data)


def test_the_page_needs_nothing_but_itself_and_file_names_stay_text(messy: Audit) -> None:
    html = render(messy)
    page = _Reader(html)
    assert html.startswith("<!doctype html>")
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not {"b", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags if tag != "b"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), attributes
        address = attributes.get("src") or attributes.get("href") or ""
        assert not address or address.startswith(("data:", "#")), attributes
        assert tag != "img" or attributes.get("alt")
    text = "".join(page.text)
    assert "<script>window.hacked=1</script> & odd" in text
    for name in HOSTILE[:-1]:
        assert name in text
    assert "a\\u202eb\\n\\xff.png" in text
    assert "7*7" in text and "49.png" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_both_files_are_whole_or_not_there(messy: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "out"
    path = write_audit(messy, directory)
    assert json.loads(path.read_text(encoding="ascii")) == json.loads(json.dumps(messy.as_dict()))
    assert sorted(file.name for file in directory.iterdir()) == ["audit.html", "audit.json"]
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    (directory / "exclude.csv").write_text("path,reason\nmine,x\n")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError):
        write_audit(messy, directory)
    assert {name: (directory / name).read_bytes() for name in before} == before
    assert (directory / "exclude.csv").read_text() == "path,reason\nmine,x\n"


def test_without_a_page_no_picture_is_opened(messy: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnails, "decode", lambda *_, **__: pytest.fail("decoded"))
    write_audit(messy, tmp_path / "out", page=False)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["audit.json"]


def test_a_picture_that_went_away_becomes_a_placeholder(messy: Audit) -> None:
    (messy.root / "train/cat/00.png").unlink()
    assert "no image: " in render(messy)


@pytest.mark.parametrize("per_kind", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_page_is_bounded_whatever_the_data_set(
    per_kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        audit_page,
        "_picture",
        lambda *given: audit_page._Picture(given[-1], thumbnails.Thumbnail(f"data:,{9000 * 'A'}")),
    )
    paths = [f"{number}/{'long ' * 50}.png" for number in range(per_kind)]
    findings = [
        Issue(kind, f"reason {path}", (IssueItem(path, "cat"), IssueItem(path + "2", "cat")))
        for kind in ISSUE_TYPES
        for path in paths
    ]
    classes = {f"class {number}": {"images": 1} for number in range(per_kind)}
    audit = Audit(
        tuple(findings),
        DATA | {"root": str(tmp_path), "classes": classes},
        AuditSettings(max_listed=2 * per_kind),
        excluded=dict.fromkeys(paths, "x"),
    )
    html = render(audit)
    assert len(html.encode()) < 10_000_000
    assert all(f'id="{kind}"' in html for kind in ISSUE_TYPES)
    assert "shown; all are in audit.json" in html


def test_an_audit_of_nothing_has_a_page(tmp_path: Path) -> None:
    html = render(Audit((), DATA | {"root": str(tmp_path), "classes": {}, "images": 0}, AuditSettings()))
    assert "No issues." in html


def _luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_every_text_has_contrast(theme: int) -> None:
    css = (Path(document.__file__).parent / "base.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", re.findall(r":root \{(.*?)\}", css, re.DOTALL)[theme]))
    pairs = [(ink, paper) for ink in ("ink", "soft", "error", "warning", "info") for paper in ("paper", "card")]
    pairs += [(name, f"{name}-paper") for name in ("error", "warning", "info")] + [
        ("ink", "mat"),
        ("ink", "info-paper"),
    ]
    for ink, paper in pairs:
        light, dark = sorted((_luminance(colours[ink]), _luminance(colours[paper])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)


class Browser:
    """A headless Chromium, controlled over a pipe; it records the page's `complaints` and `requests`."""

    def __init__(self, binary: str, profile: Path) -> None:
        ours_out, theirs_in = self._pipe()
        theirs_out, ours_in = self._pipe()
        options = '--headless --no-sandbox --disable-gpu --user-data-dir="$1" --remote-debugging-pipe'
        line = f'exec "$0" {options} 3<&{ours_out} 4>&{ours_in}'
        self.process = subprocess.Popen(
            ["bash", "-c", line, binary, str(profile)],
            pass_fds=(ours_out, ours_in),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours_out)
        os.close(ours_in)
        self.reader, self.writer = os.fdopen(theirs_out, "rb"), os.fdopen(theirs_in, "wb", buffering=0)
        self.number, self.session = 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    @staticmethod
    def _pipe() -> tuple[int, int]:
        """Both ends, numbered above 3 and 4, which the browser's own take."""
        ends = os.pipe()
        high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in ends)
        for end in ends:
            os.close(end)
        return high[0], high[1]

    def _receive(self) -> dict[str, Any]:
        text = bytearray()
        while (letter := self.reader.read(1)) != b"\0":
            assert letter, "the browser ended"
            text += letter
        return json.loads(text)  # type: ignore[no-any-return]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | (
            {"sessionId": self.session} if self.session else {}
        )
        self.writer.write(json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]  # type: ignore[no-any-return]

    def run(self, script: str) -> Any:
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def show(self, page: Path, width: int, dark: bool = False) -> None:
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.call("Page.navigate", url=page.as_uri())
        for _ in range(200):
            if self.run("document.readyState") == "complete" and self.run("location.protocol") == "file:":
                return
            time.sleep(0.05)
        raise AssertionError("the page did not load")

    @property
    def complaints(self) -> list[dict[str, Any]]:
        return [
            event
            for event in self.events
            if event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        ]

    @property
    def requests(self) -> list[str]:
        return [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.close()
        self.writer.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("no Chromium is installed")
    browser = Browser(binary, tmp_path / "profile")
    yield browser
    browser.close()


VISIBLE = "[...document.querySelectorAll('main > section[data-kind]')].filter(s => !s.hidden).map(s => s.dataset.kind)"
TYPE = "(text) => { const s = document.getElementById('search'); s.value = text; s.dispatchEvent(new Event('input')); }"


@pytest.mark.browser
def test_the_page_works_in_a_browser(messy: Audit, browser: Browser, tmp_path: Path) -> None:
    page = write_audit(messy, tmp_path / "out").with_name("audit.html")
    browser.show(page, width=1280)
    kinds = list(messy.by_type)
    assert browser.run(VISIBLE) == kinds
    assert {"empty_file", "leak", "exact_duplicates", "wrong_extension", "extreme_aspect"} <= set(kinds)
    assert browser.run("window.hacked") is None
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.run("document.images.length") > 10
    browser.run(f"({TYPE})('banner.jpg')")
    assert browser.run(VISIBLE) == ["wrong_extension", "extreme_aspect"]
    assert browser.run("document.getElementById('status').textContent").startswith("2 of ")
    browser.run(f"({TYPE})('no such thing')")
    assert browser.run(VISIBLE) == [] and not browser.run("document.getElementById('nothing').hidden")
    browser.run(f"({TYPE})('')")
    browser.run("document.querySelector('button[data-severity=error]').click()")
    assert browser.run(VISIBLE) == [kind for kind in kinds if ISSUE_TYPES[kind].severity != "error"]
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_reaches_over_the_edge_and_dark_is_dark(
    width: int, messy: Audit, browser: Browser, tmp_path: Path
) -> None:
    page = write_audit(messy, tmp_path / "out").with_name("audit.html")
    background = "getComputedStyle(document.body).backgroundColor"
    browser.show(page, width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    light = browser.run(background)
    browser.show(page, width, dark=True)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert sum(map(int, re.findall(r"\d+", browser.run(background)))) < 150 < sum(map(int, re.findall(r"\d+", light)))
    assert browser.complaints == []
