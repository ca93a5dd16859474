"""Text for people: the nearest name, counted nouns, short lists, hidden passwords, untrusted text made printable."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

# What would move a terminal's cursor, begin a line, or turn the direction of letters.
_ESCAPED_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
_DIRECTION_MARKS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    r"""Return the text with control characters, direction marks and bytes that are not UTF-8 written as escapes.

    >>> print(printable("a\tb\u202e"))
    a\tb\u202e
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    # A byte of a file name that is not UTF-8 is such a half of a surrogate pair.
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    if unicodedata.category(letter) in _ESCAPED_CATEGORIES or letter in _DIRECTION_MARKS:
        return letter.encode("unicode_escape").decode()
    return letter


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "image"), counted(2, "class"), counted(12345, "image")
    ('1 image', '2 classes', '12 345 images')
    """
    plural = {"class": "classes"}.get(noun, f"{noun}s")
    return f"{number:,} {noun if number == 1 else plural}".replace(",", " ")


def listed(names: Sequence[str], limit: int = 5, noun: str = "", separator: str = ", ") -> str:
    """Return the first names, separated by commas, and how many more there are.

    >>> listed(["a", "b", "c", "d"], limit=2)
    'a, b and 2 more'
    """
    rest = len(names) - limit
    return separator.join(names[:limit]) + (f" and {rest} more{noun and f' {noun}'}" if rest > 0 else "")


def nearest(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the name most like `word`, or None; the last part of a dotted key counts most.

    >>> nearest("data.lr", ["optimizer.lr", "data.dir"])
    'optimizer.lr'
    """

    def likeness(name: str) -> float:
        last = difflib.SequenceMatcher(None, word.rpartition(".")[2], name.rpartition(".")[2]).ratio()
        return 0.7 * last + 0.3 * difflib.SequenceMatcher(None, word, name).ratio()

    best = max(sorted(names), key=likeness, default=None)
    return best if best is not None and likeness(best) >= cutoff else None


def similar(word: str, names: Iterable[str]) -> list[str]:
    """Return the names like `word`, the most alike first.

    >>> similar("mobilenet_v2", ["resnet18", "mobilenet_v2", "mobilenet_v3_small"])
    ['mobilenet_v2', 'mobilenet_v3_small']
    """
    return difflib.get_close_matches(word, sorted(names), n=20, cutoff=0.5)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return the start of a hint, or nothing where no name is near.

    >>> did_you_mean("resnet81", ["resnet18", "mlp"])
    'did you mean resnet18? '
    """
    near = nearest(word, names)
    return f"did you mean {near}? " if near else ""


def hide_passwords(text: str) -> str:
    """Return the text with the `user:password@` of every address in it hidden.

    >>> hide_passwords("postgresql://me:secret@host/db")
    'postgresql://***@host/db'
    """
    return re.sub(r"://[^/@\s]+@", "://***@", text)
