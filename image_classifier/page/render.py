"""A template, the shared style and one script to one HTML text."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2

from image_classifier.page.words import counted, number, plain, unbroken

_SHARED = Path(__file__).parent


def render_page(template: Path, script: Path, **values: Any) -> str:
    """The page as one text: it may include the shared files beside this one; of all scripts its own alone may run.

    Args:
        template: A Jinja file; what it shows is escaped.
        script: JavaScript without braces of Jinja's; the template puts `script` at its end and `script_hash` into its policy.
        values: What the template names.
    """
    content = script.read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "plain": plain, "counted": counted, "unbroken": unbroken}
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return environment.get_template(template.name).render(script=content, script_hash=digest, **values)
