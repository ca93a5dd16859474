"""Words and numbers for a person, on a page or in a terminal."""

from __future__ import annotations

import re

from image_classifier.text import printable

_LONGEST = 300  # characters of a path or a detail on a page


def number(value: float) -> str:
    """12 345, which does not break across lines."""
    return f"{value:,}".replace(",", "\u00a0")


def unbroken(sentence: str) -> str:
    """Our own words with numbers that do not break across lines; a path must stay as it is."""
    return re.sub(r"(?<=\d) (?=\d{3})", "\u00a0", sentence)


def plain(text: str) -> str:
    """A path or a detail as a page shows it: printable, the middle of a very long one left out."""
    shown = printable(text)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST // 2]} … {shown[-_LONGEST // 2 :]}"
