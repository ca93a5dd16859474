"""Results of the Python API, shown in a notebook as a picture with bars, a heat map or a table of issues."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from image_classifier.errors import UnreadableImage
from image_classifier.images import decode
from image_classifier.predictions import Prediction
from image_classifier.sources.image_source import Content
from image_classifier.text import counted, printable

if TYPE_CHECKING:
    from image_classifier.dataset.audit.issues import Issue

_SIDE = 160  # longer side of a picture in a notebook, pixels
_SMALL = 48  # images below this side keep their pixels as squares
_MAX_BARS = 5
_MAX_SHOWN = 24  # predictions of a list


@dataclass(frozen=True)
class ImagePrediction(Prediction):
    """The prediction for one image, with the image itself to show in a notebook."""

    content: Content = field(default=b"", repr=False, compare=False)

    @classmethod
    def of(cls, prediction: Prediction, content: Content) -> ImagePrediction:
        """Return a prediction together with the file, or its bytes, that it is for."""
        return cls(**{item.name: getattr(prediction, item.name) for item in fields(Prediction)}, content=content)

    def __str__(self) -> str:
        return f"{self.path}: {self.error or f'{self.label} {self.confidence:.1%}'}"

    def _repr_html_(self) -> str:
        """Return the picture and a bar for each of the most probable classes."""
        picture = _picture(self.content)
        return f'<div style="display:flex;gap:1em;align-items:center">{picture}<div>{self._bars()}</div></div>'

    def _bars(self) -> str:
        if self.error:
            return f"<b>{_escaped(self.path)}</b><br>{_escaped(self.error)}"
        ranked = sorted(self.probabilities.items(), key=lambda item: -item[1])[:_MAX_BARS]
        unsure = f"<br><i>not sure: {_escaped(self.reason)}</i>" if self.reason else ""
        return f"<b>{_escaped(self.label)}</b> {self.confidence:.1%}{unsure}{''.join(_bar(*item) for item in ranked)}"


class ImagePredictions(list[ImagePrediction]):
    """The predictions for several images, in order."""

    def __init__(self, predictions: Iterable[ImagePrediction]) -> None:
        super().__init__(predictions)

    def to_dicts(self) -> list[dict[str, object]]:
        """Return what the command `infer --format json` writes, such as for a data frame."""
        return [prediction.answer() for prediction in self]

    def _repr_html_(self) -> str:
        """Return the first pictures, each with its label."""
        shown = "".join(f'<div style="width:22em">{one._repr_html_()}</div>' for one in self[:_MAX_SHOWN])
        rest = len(self) - _MAX_SHOWN
        more = f"<p>and {counted(rest, 'image')} more</p>" if rest > 0 else ""
        return f'<div style="display:flex;flex-wrap:wrap;gap:1em">{shown}</div>{more}'


@dataclass(frozen=True)
class ImageExplanation:
    """What in an image is evidence for a class.

    Attributes:
        path: Of the image.
        label: The class that is explained.
        probability: Of that class.
        picture: The image as it is shown, uint8 [H, W, 3].
        heat: From 0 to 1 where the evidence is, float32 [H, W]; NaN where the network did not look.
        method: How the heat map was computed.
    """

    path: str
    label: str
    probability: float
    picture: np.ndarray = field(repr=False)
    heat: np.ndarray = field(repr=False)
    method: str

    def save(self, path: str | Path) -> Path:
        """Write the picture, the heat map over it and a colour scale as a PNG file."""
        from image_classifier.evaluation.plots.heat_map import plot_explanation

        title = f"{self.label} {self.probability:.1%}"
        plot_explanation(self.picture, self.heat, title, self.method, Path(path), Path(self.path).name)
        return Path(path)

    def _repr_html_(self) -> str:
        """Return the picture next to the picture under its heat map."""
        heat = np.nan_to_num(self.heat)[:, :, None]
        red = np.array([255, 40, 0], np.float32)
        mixed = (self.picture * (1 - 0.6 * heat) + red * 0.6 * heat).clip(0, 255).astype(np.uint8)
        text = f"<b>{_escaped(self.label)}</b> {self.probability:.1%}<br>{_escaped(self.method)}"
        return f'<div style="display:flex;gap:1em">{_image_tag(self.picture)}{_image_tag(mixed)}<div>{text}</div></div>'


@dataclass(frozen=True)
class AuditResult:
    """The issues of a data set, worst first.

    Attributes:
        issues: Each with its severity, its type and the files it concerns.
        lines: The table that the command `audit` prints.
        page: The HTML page with thumbnails.
        exclude_path: exclude.csv, the images that later runs leave out.
    """

    issues: Sequence[Issue]
    lines: tuple[str, ...] = field(repr=False)
    page: Path
    exclude_path: Path

    def __str__(self) -> str:
        return "\n".join([*self.lines, f"page     {self.page}", f"exclude  {self.exclude_path}"])

    def _repr_html_(self) -> str:
        """Return the table."""
        return "<pre>" + "\n".join(_escaped(line) for line in str(self).splitlines()) + "</pre>"


def _bar(label: str, probability: float) -> str:
    width = f"width:{probability * 100:.1f}%"
    bar = f'<div style="background:#2b5c92;height:.5em;{width}"></div>'
    return f'<div style="font-size:85%;width:14em">{_escaped(label)} {probability:.1%}{bar}</div>'


def _picture(content: Content) -> str:
    """Return an image as an <img> element; nothing where it cannot be read."""
    if not content:
        return ""
    try:
        return _image_tag(decode(content, at_least=(_SIDE, _SIDE)))
    except UnreadableImage:
        return ""


def _image_tag(pixels: np.ndarray) -> str:
    """Return pixels uint8 [H, W, 3] as an <img> element that carries them; a small image is enlarged."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((_SIDE, _SIDE))
    image.save(buffer, "PNG")
    width = round(image.width * _SIDE / max(image.size))
    rendering = "pixelated" if max(image.size) < _SMALL else "auto"
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img style="width:{width}px;image-rendering:{rendering}" src="data:image/png;base64,{data}">'


def _escaped(text: Any) -> str:
    return html.escape(printable(str(text)))
