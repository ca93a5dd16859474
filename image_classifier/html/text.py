"""Text and numbers on a page."""

from __future__ import annotations

import re

from image_classifier.text import printable

_MAX_LENGTH = 300  # characters of a path or a detail on a page


def number(value: float) -> str:
    r"""Return a number with spaces between thousands that do not break across lines.

    >>> number(12345).replace("\u00a0", "_")
    '12_345'
    """
    return f"{value:,}".replace(",", "\u00a0")


def unbroken(sentence: str) -> str:
    """Return a sentence of ours with numbers that do not break across lines; not for paths."""
    return re.sub(r"(?<=\d) (?=\d{3})", "\u00a0", sentence)


def plain(text: str) -> str:
    r"""Return a path or a detail in printable form, without the middle of a very long one.

    >>> plain("a\nb")
    'a\\nb'
    """
    shown = printable(text)
    return shown if len(shown) <= _MAX_LENGTH else f"{shown[: _MAX_LENGTH // 2]} … {shown[-_MAX_LENGTH // 2 :]}"
