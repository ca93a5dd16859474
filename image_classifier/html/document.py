"""One HTML file from a template that extends base.html.j2, with styles and script inside and nothing else allowed."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from image_classifier.html.text import number, plain, unbroken
from image_classifier.program import program
from image_classifier.text import counted, printable

_HERE = Path(__file__).parent


def render(template: Path, styles: Path, script: Path, **values: Any) -> str:
    """Return the page: `template` filled with `values`, all of them escaped.

    The content security policy allows the shared styles with `styles`, and `script`, each by its hash. The template
    extends base.html.j2 and fills its blocks `title` and `body`; it has no style= or on…= attributes.
    """
    style = "\n".join(path.read_text(encoding="utf-8") for path in (_HERE / "base.css", styles))
    code = script.read_text(encoding="utf-8")
    inside = {"style": style, "style_hash": digest(style), "script": code, "script_hash": digest(code)}
    return _environment(template.parent).get_template(template.name).render(**inside, **values)


@cache
def _environment(folder: Path) -> jinja2.Environment:
    """Return the environment for the templates of a folder; each is compiled once."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["program"] = program
    environment.filters |= {
        "number": number,
        "plain": plain,
        "printable": printable,
        "counted": counted,
        "unbroken": unbroken,
    }
    return environment


def digest(text: str) -> str:
    """Return the sha256 of an inline script or style for the content security policy."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
