"""95 % intervals by bootstrap: how far a metric would move with other images of the same kind (docs/evaluation.md)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from image_classifier.parallel import parallel_map, slices

_TAILS = (0.025, 0.975)
_Z = 1.959964  # 97.5 % quantile of the normal distribution
_SEED = 20261121
_RESAMPLES_PER_TASK = 20
_FEW = 5  # with fewer right or wrong predictions, resampling says too little about a share


def resample(
    sums: Callable[[np.ndarray], np.ndarray], num_images: int, count: int, threads: int | None = None
) -> np.ndarray:
    """Return the sums [S] of `count` resamples, float64 [count, S].

    `sums` receives how often each image is drawn in N draws, float64 [N]. Resample r draws from its own random stream,
    so neither the number of threads nor the number of resamples changes it.
    """

    def block(numbers: slice) -> np.ndarray:
        return np.stack([sums(_draw(num_images, number)) for number in range(numbers.start, numbers.stop)])

    return np.concatenate(list(parallel_map(block, slices(count, _RESAMPLES_PER_TASK), threads)))


def _draw(num_images: int, number: int) -> np.ndarray:
    drawn = np.random.default_rng((_SEED, number)).integers(0, num_images, num_images)
    return np.bincount(drawn, minlength=num_images).astype(np.float64)


def percentile_interval(values: np.ndarray, samples: np.ndarray, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Return intervals [2, ...] of values [...] from their resampled values [R, ...], within low..high.

    A resampled value may be NaN where it is not defined. The result is NaN where all samples are equal: they say
    nothing then, which does not make the value certain.
    """
    result = np.full((2, *np.shape(values)), np.nan)
    known = np.isfinite(values) & np.isfinite(samples).any(axis=0)
    chosen = samples[:, known]
    # Shift the samples so that their mean is the value: resampling empties small classes and widens calibration gaps,
    # and that shift says nothing about the model.
    result[:, known] = np.nanquantile(chosen, _TAILS, axis=0) + (values[known] - np.nanmean(chosen, axis=0))
    # Drop intervals without width.
    result[:, np.ptp(result, axis=0) <= 1e-12 * np.maximum(1.0, np.abs(values))] = np.nan
    return np.clip(result, low, high)


def proportion_interval(hits: np.ndarray, total: np.ndarray, bootstrapped: np.ndarray) -> np.ndarray:
    """Return intervals [2, ...] of hits / total: the bootstrapped ones, or Wilson's with fewer than 5 hits or misses.

    Resamples of 50 right predictions out of 50 are all right; Wilson's 0.929..1 is what 50 images can show.
    """
    few = np.minimum(hits, total - hits) < _FEW
    return np.where(few, wilson(hits, total), bootstrapped)


def wilson(hits: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return the 95 % interval [2, ...] of hits / total, both [...] (Wilson, 1927); NaN where the total is 0.

    It holds the shares p for which this number of hits is within 1.96 standard deviations.

    >>> wilson(np.array([50, 8]), np.array([50, 10])).round(3).tolist()
    [[0.929, 0.49], [1.0, 0.943]]
    """
    total = np.where(total > 0, total, np.nan)
    middle = (hits + _Z**2 / 2) / (total + _Z**2)
    half = _Z / (total + _Z**2) * np.sqrt(hits * (total - hits) / total + _Z**2 / 4)
    # Exactly 0 and 1 at the ends, without rounding errors.
    low = np.where(hits == 0, 0.0, middle - half)
    high = np.where(hits == total, 1.0, middle + half)
    return np.where(np.isnan(total), np.nan, np.stack([low, high]))
