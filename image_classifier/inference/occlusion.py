"""What in an image speaks for a class, found without gradients: parts of it are blurred, and the class becomes less likely. Any backend will do."""

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
_WIDTH = 3  # steps that a window is wide: each place is judged with what is around it, nine times
_CHUNK = 16  # blurred images asked about at once
_GRID = 28  # places of the answer along the picture's longer side
_LEAST = 0.01  # of log-probability: a smaller loss means nothing

Ask = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class OcclusionMap:
    """What speaks for the class `label`: `plane` float32 [S, S] over the network's square, 0 for what does not, 1 for what does most."""

    label: str
    plane: np.ndarray

    def over(self, preprocess: Preprocess, whole: Size) -> np.ndarray:
        """The same over the picture that the square was made from, of this width and height: float32 [rows, columns], NaN where it was cut off."""
        scale = _GRID / max(whole)
        return preprocess.laid_back(
            self.plane, whole, (max(1, round(whole[0] * scale)), max(1, round(whole[1] * scale)))
        )


def occlusion_map(
    pixels: np.ndarray, label: str | None, predictor: Predictor, ask: Ask, stopped: Callable[[], bool] = lambda: False
) -> OcclusionMap:
    """What in pixels uint8 [3, S, S] speaks for a class, null for the most probable one, by the logits [N, C] of `ask` for pixels [N, 3, S, S].

    Occlusion (Zeiler & Fergus, 2014, section 4.2) with a blur in place of grey (Fong & Vedaldi, 2017): how much log-probability the class loses,
    on average over the windows that cover a place.

    Raises:
        ConfigError: The model has no such class.
        ServerError: `stopped` says that nobody waits any more.
    """
    if label is not None and label not in predictor.classes:
        raise ConfigError(f"the model has no class {label!r}", "GET /model lists them")
    side = pixels.shape[-1]
    known = np.log(np.maximum(softmax(ask(pixels[None]), predictor.temperature), 1e-12))[0]
    code = int(known.argmax()) if label is None else predictor.classes.index(label)
    blurred = _blurred(pixels)
    lost, covered = np.zeros((side, side), np.float32), np.zeros((side, side), np.float32)
    windows = list(_windows(side))
    for start in range(0, len(windows), _CHUNK):
        if stopped():
            raise ServerError("nobody waits for this explanation any more")
        chosen = windows[start : start + _CHUNK]
        changed = np.repeat(pixels[None], len(chosen), axis=0)
        for image, window in zip(changed, chosen, strict=True):
            image[:, *window] = blurred[:, *window]
        found = np.log(np.maximum(softmax(ask(changed), predictor.temperature), 1e-12))[:, code]
        for window, value in zip(chosen, found, strict=True):
            lost[window] += known[code] - value
            covered[window] += 1
    mean = np.maximum(lost / np.maximum(covered, 1), 0)
    most = float(mean.max())
    return OcclusionMap(predictor.classes[code], mean / most if most >= _LEAST else np.zeros_like(mean))


def _windows(side: int) -> Iterator[tuple[slice, slice]]:
    """The windows, each as rows and columns; at the edges they are cut off, so that every place is covered as often as its neighbours can be."""
    step = max(1.0, side / _WINDOWS)
    count = round(side / step)
    edges = [
        (max(0.0, (place + 1 - _WIDTH) * step), min(float(side), (place + 1) * step))
        for place in range(count + _WIDTH - 1)
    ]
    parts = [slice(round(start), round(end)) for start, end in edges if round(end) > round(start)]
    return ((rows, columns) for rows in parts for columns in parts)


def _blurred(pixels: np.ndarray) -> np.ndarray:
    """The same picture without its details, uint8 [3, S, S]."""
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(max(1.0, pixels.shape[-1] / 12)))).transpose(2, 0, 1)
