"""Attribution maps without gradients, for any backend: where blurring the image makes the class less likely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from image_classifier.errors import ConfigError, ServerError
from image_classifier.images import Preprocess
from image_classifier.inference.predictor import Predictor
from image_classifier.pillow_decoding import Size
from image_classifier.predictions import softmax

_WINDOWS = 10  # steps across the square
_WIDTH = 3  # steps that a window is wide: each position is covered by up to nine windows
_BATCH = 16  # blurred images in one run of the backend
_GRID = 28  # positions of the map along the image's longer side
_MIN_LOSS = 0.01  # of log-probability: a smaller loss is noise

# Pixels uint8 [N, 3, S, S] -> logits float32 [N, C].
Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class OcclusionMap:
    """The evidence for the class `label`: `plane` float32 [S, S] over the network's square, 0 to 1."""

    label: str
    plane: np.ndarray

    def over(self, preprocess: Preprocess, size: Size) -> np.ndarray:
        """Return the map over the original image, float32 [rows, columns], NaN where it was cut off.

        `size` is the width and height of the original image.
        """
        scale = _GRID / max(size)
        grid = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        return preprocess.laid_back(self.plane, size, grid)


def occlusion_map(
    pixels: np.ndarray, label: str | None, predictor: Predictor, run: Run, stopped: Callable[[], bool] = lambda: False
) -> OcclusionMap:
    """Return where in pixels uint8 [3, S, S] the evidence for a class lies, None for the most probable class.

    Occlusion (Zeiler & Fergus, 2014, section 4.2) with blur instead of grey (Fong & Vedaldi, 2017): the
    log-probability that the class loses, averaged over the windows that cover a position.

    Args:
        pixels: One preprocessed image.
        label: The class.
        predictor: Names the classes and the temperature.
        run: Runs the model on pixels uint8 [N, 3, S, S].
        stopped: Returns whether the answer is no longer wanted.

    Raises:
        ConfigError: The model has no such class.
        ServerError: The answer is no longer wanted.
    """
    if label is not None and label not in predictor.classes:
        raise ConfigError(f"the model has no class {label!r}", "GET /model lists them")
    side = pixels.shape[-1]
    # Log-probabilities of the image as it is, [C].
    known = np.log(np.maximum(softmax(run(pixels[None]), predictor.temperature), 1e-12))[0]
    code = int(known.argmax()) if label is None else predictor.classes.index(label)
    blurred = _blurred(pixels)
    lost, covered = np.zeros((2, side, side), np.float32)  # sum and number of the losses at each position
    windows = list(_windows(side))
    for start in range(0, len(windows), _BATCH):
        if stopped():
            raise ServerError("this explanation is no longer wanted")
        # One copy of the image for each window, blurred inside it, [B, 3, S, S].
        chosen = windows[start : start + _BATCH]
        changed = np.repeat(pixels[None], len(chosen), axis=0)
        for image, window in zip(changed, chosen, strict=True):
            image[:, *window] = blurred[:, *window]
        without = np.log(np.maximum(softmax(run(changed), predictor.temperature), 1e-12))[:, code]
        for window, value in zip(chosen, without, strict=True):
            lost[window] += known[code] - value
            covered[window] += 1
    # Average, keep what speaks for the class, and scale to a maximum of 1.
    mean = np.maximum(lost / np.maximum(covered, 1), 0)
    maximum = float(mean.max())
    plane = mean / maximum if maximum >= _MIN_LOSS else np.zeros_like(mean)
    return OcclusionMap(predictor.classes[code], plane)


def _windows(side: int) -> Iterator[tuple[slice, slice]]:
    """Yield the windows, each as rows and columns.

    Windows reach over the edges and are cut off there, so that all positions are covered equally often.
    """
    step = max(1.0, side / _WINDOWS)
    count = round(side / step)
    edges = [
        (max(0.0, (index + 1 - _WIDTH) * step), min(float(side), (index + 1) * step))
        for index in range(count + _WIDTH - 1)
    ]
    spans = [slice(round(start), round(end)) for start, end in edges if round(end) > round(start)]
    return ((rows, columns) for rows in spans for columns in spans)


def _blurred(pixels: np.ndarray) -> np.ndarray:
    """Return the image without its details, uint8 [3, S, S]."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(max(1.0, pixels.shape[-1] / 12)))).transpose(2, 0, 1)
