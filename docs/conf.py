"""The documentation site: the README and docs/*.md, built by `make docs` into site/ (decision 020).

The pages are written for GitHub and know nothing of Sphinx. What the site adds is defined here: the order of the pages,
a home page called index.html, the reference of the Python API, and the list of the package's files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from files import file_list  # noqa: E402

from image_classifier import __version__  # noqa: E402

project = "image_classifier"
author = "The image_classifier authors"
project_copyright = f"{author}, Apache-2.0"
version = release = __version__

# Sphinx starts at the repository's root, as the README is the home page; it looks at nothing else there.
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**"]
_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs")
exclude_patterns = [path.name for path in ROOT.iterdir() if path.name not in _PAGES]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them
myst_heading_anchors = 4  # GitHub's anchors, so that a link works there and here
myst_enable_extensions: list[str] = []
highlight_language = "none"
smartquotes = False  # `--key` is two hyphens
nitpicky = True
nitpick_ignore_regex = [("py:.*", r".*")]  # types of other projects, and of ours that are not on the page

html_theme = "furo"
html_title = "image_classifier"
html_short_title = html_title
html_static_path = ["static"]
html_css_files = ["site.css"]
html_logo = html_favicon = "static/icon.svg"
html_copy_source = False
html_use_index = False
html_domain_indices = False
html_show_sphinx = False
html_last_updated_fmt = None  # the same sources give the same site
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#2b5c92",
        "color-brand-content": "#0a58ca",
        "color-background-secondary": "#f6f7f9",
        "color-sidebar-item-background--hover": "#e8f1fb",
    },
    "dark_css_variables": {
        "color-brand-primary": "#8fbdf2",
        "color-brand-content": "#7db4ff",
        "color-background-primary": "#14171b",
        "color-background-secondary": "#1b1f24",
    },
}

ORDER = """

```{toctree}
:hidden:
Home <self>
```
```{toctree}
:hidden:
:caption: Use
docs/command_line
docs/python
docs/training
docs/evaluation
docs/delivery
docs/serving
docs/deployment
```
```{toctree}
:hidden:
:caption: Know
CONTRIBUTING
docs/architecture
docs/decisions/README
docs/LOG
CHANGELOG
```
"""
DECISIONS = """

```{toctree}
:glob:
:maxdepth: 1
[0-9]*
```
"""
REFERENCE = """

## Reference

```{eval-rst}
.. automodule:: image_classifier.api
   :members: train, load, audit, Model

.. automodule:: image_classifier.notebook
   :members: ImagePrediction, ImagePredictions, ImageExplanation, AuditResult
   :inherited-members: tuple, list, object

.. automodule:: image_classifier.errors
   :members:
```
"""
FILES = f"""

## The files
{file_list()}
"""


class Site(StandaloneHTMLBuilder):
    """HTML in which the README is index.html, for readers, links and the search alike."""

    def get_output_path(self, page_name: str, /) -> Path:
        return super().get_output_path(_page(page_name))

    def get_target_uri(self, docname: str, typ: str | None = None) -> str:
        return super().get_target_uri(_page(docname), typ)

    def dump_search_index(self) -> None:
        super().dump_search_index()
        path = Path(self.outdir, self.searchindex_filename)
        before, brace, found = path.read_text(encoding="utf-8").partition("{")
        index = json.loads(brace + found.removesuffix(")"))
        index["docnames"] = [_page(name) for name in index["docnames"]]
        path.write_text(f"{before}{json.dumps(index, separators=(',', ':'), sort_keys=True)})", encoding="utf-8")


def _page(name: str) -> str:
    return "index" if name == root_doc else name


def _order(_: Sphinx, name: str, source: list[str]) -> None:
    added = {
        root_doc: ORDER,
        "docs/decisions/README": DECISIONS,
        "docs/python": REFERENCE,
        "docs/architecture": FILES,
    }
    source[0] += added.get(name, "")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_builder(Site, override=True)
    app.connect("source-read", _order)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
