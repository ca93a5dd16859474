"""Plain nested settings: flattened for parameter logs, with their passwords hidden, or escaped for OmegaConf."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from image_classifier.override_grammar import literal
from image_classifier.text import hide_passwords

Scalar = str | int | float | bool | None


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Return nested keys as dotted ones; a list becomes its JSON text.

    >>> flatten({"model": {"name": "cnn", "widths": [8, 16]}, "seed": 0})
    {'model.name': 'cnn', 'model.widths': '[8, 16]', 'seed': 0}
    """
    flat: dict[str, Scalar] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            is_scalar = value is None or isinstance(value, (str, int, float))
            flat[name] = value if is_scalar else json.dumps(value, default=str)
    return flat


def without_passwords(value: Any) -> Any:
    """Return the same plain value with the `user:password@` of every address in it hidden, for what is written down.

    >>> without_passwords({"uri": "https://me:secret@host/", "tags": ["a"]})
    {'uri': 'https://***@host/', 'tags': ['a']}
    """
    if isinstance(value, Mapping):
        return {key: without_passwords(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_passwords(item) for item in value]
    return hide_passwords(value) if isinstance(value, str) else value


def literal_values(value: Any) -> Any:
    """Return plain values whose text holds no interpolation any more: `${x}` stays these four characters."""
    if isinstance(value, dict):
        return {key: literal_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal_values(item) for item in value]
    return literal(value) if isinstance(value, str) else value
