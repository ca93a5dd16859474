"""The choice of a few rows out of many."""

from __future__ import annotations

import numpy as np


def evenly_spaced(count: int, limit: int) -> np.ndarray:
    """Return at most `limit` of the rows 0 to `count` - 1 as int64, evenly spaced, first and last among them.

    >>> evenly_spaced(100, 3).tolist(), evenly_spaced(2, 5).tolist(), evenly_spaced(0, 5).tolist()
    ([0, 49, 99], [0, 1], [])
    """
    if not count or limit < 1:
        return np.zeros(0, np.int64)
    return np.unique(np.linspace(0, count - 1, min(count, limit)).astype(np.int64))
