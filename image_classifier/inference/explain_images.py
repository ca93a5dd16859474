"""Heat maps of the evidence for an answer, drawn over the image: `infer --explain` and the report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from image_classifier.bundle import INFO_NAME, read_bundle
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.evaluation.plots.heat_map import explanation_name, plot_explanation
from image_classifier.images import DEFAULT_LIMITS, DecodeLimits, Preprocess, inspect
from image_classifier.predictions import Prediction
from image_classifier.program import program
from image_classifier.sources.image_source import Content

if TYPE_CHECKING:
    from image_classifier.modeling.classifier import Classifier

log = logging.getLogger(__name__)

_SHOWN_SIDE = 480  # pixels of the longer side of an image in a figure


class Explained(NamedTuple):
    """An image and its heat map.

    Args:
        picture: The image as it is shown, uint8 [H, W, 3].
        heat: The heat over it, float32 [H, W], NaN where the network saw nothing.
        method: The name of the method.
    """

    picture: np.ndarray
    heat: np.ndarray
    method: str


# An image's file or bytes and a class -> the evidence for that class; UnreadableImage where it cannot be read.
Explainer = Callable[[Content, str], Explained]


def explainer_of(path: Path, trusted: Sequence[str] = (), limits: DecodeLimits = DEFAULT_LIMITS) -> Explainer:
    """Return an explainer that uses the checkpoint of a bundle, or a `.ckpt`; a bundle's exports answer as it does.

    Raises:
        ConfigError: It is an ONNX file, which has no gradients.
        CheckpointError: The checkpoint is missing or damaged.
    """
    checkpoint = checkpoint_of(path)
    from image_classifier.inference.checkpoint import load_classifier  # torch

    classifier, blueprint = load_classifier(checkpoint, trusted)
    return explainer_with(classifier, blueprint["classes"], Preprocess.from_dict(blueprint["preprocess"]), limits)


def explainer_with(
    classifier: Classifier, classes: Sequence[str], preprocess: Preprocess, limits: DecodeLimits
) -> Explainer:
    """Return an explainer that uses a loaded classifier."""
    from image_classifier.inference.attribution import attribution_map  # torch

    codes = {label: code for code, label in enumerate(classes)}

    def explain_image(image: Content, label: str) -> Explained:
        pixels = preprocess.read(image, limits).transpose(2, 0, 1)
        attribution = attribution_map(classifier, pixels, codes[label])
        return Explained(*over_picture(image, attribution.heat, preprocess, limits), attribution.method)

    return explain_image


def explained(
    answers: Iterable[tuple[Prediction, Content]], explainer: Explainer, directory: Path
) -> Iterator[tuple[Prediction, Content]]:
    """Yield the answers as they come, after the figure of each was written to `directory`."""
    count = 0
    for prediction, content in answers:
        if not prediction.error:
            explanation = explainer(content, prediction.label)
            write_explanation(explanation, prediction.label, prediction.confidence, Path(prediction.path), directory)
            count += 1
        yield prediction, content
    log.info("explanations of %d images: %s", count, directory)


def write_explanation(explanation: Explained, label: str, confidence: float, file: Path, directory: Path) -> None:
    """Write the figure of one answer, under the name by which the report finds the explanation of the file."""
    plot_explanation(
        explanation.picture,
        explanation.heat,
        f"{label} {confidence:.1%}",
        explanation.method,
        directory / explanation_name(file),
        "/".join(file.parts[-2:]),
    )


def checkpoint_of(path: Path) -> Path:
    """Return the `.ckpt` of a bundle, its hash checked, or the lone `.ckpt`; raises as `explainer_of`."""
    if path.suffix == ".onnx":
        raise ConfigError(
            f"{path.name} is an ONNX file, which has no gradients to explain an answer",
            "give its bundle or its .ckpt: --checkpoint_name NAME",
        )
    if not (path / INFO_NAME).is_file():
        return path
    bundle = read_bundle(path)
    if not (path / "model.ckpt").is_file():
        raise CheckpointError(
            f"the bundle {str(path)!r} has no model.ckpt, which explanations need",
            "copy it from the machine that trained, or leave --explain out "
            f"({program()} infer --checkpoint_name {path.name} --images PATH)",
        )
    bundle.verify(["model.ckpt"])
    return bundle.path("model.ckpt")


def over_picture(
    image: Content, heat: np.ndarray, preprocess: Preprocess, limits: DecodeLimits
) -> tuple[np.ndarray, np.ndarray]:
    """Return the image at the size it is shown, uint8 [H, W, 3], and the heat over it, float32 [H, W].

    `heat` is that of the network's square, float32 [S, S]; over parts that the network did not see it is NaN.
    """
    header, pixels = inspect(image, limits, preprocess.background, at_least=(_SHOWN_SIDE, _SHOWN_SIDE))
    size = (header.width, header.height)
    scale = _SHOWN_SIDE / max(size)
    shown = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    # Enlarged pixels stay sharp squares.
    resampling = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.BICUBIC
    picture = np.array(Image.fromarray(pixels).resize(shown, resampling))
    return picture, preprocess.laid_back(heat, size, shown)
