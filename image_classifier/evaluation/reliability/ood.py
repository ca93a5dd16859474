"""Out-of-distribution detection: how unlike the training images an image is, by its embedding and its appearance."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from image_classifier.atomic_io import write_bytes
from image_classifier.bundle import read_arrays
from image_classifier.errors import CheckpointError

DETECTOR = "ood.npz"
_NUM_LOOKS = 11  # properties of an image that need no network
_SHRINK = 0.1  # shrinkage of a covariance towards a sphere, so that few images do not make it singular
_EPSILON = 0.01  # share of a pixel's range below which differences of appearance count little


@dataclass(frozen=True)
class Gaussian:
    """Clusters with a common covariance: `means`, whitened, float32 [K, D], and the `whitening`, float32 [D, D]."""

    means: np.ndarray
    whitening: np.ndarray

    @classmethod
    def fitted(cls, values: np.ndarray, targets: np.ndarray) -> Gaussian:
        """Fit values [N, D] in K clusters by `targets` int64 [N]; shrink the covariance by a tenth to a sphere."""
        labels, cluster = np.unique(targets, return_inverse=True)
        means = np.stack([values[cluster == number].mean(axis=0, dtype=np.float64) for number in range(len(labels))])
        # Covariance within the clusters, [D, D].
        centred = values - means[cluster]
        covariance = centred.T @ centred / len(values)
        spread = max(float(np.trace(covariance)) / len(covariance), 1e-12)
        shrunk = (1 - _SHRINK) * covariance + _SHRINK * spread * np.eye(len(covariance))
        # W with W Wᵀ = the inverse covariance: Mahalanobis distances are Euclidean after multiplication by W.
        whitening = np.linalg.cholesky(np.linalg.inv(shrunk))
        return cls((means @ whitening).astype(np.float32), whitening.astype(np.float32))

    def distances(self, values: np.ndarray) -> np.ndarray:
        """Return squared Mahalanobis distances of values [N, D] to the nearest mean (Lee et al., 2018), float32 [N]."""
        whitened = values.astype(np.float32) @ self.whitening
        # |x|² - 2 x·m + |m|², [N, K].
        squares = (whitened**2).sum(axis=1)[:, None] - 2 * whitened @ self.means.T + (self.means**2).sum(axis=1)
        return np.asarray(np.maximum(squares.min(axis=1), 0))


@dataclass(frozen=True)
class Detector:
    """Scores images: 0 is the median of the training images, 1 their 95th percentile, higher is more unlike them.

    Embeddings are normalised to length 1 and clustered by class. A network trained on colour photographs may place grey
    digits among them, so `looks` give a second opinion without the network. The score is the mean of both distances,
    each scaled by `centres` and `scales`, float32 [2]. The file holds no pickle.
    """

    means: np.ndarray
    whitening: np.ndarray
    looks_mean: np.ndarray
    looks_whitening: np.ndarray
    centres: np.ndarray
    scales: np.ndarray

    @classmethod
    def fitted(cls, embeddings: np.ndarray, seen: np.ndarray, targets: np.ndarray) -> Detector:
        """Fit a detector to training images: embeddings [N, D], `looks` [N, 11] and classes int64 [N]."""
        # Embeddings have one cluster for each class, looks one for all images.
        inner = Gaussian.fitted(_unit(embeddings), targets)
        outer = Gaussian.fitted(seen, np.zeros(len(targets), np.int64))
        distances = np.stack([inner.distances(_unit(embeddings)), outer.distances(seen)])
        # Scale both distances [2, N] so that the median is 0 and the 95th percentile 1.
        centres, tails = np.quantile(distances, (0.5, 0.95), axis=1)
        scales = np.maximum(tails - centres, 1e-6)
        return cls(
            inner.means,
            inner.whitening,
            outer.means,
            outer.whitening,
            centres.astype(np.float32),
            scales.astype(np.float32),
        )

    def scores(self, embeddings: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Return the score of each image, float32 [N], from embeddings [N, D] and `looks` [N, 11]."""
        if embeddings.shape[1] != len(self.whitening):
            features = f"expects {len(self.whitening)} features, but the model gives {embeddings.shape[1]}"
            raise CheckpointError(
                f"the out-of-distribution detector {features}", "use the detector of this model's bundle"
            )
        inner = Gaussian(self.means, self.whitening).distances(_unit(embeddings))
        outer = Gaussian(self.looks_mean, self.looks_whitening).distances(seen)
        both = (inner - self.centres[0]) / self.scales[0] + (outer - self.centres[1]) / self.scales[1]
        return np.asarray(both / 2, dtype=np.float32)

    def write(self, path: Path) -> None:
        """Write the detector.

        Raises:
            StorageError: The file cannot be written; an old one is unchanged.
        """
        buffer = io.BytesIO()
        np.savez(buffer, **{item.name: getattr(self, item.name) for item in fields(self)})
        write_bytes(path, buffer.getvalue())

    @classmethod
    def read(cls, path: Path) -> Detector:
        """Read the file that `write` wrote.

        Raises:
            CheckpointError: The file is damaged.
        """
        shapes = {item.name: ("float32", 1 if item.name in ("centres", "scales") else 2) for item in fields(cls)}
        detector = cls(**read_arrays(path, shapes))
        width, looked = detector.means.shape[1], detector.looks_mean.shape[1]
        squares = detector.whitening.shape == (width, width) and detector.looks_whitening.shape == (looked, looked)
        if not squares or looked != _NUM_LOOKS or detector.centres.shape != (2,) or detector.scales.shape != (2,):
            raise CheckpointError(f"{str(path)!r} is not an out-of-distribution detector", "copy the bundle again")
        return detector


def looks(pixels: np.ndarray) -> np.ndarray:
    """Return eleven properties of the appearance of pixels uint8 [N, 3, S, S], float32 [N, 11].

    These are the mean of each channel and, as logarithms, the spread of each channel, mean and spread of the
    colourfulness, the mean difference of horizontal and of vertical neighbours, and the grain of the grey image. From
    128 pixels on every second pixel is used, and so on, to save time.
    """
    step = max(1, pixels.shape[2] // 64)
    # Values 0..1, [N, 3, S', S']; colourfulness and grey image, [N, S', S'].
    values = pixels[:, :, ::step, ::step].astype(np.float32) / 255
    colour = values.max(axis=1) - values.min(axis=1)
    grey = values.mean(axis=1)
    # Mean difference of neighbours, [N].
    across, down = (
        np.abs(np.diff(values, axis=axis, append=values.take([-1], axis))).mean(axis=(1, 2, 3)) for axis in (3, 2)
    )
    # Grain: mean absolute Laplacian of the grey image, [N].
    padded = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge")
    around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    grain = np.abs(4 * grey - around).mean(axis=(1, 2))
    single = np.stack([colour.mean(axis=(1, 2)), colour.std(axis=(1, 2)), across, down, grain], axis=1)
    spreads = np.log(np.hstack([values.std(axis=(2, 3)), single]) + _EPSILON)
    return np.concatenate([values.mean(axis=(2, 3)), spreads], axis=1)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    values = embeddings.astype(np.float32)
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """Return the probability that an outside image scores higher than an inside one, from scores [N] and [M].

    Equal scores count half.

    >>> auroc(np.array([0.1, 0.2, 0.3]), np.array([0.3, 0.9]))
    0.9166666666666666
    """
    # Number of inside and outside images for each distinct score.
    values, rank = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    num_inside = np.bincount(rank[: len(inside)], minlength=len(values))
    num_outside = np.bincount(rank[len(inside) :], minlength=len(values))
    lower = np.concatenate([[0], num_inside.cumsum()[:-1]])
    return float((num_outside * (lower + num_inside / 2)).sum() / (len(inside) * len(outside)))
