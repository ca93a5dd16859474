"""The code that MLflow runs: images as bytes, base64, arrays or paths in, the answers of `infer` out. Loads no torch.

MLflow keeps this file as the model's code, with a copy of the package (`exporting/mlflow_model.py` writes both).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel

from image_classifier.errors import UnreadableImage
from image_classifier.inference.load import load_predictor

_ACCEPTED = (
    "give an image as bytes, as base64 text, as an array of integers 0 to 255 [height, width, 3], or as a pathlib.Path"
)


class ServedClassifier(PythonModel):
    """A bundle behind MLflow's pyfunc.

    `model_config={"allow_paths": True}` lets text under `path` name files of this machine; a server must not set it.
    """

    def load_context(self, context: Any) -> None:
        self.predictor = load_predictor(Path(context.artifacts["bundle"]), "onnx")
        self.allow_paths = bool((context.model_config or {}).get("allow_paths", False))

    def predict(
        self, context: Any, model_input: np.ndarray, params: Mapping[str, Any] | None = None
    ) -> list[dict[str, object]]:
        """Return the JSON object of `infer` for each image.

        Raises:
            MlflowException: An input is not an image; a server answers it with 400.
        """
        squares = [self._square(number, _plain(item)) for number, item in enumerate(_items(model_input))]
        names = [f"input {number}" for number in range(len(squares))]
        return [answer.answer() for answer in self.predictor.predictions(names, squares)]

    def _square(self, number: int, item: Any) -> np.ndarray:
        """Return the pixels uint8 [S, S, 3] of one input."""
        if isinstance(item, np.ndarray):
            if item.ndim != 3 or item.shape[2] != 3 or not item.size or not _are_bytes(item):
                raise _refused(number, f"is an array {item.dtype} of shape {item.shape}")
            return self.predictor.preprocess(np.ascontiguousarray(item, dtype=np.uint8))
        pixels = self.predictor.read(self._source(number, item))
        if isinstance(pixels, UnreadableImage):
            raise _refused(number, f"cannot be read ({pixels.reason})")
        return pixels

    def _source(self, number: int, item: Any) -> Path | bytes:
        if isinstance(item, Mapping) and set(item) == {"path"} and isinstance(item["path"], str):
            if not self.allow_paths:
                raise _refused(
                    number, 'names a file, which is off: load the model with model_config={"allow_paths": True}'
                )
            return Path(item["path"])
        if isinstance(item, str):
            try:
                return base64.b64decode(
                    item.partition(";base64,")[2] if item.startswith("data:") else item, validate=True
                )
            except (binascii.Error, ValueError) as error:
                raise _refused(number, "is text but not base64") from error
        if isinstance(item, bytes | Path):
            return item
        raise _refused(number, f"is of the type {type(item).__name__}")


def _items(model_input: Any) -> Iterator[Any]:
    """Yield one item per image.

    The input is a list, an array uint8 [H, W, 3] or [N, H, W, 3], or a table with the column `image` or `path`.
    """
    if isinstance(model_input, np.ndarray):
        yield from (model_input[None] if model_input.ndim in (0, 3) else model_input)
    elif hasattr(model_input, "to_dict"):  # a table of pandas
        yield from model_input.to_dict(orient="records")
    elif isinstance(model_input, Mapping) and len(model_input) == 1 and _is_column(next(iter(model_input.values()))):
        ((name, column),) = model_input.items()
        yield from ({name: item} for item in column)
    elif isinstance(model_input, bytes | str | Path | Mapping):
        yield model_input
    else:
        yield from model_input


def _is_column(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim == 1)


def _are_bytes(values: np.ndarray) -> bool:
    """Return whether all values are integers from 0 to 255; a server turns those in JSON into int64."""
    return values.dtype == np.uint8 or (
        values.dtype.kind in "iu" and int(values.min()) >= 0 and int(values.max()) <= 255
    )


def _plain(item: Any) -> Any:
    """Return an input without what a server or a table adds: arrays without dimensions, and the column `image`."""
    if isinstance(item, Mapping):
        item = {key: _plain(value) for key, value in item.items()}
        return item["image"] if set(item) == {"image"} else item
    return item.item() if isinstance(item, np.ndarray | np.generic) and not item.ndim else item


def _refused(number: int, reason: str) -> MlflowException:
    return MlflowException(f"input {number} {reason}: {_ACCEPTED}", error_code=INVALID_PARAMETER_VALUE)


mlflow.models.set_model(ServedClassifier())
