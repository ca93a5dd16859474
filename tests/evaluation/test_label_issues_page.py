"""The gallery of suspects: one file, bounded, safe with any file name, and decisions only where allowed."""

from __future__ import annotations

import re
from base64 import b64decode
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from image_classifier.dataset.audit.fix import Fix, read_fixes
from image_classifier.evaluation.label_issues.html_report import Gallery, Row, render
from image_classifier.evaluation.label_issues.ranking import Suspect
from image_classifier.html import thumbnails
from tests.dataset.audit.test_audit_page import Browser, browser  # noqa: F401

EVIL = '"><script>alert(1)</script>.png'


def suspect(path: str, split: str = "", note: str = "") -> Suspect:
    return Suspect(path, split, "cat", "dog", 0.1, ("confident learning",), 0.1, 0.8, note)


def gallery(root: Path, *paths: str, decided: str = "path,label,action,new_label,reason\n") -> Gallery:
    rows = {path: Row(path, "cat", "", "because") for path in paths}
    return Gallery(root, root / "fix.csv", 100, ("cat", "dog"), rows, decided, decided.count("\n") - 1)


def test_names_are_shown_and_never_run(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), "red").save(tmp_path / "big.png")
    Image.new("RGB", (28, 28), "blue").save(tmp_path / "small.png")
    listed = [
        suspect("big.png"),
        suspect("small.png", note=EVIL),
        suspect(EVIL),
        suspect("no\udcffutf8.png"),
        suspect("big.png", "test"),
    ]
    html = render(listed, gallery(tmp_path, "big.png", "small.png", EVIL, "no\udcffutf8.png"), 500)
    assert html.count("<script>") == 1 and "alert(1)</script>" not in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert html.count('class="pixels"') == 1 and html.count('src="data:image/webp') == 3
    assert "Its name is not plain text" in html and "no image: " in html
    assert EVIL in map(unescape, re.findall(r'data-path="([^"]*)"', html))


def test_a_test_image_has_no_buttons(tmp_path: Path) -> None:
    html = render([suspect("a.png", "test")], gallery(tmp_path), 500)
    assert "A test image" in html and 'data-action="' not in html


def test_what_was_decided_is_kept_for_the_saved_file(tmp_path: Path) -> None:
    decided = 'path;label;action;new_label;reason\n"a<b>.png";cat;keep;;mine\n'
    html = render([suspect("b.png")], gallery(tmp_path, "b.png", decided=decided), 500)
    assert (
        'data-delimiter=";"' in html
        and b64decode(html.split('data-delimiter=";">')[1].split("</pre>")[0]).decode() == decided
    )


def test_the_page_is_bounded_and_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        "image_classifier.evaluation.label_issues.html_report.thumbnail",
        lambda *_: thumbnails.Thumbnail(f"data:,{9000 * 'A'}"),
    )
    paths = [f"{number}/{'long ' * 50}.png" for number in range(2000)]
    html = render([suspect(path) for path in paths], gallery(tmp_path, *paths), 5000)
    assert len(html.encode()) < 10_000_000 and "of 2 000 suspects shown; all are in suspects.csv" in html
    assert "3 of 2 000 suspects shown" in render([suspect(path) for path in paths], gallery(tmp_path, *paths), 3)
    assert "No doubtful labels" in render([], gallery(tmp_path), 500)


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_decisions_are_saved_as_a_fix_csv(browser: Browser, width: int, tmp_path: Path) -> None:  # noqa: F811
    Image.new("RGB", (60, 40), "red").save(tmp_path / "c.png")
    names = ('a "quoted", b.png', "#b.png", "c.png")
    decided = "path,label,action,new_label,reason\nz.png,cat,keep,,before\n"
    (tmp_path / "suspects.html").write_text(
        render([suspect(name) for name in names], gallery(tmp_path, *names, decided=decided), 500)
    )
    browser.show(tmp_path / "suspects.html", width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("URL.createObjectURL = (blob) => { window.saved = blob.text(); return 'data:,'; }")
    button = "document.querySelectorAll('.choices')[place].querySelector(`[data-action=${action}]`)"
    press = f"(place, action) => {button}.click()"
    for place, action in ((0, "exclude"), (0, "relabel"), (1, "keep"), (2, "exclude"), (2, "exclude")):
        browser.run(f"({press})({place}, '{action}')")
    assert browser.run("document.getElementById('status').textContent") == "2 of 3 decided"
    browser.run("document.getElementById('save').click()")
    (tmp_path / "fix.csv").write_text(browser.run("window.saved"))
    rows = [row for _, row in read_fixes(tmp_path / "fix.csv").lines]
    expected = [
        Fix(names[0], "cat", "relabel", "dog", "because"),
        Fix("#b.png", "cat", "keep", "", "because"),
        Fix("c.png", "cat", "", "dog", "because"),
    ]
    assert rows == [Fix("z.png", "cat", "keep", "", "before"), *expected]
    browser.run(
        "{ const i = document.querySelector('.choices input'); i.value = ''; i.dispatchEvent(new Event('input')); }"
    )
    assert browser.run("document.getElementById('save').disabled")
    browser.run(
        "{ const s = document.getElementById('search'); s.value = 'quoted'; s.dispatchEvent(new Event('input')); }"
    )
    assert browser.run("document.querySelectorAll('[data-entry]:not([hidden])').length") == 1
    assert browser.complaints == []
