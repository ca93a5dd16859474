"""Out of distribution: how unlike the training images an image is, by the network's embedding of it and by its plain looks."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from image_classifier.atomic_io import write_bytes
from image_classifier.bundle import read_arrays
from image_classifier.errors import CheckpointError

DETECTOR = "ood.npz"
_LOOKS = 11  # properties of an image that need no network
_SHRINK = 0.1  # of a covariance, towards independent directions: few images must not make it singular
_EPSILON = 0.01  # of the range of a pixel: below it differences of looks count little


@dataclass(frozen=True)
class Gaussian:
    """Clusters of one common shape: `means` float32 [K, D] and the `whitening` float32 [D, D] that makes the shape a sphere."""

    means: np.ndarray
    whitening: np.ndarray

    @classmethod
    def fitted(cls, values: np.ndarray, targets: np.ndarray) -> Gaussian:
        """The Gaussian of values [N, D] in clusters by `targets` int64 [N], its covariance drawn a tenth of the way to a sphere's."""
        labels, places = np.unique(targets, return_inverse=True)
        means = np.stack([values[places == place].mean(axis=0, dtype=np.float64) for place in range(len(labels))])
        centred = values - means[places]
        covariance = centred.T @ centred / len(values)
        spread = max(float(np.trace(covariance)) / len(covariance), 1e-12)
        shrunk = (1 - _SHRINK) * covariance + _SHRINK * spread * np.eye(len(covariance))
        whitening = np.linalg.cholesky(np.linalg.inv(shrunk))
        return cls((means @ whitening).astype(np.float32), whitening.astype(np.float32))

    def distances(self, values: np.ndarray) -> np.ndarray:
        """The squared Mahalanobis distance of values [N, D] from the nearest mean (Lee et al., 2018), float32 [N]."""
        whitened = values.astype(np.float32) @ self.whitening
        squares = (whitened**2).sum(axis=1)[:, None] - 2 * whitened @ self.means.T + (self.means**2).sum(axis=1)
        return np.asarray(np.maximum(squares.min(axis=1), 0))


@dataclass(frozen=True)
class Detector:
    """Scores images: about 0 as a middling training image, 1 as one in 20 of them, higher the more unlike; nothing in it is a pickle.

    The embeddings are taken at length 1 and clustered by class. A network that has seen only colour photographs may lay grey digits among them:
    `looks` are a second opinion that it has no part in. The mean of both counts, each on the scale of `centres` and `scales`, float32 [2].
    """

    means: np.ndarray
    whitening: np.ndarray
    looks_mean: np.ndarray
    looks_whitening: np.ndarray
    centres: np.ndarray
    scales: np.ndarray

    @classmethod
    def fitted(cls, embeddings: np.ndarray, seen: np.ndarray, targets: np.ndarray) -> Detector:
        """A detector of training images: embeddings [N, D], `looks` [N, 11] and classes int64 [N]."""
        inner, outer = (
            Gaussian.fitted(_unit(embeddings), targets),
            Gaussian.fitted(seen, np.zeros(len(targets), np.int64)),
        )
        distances = np.stack([inner.distances(_unit(embeddings)), outer.distances(seen)])
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
        """How unlike the training images each is, float32 [N], of embeddings [N, D] and `looks` [N, 11]."""
        if embeddings.shape[1] != len(self.whitening):
            fact = f"the detector of unlike images takes {len(self.whitening)} features, the model gives {embeddings.shape[1]}"
            raise CheckpointError(fact, "use the bundle they came from")
        inner = Gaussian(self.means, self.whitening).distances(_unit(embeddings))
        outer = Gaussian(self.looks_mean, self.looks_whitening).distances(seen)
        both = (inner - self.centres[0]) / self.scales[0] + (outer - self.centres[1]) / self.scales[1]
        return np.asarray(both / 2, dtype=np.float32)

    def write(self, path: Path) -> None:
        """Write the detector whole or not at all; StorageError where the disk refuses."""
        buffer = io.BytesIO()
        np.savez(buffer, **{item.name: getattr(self, item.name) for item in fields(self)})
        write_bytes(path, buffer.getvalue())

    @classmethod
    def read(cls, path: Path) -> Detector:
        """What `write` left; CheckpointError where it is damaged."""
        detector = cls(
            **read_arrays(
                path, {item.name: ("float32", 1 if item.name in ("centres", "scales") else 2) for item in fields(cls)}
            )
        )
        width, looked = detector.means.shape[1], detector.looks_mean.shape[1]
        squares = detector.whitening.shape == (width, width) and detector.looks_whitening.shape == (looked, looked)
        if not squares or looked != _LOOKS or detector.centres.shape != (2,) or detector.scales.shape != (2,):
            raise CheckpointError(f"{str(path)!r} is no detector of unlike images", "copy the bundle anew")
        return detector


def looks(pixels: np.ndarray) -> np.ndarray:
    """Eleven plain properties of pixels uint8 [N, 3, S, S], float32 [N, 11].

    The mean of each channel; and as logarithms its spread, how colourful the image is on average and how unevenly, and how much neighbours across,
    neighbours down and the fine grain of the grey image differ. Of images of 128 pixels and more every second pixel counts, and so on: it costs less.
    """
    step = max(1, pixels.shape[2] // 64)
    values = pixels[:, :, ::step, ::step].astype(np.float32) / 255
    colour, grey = values.max(axis=1) - values.min(axis=1), values.mean(axis=1)
    across, down = (
        np.abs(np.diff(values, axis=axis, append=values.take([-1], axis))).mean(axis=(1, 2, 3)) for axis in (3, 2)
    )
    padded = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge")
    around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    grain = np.abs(4 * grey - around).mean(axis=(1, 2))
    single = np.stack([colour.mean(axis=(1, 2)), colour.std(axis=(1, 2)), across, down, grain], axis=1)
    return np.concatenate(
        [values.mean(axis=(2, 3)), np.log(np.hstack([values.std(axis=(2, 3)), single]) + _EPSILON)], axis=1
    )


def _unit(embeddings: np.ndarray) -> np.ndarray:
    values = embeddings.astype(np.float32)
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """The probability that an image from outside scores higher than one from inside, of scores [N] and [M]; equal ones count half."""
    values, places = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    within, beyond = (
        np.bincount(part, minlength=len(values)) for part in (places[: len(inside)], places[len(inside) :])
    )
    lower = np.concatenate([[0], within.cumsum()[:-1]])
    return float((beyond * (lower + within / 2)).sum() / (len(inside) * len(outside)))
