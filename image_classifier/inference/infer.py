"""The verb `infer`: images on the command line to answers on standard output."""

from __future__ import annotations

import csv
import glob
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from image_classifier import settings
from image_classifier.dataset.fetch.dvc import pull_missing
from image_classifier.errors import ConfigError, DataError, storage_errors
from image_classifier.evaluation.decision import DecisionSettings
from image_classifier.files import whole_file
from image_classifier.images import IMAGE_SUFFIXES, DecodeLimits
from image_classifier.inference.backends import ServerAt
from image_classifier.inference.load import load_predictor, pulled_checkpoint
from image_classifier.predictions import Prediction


@dataclass(frozen=True)
class InferSettings:
    """The keys of conf/infer.yaml."""

    checkpoint_name: str
    images: list[str]
    backend: str | None = None
    url: str | None = None
    server_timeout_s: float = 60.0
    format: str = "table"
    top_k: int | None = None
    batch_size: int = 64
    output: str | None = None
    dvc: bool | None = None
    explain: bool | str = False
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    decision: DecisionSettings = field(default_factory=DecisionSettings)
    models_dir: str = "models"
    plots_dir: str = "plots"
    trusted_packages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"there is no format {self.format!r}", f"use one of {', '.join(FORMATS)}")
        if self.batch_size < 1 or (self.top_k is not None and self.top_k < 1):
            raise ConfigError("batch_size and top_k must be at least 1")
        self.server.fits(self.backend)

    @property
    def server(self) -> ServerAt:
        """Where the backend triton asks."""
        return ServerAt(self.url, self.server_timeout_s)


def infer(config: Any) -> None:
    """Answer for each image; DataError at the end where some could not be read (their rows say why)."""
    asked = settings.typed(InferSettings, config, "")
    path = pulled_checkpoint(asked.checkpoint_name, Path(asked.models_dir), asked.dvc)
    for item in asked.images:
        pull_missing(Path(item), None if asked.dvc else asked.dvc)
    images = list(find_images(asked.images, sys.stdin))
    predictor = load_predictor(path, asked.backend, asked.batch_size, asked.trusted_packages, asked.limits, asked.decision, asked.server)
    failed: list[str] = []
    predictions = _watched(predictor.predict(images), failed)
    if asked.explain:
        from image_classifier.inference.explain_images import explained, explainer_of

        default = Path(asked.plots_dir) / (path.name if path.is_dir() else path.stem) / "explain"
        directory = default if asked.explain is True else Path(asked.explain)
        predictions = explained(predictions, explainer_of(path, asked.trusted_packages, asked.limits), directory)
    lines = FORMATS[asked.format](predictions, asked.top_k, images)
    with whole_file(Path(asked.output)) if asked.output else nullcontext(sys.stdout.buffer) as file, storage_errors(asked.output or "the answers"):
        _write(lines, file)
    if failed:
        raise DataError(f"{len(failed)} of {len(images)} images could not be read, first {failed[0]}", "their rows say why")


def find_images(items: Iterable[str], stdin: IO[str]) -> Iterator[Path]:
    """Files, the images in folders, globs, and the lines of standard input for `-`, in the order given.

    Raises:
        DataError: A folder or a pattern holds no image, or there is none at all.
    """
    count = 0
    for item in items:
        for path in _expand(item, stdin):
            count += 1
            yield path
    if not count:
        raise DataError("there is no image to answer for", "give files, folders, globs, or - for a list on standard input")


def _expand(item: str, stdin: IO[str]) -> list[Path]:
    path = Path(item)
    if item == "-":
        return [Path(line) for line in (raw.rstrip("\r\n") for raw in stdin) if line]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not _hidden(file, path))
    elif path.exists() or not glob.has_magic(item):
        return [path]
    else:
        found = sorted(Path(name) for name in glob.glob(item, recursive=True) if Path(name).is_file())
    if not found:
        raise DataError(f"{item!r} holds no image", f"images end in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return found


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _watched(predictions: Iterable[Prediction], failed: list[str]) -> Iterator[Prediction]:
    for prediction in predictions:
        if prediction.error:
            failed.append(f"{prediction.path!r} ({prediction.error})")
        yield prediction


def _write(lines: Iterable[str], file: IO[bytes]) -> None:
    for line in lines:
        file.write((line + "\n").encode("utf-8", "surrogateescape"))
    file.flush()


def _table(predictions: Iterable[Prediction], top_k: int | None, images: list[Path]) -> Iterator[str]:
    width = min(60, max(5, *(len(str(path)) for path in images)))
    yield f"{'image':<{width}}  {'class':<24}  confidence  next"
    for prediction in predictions:
        if prediction.error:
            yield f"{prediction.path:<{width}}  ! {prediction.error}"
            continue
        ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[1 : top_k or 3]
        others = ", ".join(f"{label} {probability:.1%}" for label, probability in ranked)
        why = f"; abstain, {prediction.reason}" if prediction.reason else ""
        yield f"{prediction.path:<{width}}  {prediction.label:<24}  {prediction.confidence:>10.1%}  {others}{why}"


def _jsonl(predictions: Iterable[Prediction], top_k: int | None, images: list[Path]) -> Iterator[str]:
    for prediction in predictions:
        yield _printable(json.dumps(prediction.answer(top_k), ensure_ascii=False))


def _json(predictions: Iterable[Prediction], top_k: int | None, images: list[Path]) -> Iterator[str]:
    before = "["
    for line in _jsonl(predictions, top_k, images):
        yield before + line
        before = ","
    yield "]"


def _csv(predictions: Iterable[Prediction], top_k: int | None, images: list[Path]) -> Iterator[str]:
    for number, prediction in enumerate(predictions):
        if number == 0:
            yield _row(("path", "predicted_class", "confidence", "error", "all_predictions", "decision", "reason", "prediction_set"))
        answer = prediction.answer(top_k)
        probabilities, may_be = (
            json.dumps(answer.get(key, empty), ensure_ascii=False) for key, empty in (("all_predictions", {}), ("prediction_set", None))
        )
        told = ("", "", "") if prediction.error else (prediction.decision, prediction.reason, may_be)
        yield _row((prediction.path, prediction.label, "" if prediction.error else prediction.confidence, prediction.error, probabilities, *told))


def _row(values: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue()


def _printable(text: str) -> str:
    """JSON is UTF-8: the bytes of a file name that are not become escapes, so that every line can be parsed."""
    return "".join(f"\\u{ord(letter):04x}" if "\ud800" <= letter <= "\udfff" else letter for letter in text)


FORMATS: dict[str, Callable[[Iterable[Prediction], int | None, list[Path]], Iterator[str]]] = {
    "table": _table,
    "json": _json,
    "jsonl": _jsonl,
    "csv": _csv,
}
