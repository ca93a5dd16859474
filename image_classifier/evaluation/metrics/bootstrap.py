"""Bootstrap 95 % intervals: how far a figure would move had other images of the same kind been drawn. In words: docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from image_classifier.evaluation.blocks import parallel_map, slices

_TAILS = (0.025, 0.975)
_Z = 1.959964  # the normal distribution's 97.5 % point
_SEED = 20261121
_AT_ONCE = 20  # resamples to one task of a thread
_FEW = 5  # right or wrong answers below which resampling says too little of a share


def resample(
    sums: Callable[[np.ndarray], np.ndarray], num_images: int, count: int, threads: int | None = None
) -> np.ndarray:
    """The sums [S] of `count` resamples, float64 [count, S]; a resample is how often each image is drawn in N draws, float64 [N].

    Resample number r draws from a stream of its own, so that neither the number of threads nor that of resamples changes it.
    """

    def some(numbers: slice) -> np.ndarray:
        return np.stack([sums(_draw(num_images, number)) for number in range(numbers.start, numbers.stop)])

    return np.concatenate(list(parallel_map(some, slices(count, _AT_ONCE), threads)))


def _draw(num_images: int, number: int) -> np.ndarray:
    drawn = np.random.default_rng((_SEED, number)).integers(0, num_images, num_images)
    return np.bincount(drawn, minlength=num_images).astype(np.float64)


def spread(values: np.ndarray, samples: np.ndarray, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Intervals [2, ...] of values [...] from their resampled ones [R, ...] (NaN where one has none), within low..high.

    The samples are moved so that their mean is the value: resampling by itself empties small classes and widens the gaps of calibration,
    and that shift is no news of the model. NaN where all samples are equal: they say nothing then, not that the value is sure.
    """
    result = np.full((2, *np.shape(values)), np.nan)
    known = np.isfinite(values) & np.isfinite(samples).any(axis=0)
    chosen = samples[:, known]
    result[:, known] = np.nanquantile(chosen, _TAILS, axis=0) + (values[known] - np.nanmean(chosen, axis=0))
    result[:, np.ptp(result, axis=0) <= 1e-12 * np.maximum(1.0, np.abs(values))] = np.nan
    return np.clip(result, low, high)


def share(hits: np.ndarray, total: np.ndarray, bootstrapped: np.ndarray) -> np.ndarray:
    """Intervals [2, ...] of shares hits / total: the bootstrapped ones, but Wilson's (1927) where fewer than 5 are right or fewer than 5 wrong.

    Resamples of 50 right answers out of 50 are all right; Wilson's 0.929..1 says what 50 images can say.
    """
    few = np.minimum(hits, total - hits) < _FEW
    return np.where(few, wilson(hits, total), bootstrapped)


def wilson(hits: np.ndarray, total: np.ndarray) -> np.ndarray:
    """The 95 % interval [2, ...] of hits / total, numbers [...] (Wilson, 1927); NaN where the total is 0.

    These are the shares p for which so many hits are just within 1.96 standard deviations.
    """
    total = np.where(total > 0, total, np.nan)
    middle = (hits + _Z**2 / 2) / (total + _Z**2)
    half = _Z / (total + _Z**2) * np.sqrt(hits * (total - hits) / total + _Z**2 / 4)
    low, high = (
        np.where(hits == 0, 0.0, middle - half),
        np.where(hits == total, 1.0, middle + half),
    )  # exactly, not but for rounding
    return np.where(np.isnan(total), np.nan, np.stack([low, high]))
