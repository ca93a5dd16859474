"""The documentation site: built without a warning, whole, and asking nobody else for anything."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # `make docs` builds it too

# What a browser loads by itself, unlike <a href>.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed|object|link)\b[^>]*?\b(?:src|srcset|href|data|poster)=["']([^"']*)"""
)
IN_CSS = re.compile(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""")


def sphinx(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """`make docs`' own line, with other folders."""
    (line,) = re.findall(
        r"-m (sphinx .*?) \. site", (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    )
    words = line.replace(".cache/docs", str(site.parent / "trees")).split()
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.run(
        [sys.executable, "-m", *words, ".", str(site)],
        cwd=folder,
        env=settings,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    done = sphinx(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = [path.relative_to(ROOT).with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    assert [str(page) for page in pages if not (site / page).is_file()] == []
    assert (
        (site / "index.html").is_file() and (site / "CHANGELOG.html").is_file() and not (site / "README.html").exists()
    )
    assert "docs/delivery.html" in (site / "index.html").read_text(encoding="utf-8")


def test_nothing_is_asked_of_anybody_else(site: Path) -> None:
    asked = []
    for path in site.rglob("*"):
        if path.suffix in (".html", ".css", ".svg"):
            text = path.read_text(encoding="utf-8")
            found = IN_CSS.findall(text) + (LOADED.findall(text) if path.suffix == ".html" else [])
            asked += [f"{path.name}: {address}" for address in found if urlsplit(address).netloc]
    assert asked == []


def test_every_link_inside_leads_somewhere(site: Path) -> None:
    lost = []
    for page in site.rglob("*.html"):
        for address in re.findall(r"""(?:href|src)=["']([^"']+)""", page.read_text(encoding="utf-8")):
            parts = urlsplit(address)
            if parts.scheme or not parts.path:
                continue
            target = page.parent / unquote(parts.path)
            if not target.is_file():
                lost.append(f"{page.relative_to(site)}: {address}")
    assert lost == []


def test_the_search_finds_pages_that_there_are(site: Path) -> None:
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    names = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))["docnames"]
    assert sorted(f"{name}.html" for name in names) == sorted(
        str(path.relative_to(site)) for path in site.rglob("*.html") if path.name != "search.html"
    )


def test_a_broken_link_or_anchor_fails(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copytree(ROOT / "docs/static", tmp_path / "docs/static")
    for name in ("conf.py", "files.py"):
        shutil.copyfile(ROOT / "docs" / name, tmp_path / "docs" / name)
    (tmp_path / "image_classifier").symlink_to(ROOT / "image_classifier")  # the site lists its files
    (tmp_path / "README.md").write_text("# Home\n\n[a](docs/none.md) [b](docs/page.md#nowhere)\n", encoding="utf-8")
    (tmp_path / "docs/page.md").write_text("# Page\n\n## Here\n", encoding="utf-8")
    done = sphinx(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "docs/none.md" in done.stderr and "nowhere" in done.stderr
