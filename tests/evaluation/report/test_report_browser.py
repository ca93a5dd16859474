"""The report in a real browser: filters, sorting, drill-down, narrow screens, dark, print, and no request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from image_classifier.predictions import PredictionTable
from tests.evaluation.report.made_run import make_run
from tests.test_architecture import assert_torch_free

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    make_run(place, accuracy=0.6)
    shutil.copytree(place / "plots/run", place / "plots/other")
    table = PredictionTable.read(place / "plots/run/test")
    type(table)(table.paths, table.targets, table.logits[:, ::-1].copy(), table.classes).write(
        place / "plots/other/test"
    )
    assert_torch_free(place, "report", "run")
    assert_torch_free(place, "report", "run", "other", "resamples=100", f"data_dir={place / 'images'}")
    return place


class Opened:
    """A page with all that it complained of and asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, dark: bool = False) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def quiet(self, path: Path) -> bool:
        return not self.complaints and [url for url in self.requests if not url.startswith("data:")] == [path.as_uri()]


@pytest.fixture
def report(home: Path) -> Path:
    return home / "plots/run/report.html"


def test_a_cell_shows_its_images_and_the_keyboard_is_enough(report: Path, chromium: Any) -> None:
    opened = Opened(chromium, report)
    page = opened.page
    cells = json.loads(page.locator("#cells").text_content())
    wrong = page.locator("#matrix [class*=wrong-cell]").first
    cell = wrong.get_attribute("data-cell")
    wrong.click()
    expected = [cells["images"][place]["path"] for place in cells["cells"][cell]]
    assert page.locator("#drill img").count() == len(expected) == int(wrong.text_content())
    assert [image.get_attribute("alt") for image in page.locator("#drill img").all()] == expected
    assert page.evaluate(
        "[...document.querySelectorAll('#drill img')].every(image => image.complete && image.naturalWidth > 0)"
    )
    page.keyboard.press("Escape")
    assert page.locator("#drill").is_hidden() and page.evaluate("document.activeElement.dataset.cell") == cell
    first = page.locator("#matrix [data-place]").first
    first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.place") != first.get_attribute("data-place")
    page.keyboard.press("Enter")
    assert page.locator("#drill").is_visible() and page.evaluate("window.hacked") is None
    assert opened.quiet(report)


def test_the_class_table_sorts_by_keyboard_and_filters(report: Path, chromium: Any) -> None:
    opened = Opened(chromium, report)
    page = opened.page
    rows = "[...document.querySelectorAll('#class-table tbody tr')].filter(row => !row.hidden)"
    column = f"{rows}.map(row => row.cells[4].dataset.value)"
    button = page.locator("#class-table .sort", has_text="F1")
    button.focus()
    page.keyboard.press("Enter")
    values = [float(value) for value in page.evaluate(column)]
    assert values == sorted(values, reverse=True) and page.locator("#class-table th[aria-sort=descending]").count() == 1
    page.keyboard.press("Space")
    assert [float(value) for value in page.evaluate(column)] == sorted(values)
    page.locator("#class-filter").fill("CLASS_001")
    assert len(page.evaluate(column)) == 1 and page.locator("#class-status").text_content() == "1 of 5 shown"
    page.locator("#pair-filter").fill("class_000 class_001")
    assert page.locator("#pair-table tbody tr:visible").count() == 1
    page.locator("#pair-table tbody tr:visible button").click()
    assert page.locator("#drill h3").text_content() == "class_000 classified as class_001"
    assert opened.quiet(report)


def test_every_link_of_the_page_scrolls_to_its_section(report: Path, chromium: Any) -> None:
    opened = Opened(chromium, report)
    links = opened.page.locator("nav a").all()
    assert len(links) == 10
    for link in links:
        link.click()
        target = opened.page.locator(link.get_attribute("href"))
        assert target.is_visible() and target.bounding_box()["y"] < 900
    assert not opened.complaints


@pytest.mark.parametrize("name", ["run", "compare-run-other"])
@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_reaches_over_the_edge(name: str, width: int, home: Path, chromium: Any) -> None:
    path = home / "plots" / name / "report.html"
    opened = Opened(chromium, path, width, dark=width == 768)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.quiet(path)


def test_dark_is_dark_and_print_hides_what_cannot_be_pressed(report: Path, chromium: Any) -> None:
    background = (
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b)"
    )
    light = Opened(chromium, report).page
    assert light.evaluate(background) > 600 and light.locator(".on-paper").is_hidden()
    opened = Opened(chromium, report, dark=True)
    assert opened.page.evaluate(background) < 150
    opened.page.emulate_media(media="print")
    for hidden in ("nav", "#class-filter", "#pair-filter"):
        assert opened.page.locator(hidden).is_hidden()
    assert (
        opened.page.locator("#class-table tbody tr").first.is_visible()
        and opened.page.locator(".on-paper").is_visible()
    )
    pairs = opened.page.locator("#pair-table tbody tr")
    assert pairs.count() > 2 and all(row.is_visible() for row in pairs.all())
    assert len(opened.page.pdf()) > 10_000


def test_the_comparison_filters_what_changed(home: Path, chromium: Any) -> None:
    path = home / "plots/compare-run-other/report.html"
    opened = Opened(chromium, path)
    page = opened.page
    lost = page.locator("section#lost li[data-entry]:visible")
    assert lost.count() > 3 and "No, the other way round" in page.locator(".verdict").text_content()
    page.locator("#search").fill("class_001")
    assert all("class_001" in item.text_content() for item in page.locator("li[data-entry]:visible").all())
    page.locator("#search").fill("")
    page.locator("button[data-severity=lost]").click()
    assert page.locator("section#lost").is_hidden()
    assert opened.quiet(path)
