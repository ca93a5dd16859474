"""Text as a value of Hydra's override grammar; a few string functions that load no Hydra."""

from __future__ import annotations

import re

_GRAMMAR = "[{('\"$"  # how a list, a dict, a function, quoted text or an interpolation begins


def quoted(text: str) -> str:
    r"""Return the text as a value that comes out of the composed configuration unchanged.

    >>> print(quoted("it's"), quoted("${x}"))
    'it\'s' '\${x}'
    """
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)\Z", r"\1\1", literal(text))) + "'"


def literal(text: str) -> str:
    r"""Return the text as OmegaConf must hold it to give it back unchanged: `${` starts no interpolation.

    >>> print(literal("${x}"))
    \${x}
    """
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def requoted(override: str) -> str | None:
    """Return the override with its value quoted, or None where the value was meant as Hydra's grammar.

    >>> requoted("name=a=b"), requoted("name=[a"), requoted("name")
    ("name='a=b'", None, None)
    """
    key, equals, value = override.partition("=")
    if not equals or not value or value[0] in _GRAMMAR:
        return None
    return f"{key}={quoted(value)}"
