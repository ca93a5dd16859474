"""Values of conf/augment that cannot be, refused by the name of their key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from image_classifier.errors import ConfigError


def number(value: Any, key: str, most: float = 1.0) -> float:
    """A number from 0 to `most`; ConfigError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ConfigError(f"{key} must be a number from 0 to {most:g}, not {value!r}")
    return float(value)


def whole_number(value: Any, key: str) -> int:
    """A whole number, not negative; ConfigError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{key} must be a whole number of pixels, 0 or more, not {value!r}")
    return value


def range_of(values: Any, key: str, upper: float) -> tuple[float, float]:
    """Two numbers above 0, the least and the greatest; ConfigError for anything else."""
    numbers = (
        [value for value in values if isinstance(value, int | float)]
        if isinstance(values, Sequence) and not isinstance(values, str)
        else []
    )
    if len(numbers) != 2 or len(values) != 2 or not 0 < numbers[0] <= numbers[1] <= upper:
        raise ConfigError(
            f"{key}={values!r} is not a range", "give the least and the greatest value, such as [0.5,1.0]"
        )
    return float(numbers[0]), float(numbers[1])
