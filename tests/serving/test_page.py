"""The files of the page, read as text: both languages whole, nothing from elsewhere, nothing inline."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest

from tests.serving.page_stub import PAGE

FILES = sorted(file for file in PAGE.iterdir() if file.suffix in {".html", ".css", ".js", ".svg"})
FORMS = {"en": 2, "ru": 3}  # one, other; one, few, many


@pytest.fixture(scope="module")
def dictionary() -> dict[str, list[Any]]:
    text = (PAGE / "dictionary.js").read_text("utf-8")
    words: dict[str, list[Any]] = json.loads(text[text.index("{") : text.rindex("}") + 1])
    return words


def test_every_word_exists_in_both_languages_with_the_same_holes(dictionary: dict[str, list[Any]]) -> None:
    for key, entry in dictionary.items():
        assert len(entry) == len(FORMS), key
        english, russian = ([side] if isinstance(side, str) else side for side in entry)
        if not isinstance(entry[0], str):
            assert [len(english), len(russian)] == list(FORMS.values()), f"{key}: a plural form is missing"
        forms = [*english, *russian]
        assert all(form.strip() for form in forms), key
        holes = [set(re.findall(r"\{(\w+)\}", form)) for form in forms]
        assert all(one == other for one, other in pairwise(holes)), key


def test_every_word_is_known_and_every_known_word_is_used(dictionary: dict[str, list[Any]]) -> None:
    used: set[str] = set()
    for file in FILES:
        if file.name == "dictionary.js":
            continue
        text = file.read_text("utf-8")
        used |= set(re.findall(r'data-(?:word|label)="(\w+)"', text))
        used |= {key for key in dictionary if re.search(rf'"{key}"', text)}
        asked = (
            set(re.findall(r'\bt\("(\w+)"', text))
            | set(re.findall(r'words: \["(\w+)"', text))
            | set(re.findall(r'data-(?:word|label)="(\w+)"', text))
        )
        assert asked <= set(dictionary), f"{file.name}: {asked - set(dictionary)}"
    made = re.compile(r"place_\d|e_\w+|filter_\w+|waiting|sending")  # their names are put together when they are needed
    assert {key for key in dictionary if key not in used and not made.fullmatch(key)} == set()


def test_russian_stands_where_russian_belongs(dictionary: dict[str, list[Any]]) -> None:
    same = {"save", "answered_by", "said_one", "said_label"}
    for key, (english, russian) in dictionary.items():
        assert not re.search("[а-яё]", str(english), re.IGNORECASE), key
        assert key in same or re.search("[а-яё]", str(russian), re.IGNORECASE), key


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_asks_nobody_else_and_runs_nothing_inline(file: Any) -> None:
    text = file.read_text("utf-8")
    assert len(text.splitlines()) < 300
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function)\b\s*[(=]", text)
    if file.suffix == ".html":
        assert not re.search(r"\son\w+\s*=|\sstyle\s*=|javascript:|<style", text)
        assert re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL) == [""]


def test_what_the_page_names_is_there() -> None:
    html = (PAGE / "index.html").read_text("utf-8")
    documentation = PAGE.with_name("routes").joinpath("docs.html.j2").read_text("utf-8")
    named = set(re.findall(r'(?:href|src)="page/([^"]+)"', html + documentation))
    scripts = {file.name: file.read_text("utf-8") for file in FILES if file.suffix == ".js"}
    imported = {name for text in scripts.values() for name in re.findall(r'from "\./([^"]+)"', text)}
    assert named | imported | {"index.html"} == {file.name for file in FILES}
    ids = set(re.findall(r'\bid="([\w-]+)"', html))
    assert {name for text in scripts.values() for name in re.findall(r'\bat\("([\w-]+)"\)', text)} <= ids
    icons = set(re.findall(r'icon\("(\w+)"\)', "".join(scripts.values())))
    assert {f"i-{name}" for name in icons} | set(re.findall(r'href="#([\w-]+)"', html)) <= ids
