"""How pictures become square with `data.resize=auto`: crop, squash and pad compared by a probe on training images."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from image_classifier.dataset.pixel_cache import LiveImages, PixelCache
from image_classifier.dataset.reader import ImageReader
from image_classifier.dataset.settings import DataSettings
from image_classifier.manifest import Manifest
from image_classifier.text import counted
from image_classifier.training.baseline import device_of, embeddings_of
from image_classifier.training.builders import NetworkInputs, build_network
from image_classifier.training.config import TrainConfig
from image_classifier.training.hardware import Hardware
from image_classifier.training.initial_weights import pretrained_settings

log = logging.getLogger(__name__)

CROP = "crop"
_OTHERS = ("squash", "pad")
_MAX_IMAGES = 1000  # that are compared, so that it takes seconds
_FOLDS = 5
_STRENGTH = 0.01  # C of scikit-learn, on standardised features
_MAX_ITER = 100
_MUCH = 0.25


@dataclass(frozen=True)
class ResizeScores:
    """The accuracy of each way, 0..1, and how much better than crop each other one is, with its standard error."""

    accuracies: Mapping[str, float]
    gains: Mapping[str, tuple[float, float]]

    @property
    def best(self) -> str:
        """Crop, unless another way is better by more than its standard error."""
        better = [way for way, (gain, error) in self.gains.items() if gain > error]
        return max(better, key=lambda way: self.gains[way][0], default=CROP)


def best_resize(config: TrainConfig, manifest: Manifest) -> str:
    """Return the value of `data.resize` by which a probe on the pretrained network is right most often.

    The log has a line for each way. Without pretrained weights it is crop.

    Raises:
        DataError: An image cannot be read.
        CheckpointError: The weights cannot be had.
    """
    settings = pretrained_settings(config.model)
    if not (config.model.bundle or settings["pretrained"] or settings.get("weights")):
        log.info("resize   crop: the ways to make pictures square are compared with pretrained weights only")
        return CROP
    rows = manifest.indices("train")
    shapes = PictureShapes(manifest.widths[rows], manifest.heights[rows], float(config.data.preprocess.crop_fraction))
    if shapes.all_square and shapes.crop_fraction == 1:
        log.info("resize   crop: all pictures are square")
        return CROP
    sample = manifest.take(_sampled(rows, config.run.seed))
    folds = grouped_folds(sample.groups, sample.targets, config.run.seed)
    if any(len(np.unique(sample.targets[folds != fold])) < 2 for fold in range(_FOLDS)) or len(np.unique(folds)) < 2:
        log.info("resize   crop: too few training images to compare")
        return CROP
    found = compare(_right_by_way(config, sample, folds), sample.groups)
    for line in lines(found, shapes):
        log.info("resize   %s", line)
    log.info(
        "resize   %s, by %d-fold cross-validation on %s", found.best, _FOLDS, counted(len(sample), "training image")
    )
    return found.best


@dataclass(frozen=True)
class PictureShapes:
    """Widths and heights of pictures, int [N], and the fraction of the shorter side that a crop keeps."""

    widths: np.ndarray
    heights: np.ndarray
    crop_fraction: float

    @property
    def all_square(self) -> bool:
        """Whether no picture is longer than wide or the reverse."""
        return bool((self.widths == self.heights).all())

    @property
    def _ratio(self) -> np.ndarray:
        """Shorter side by longer side, 0..1."""
        return np.asarray(np.minimum(self.widths, self.heights) / np.maximum(self.widths, self.heights))

    @property
    def costs(self) -> dict[str, str]:
        """What each way does to the pictures, in words."""
        cut = (1 - self.crop_fraction**2 * self._ratio >= _MUCH).mean()
        return {
            CROP: f"crop cuts {cut:.0%} of the images by a quarter or more",
            "squash": f"squash shortens {(1 - self._ratio >= _MUCH).mean():.0%} of the images by a quarter or more",
            "pad": f"pad leaves {(1 - self._ratio).mean():.0%} of the square black",
        }


def lines(found: ResizeScores, shapes: PictureShapes) -> list[str]:
    """Return what each way costs, a line each."""
    said = [f"{shapes.costs[CROP]}: {100 * found.accuracies[CROP]:.1f} % are predicted right"]
    for way, (gain, error) in found.gains.items():
        word = "worse" if gain < 0 else "better"
        said.append(f"{shapes.costs[way]}: {100 * abs(gain):.1f} ± {100 * error:.1f} points {word} than crop")
    return said


def compare(right: Mapping[str, np.ndarray], groups: np.ndarray) -> ResizeScores:
    """Compare ways by whether each image is predicted right, bool [N]; images of a group, uint64 [N], are alike."""
    accuracies = {way: float(hits.mean()) for way, hits in right.items()}
    gains = {}
    of_group = np.unique(groups, return_inverse=True)[1]
    for way in _OTHERS:
        differences = right[way].astype(float) - right[CROP]
        deviations = np.bincount(of_group, differences - differences.mean())
        gains[way] = float(differences.mean()), float(np.sqrt((deviations**2).sum()) / len(differences))
    return ResizeScores(accuracies, gains)


def grouped_folds(groups: np.ndarray, targets: np.ndarray, seed: int) -> np.ndarray:
    """Return a fold for each image, int64 [N]: a group, uint64 [N], is in one; each class in all where it can be.

    >>> grouped_folds(np.arange(10), np.repeat([0, 1], 5), 0)[:5].tolist() != [0] * 5
    True
    """
    _, first, of_group = np.unique(groups, return_index=True, return_inverse=True)
    random = np.random.default_rng(seed).permutation(len(first))
    order = np.lexsort((random, targets[first]))
    folds = np.empty(len(first), dtype=np.int64)
    folds[order] = np.arange(len(first)) % _FOLDS
    return np.asarray(folds[of_group])


def _sampled(rows: np.ndarray, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).permutation(rows)[:_MAX_IMAGES])


def _right_by_way(config: TrainConfig, sample: Manifest, folds: np.ndarray) -> dict[str, np.ndarray]:
    """Return whether the probe predicts each image right, bool [N], by way."""
    first = _inputs(config, sample, CROP)
    classifier, _ = build_network(first)
    classifier = classifier.to(device_of(config.trainer.accelerator))
    right = {}
    for way in (CROP, *_OTHERS):
        inputs = first if way == CROP else _inputs(config, sample, way)
        features = embeddings_of(inputs, classifier).of(sample.digests)
        right[way] = cross_validated(features, sample.targets, folds)
    return right


def _inputs(config: TrainConfig, sample: Manifest, way: str) -> NetworkInputs:
    """Return what the embeddings are computed from; the pixels are decoded when they are needed, and not kept."""
    data: DataSettings = replace(config.data, resize=way)
    reader = ImageReader(sample.root, data.preprocess, data.limits)
    live = LiveImages(sample, reader, ThreadPoolExecutor(data.cache.num_workers))
    size = data.preprocess.size
    cache = PixelCache(np.zeros((0, size, size, 3), np.uint8), np.full(len(sample), -1, dtype=np.int64), live)
    return NetworkInputs(config.model, data, sample, cache, Hardware("32-true", False), config.run.seed)


def cross_validated(features: np.ndarray, targets: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Return whether a logistic regression on the other folds predicts each image right, bool [N].

    Args:
        features: Embeddings float32 [N, D].
        targets: Their classes, int64 [N].
        folds: The fold of each, int64 [N].
    """
    right = np.zeros(len(targets), dtype=bool)
    for fold in np.unique(folds).tolist():
        held = folds == fold
        mean, std = features[~held].mean(axis=0), features[~held].std(axis=0) + 1e-6
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", "The number of unique classes")  # many classes of few images are fine
            regression = LogisticRegression(C=_STRENGTH, max_iter=_MAX_ITER)
            regression.fit((features[~held] - mean) / std, targets[~held])
            right[held] = regression.predict((features[held] - mean) / std) == targets[held]
    return right
