"""`infer --explain`: beside each answer a figure of what in the image speaks for it."""

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

_SHOWN = 480  # longest side of a picture in a figure, pixels


class Explained(NamedTuple):
    """A picture as it is shown, uint8 [H, W, 3], the heat over it, float32 [H, W], NaN where the network did not look, and how it was found."""

    picture: np.ndarray
    heat: np.ndarray
    method: str


# An image's file or bytes and a class -> what in it speaks for that class; UnreadableImage where it cannot be read.
Explainer = Callable[[Content, str], Explained]


def explainer_of(path: Path, trusted: Sequence[str] = (), limits: DecodeLimits = DEFAULT_LIMITS) -> Explainer:
    """What explains images with the checkpoint behind what `bundle.find_checkpoint` found; a bundle's exports answer as it does.

    Raises:
        ConfigError: There is only an ONNX file, through which no gradient flows.
        CheckpointError: The checkpoint is missing or damaged.
    """
    checkpoint = checkpoint_of(path)
    from image_classifier.inference.checkpoint import load_classifier  # torch

    classifier, blueprint = load_classifier(checkpoint, trusted)
    return explainer_with(classifier, blueprint["classes"], Preprocess.from_dict(blueprint["preprocess"]), limits)


def explainer_with(
    classifier: Classifier, classes: Sequence[str], preprocess: Preprocess, limits: DecodeLimits
) -> Explainer:
    """What explains images with a classifier at hand."""
    from image_classifier.inference.attribution import attribution_map  # torch

    codes = {label: code for code, label in enumerate(classes)}

    def explain_image(image: Content, label: str) -> Explained:
        found = attribution_map(classifier, preprocess.read(image, limits).transpose(2, 0, 1), codes[label])
        return Explained(*over_picture(image, found.heat, preprocess, limits), found.method)

    return explain_image


def explained(
    answers: Iterable[tuple[Prediction, Content]], explainer: Explainer, directory: Path
) -> Iterator[tuple[Prediction, Content]]:
    """The answers as they come, the figure of each one that is an answer written to `directory`."""
    count = 0
    for prediction, content in answers:
        if not prediction.error:
            found = explainer(content, prediction.label)
            write_explanation(found, prediction.label, prediction.confidence, Path(prediction.path), directory)
            count += 1
        yield prediction, content
    log.info("explanations of %d images: %s", count, directory)


def write_explanation(found: Explained, label: str, confidence: float, file: Path, directory: Path) -> None:
    """Write the figure of one answer to the directory, under the name by which the report looks for the explanation of the file."""
    plot_explanation(
        *found[:2],
        f"{label} {confidence:.1%}",
        found.method,
        directory / explanation_name(file),
        "/".join(file.parts[-2:]),
    )


def checkpoint_of(path: Path) -> Path:
    """The `.ckpt` of what `bundle.find_checkpoint` found, its hash checked where a bundle knows it; errors as `explainer_of`."""
    if path.suffix == ".onnx":
        raise ConfigError(
            f"{path.name} is an ONNX file, through which no gradient flows",
            "give its bundle or its .ckpt: --checkpoint_name NAME",
        )
    if not (path / INFO_NAME).is_file():
        return path
    bundle = read_bundle(path)
    if not (path / "model.ckpt").is_file():
        hint = f"copy it from the machine that trained, or leave --explain out ({program()} infer --checkpoint_name {path.name} --images PATH)"
        raise CheckpointError(f"the bundle {str(path)!r} has no model.ckpt, which explanations need", hint)
    bundle.verify(["model.ckpt"])
    return bundle.path("model.ckpt")


def over_picture(
    image: Content, heat: np.ndarray, preprocess: Preprocess, limits: DecodeLimits
) -> tuple[np.ndarray, np.ndarray]:
    """The picture at the size it is shown, uint8 [H, W, 3], and the square's heat over it, float32 [H, W], NaN where the network did not look."""
    header, pixels = inspect(image, limits, preprocess.background, at_least=(_SHOWN, _SHOWN))
    whole = (header.width, header.height)
    scale = _SHOWN / max(whole)
    shape = max(1, round(whole[0] * scale)), max(1, round(whole[1] * scale))
    sampling = (
        Image.Resampling.NEAREST if scale > 3 else Image.Resampling.BICUBIC
    )  # pixels that can be counted stay squares
    return np.array(Image.fromarray(pixels).resize(shape, sampling)), preprocess.laid_back(heat, whole, shape)
