"""Writers of answers as a table, JSON, JSONL, CSV or Parquet, one answer at a time, and a check of the output path."""

from __future__ import annotations

import glob
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from image_classifier.atomic_io import is_replaceable
from image_classifier.errors import ConfigError, storage_errors
from image_classifier.extras import install
from image_classifier.images import is_image_name
from image_classifier.manifest import csv_writer
from image_classifier.sources.image_source import ImageSource
from image_classifier.text import printable

Answer = Mapping[str, Any]  # `Prediction.answer()`
_COLUMNS = ("path", "predicted_class", "confidence", "error", "all_predictions", "decision", "reason", "prediction_set")
_MEASURED = 64  # answers by which the width of a table's first column is chosen
_MAX_WIDTH = 60
_ROW_GROUP = 4096


def json_line(answer: Answer) -> str:
    r"""Return one answer as a line of JSON that UTF-8 can hold; bytes of a file name that are not UTF-8 become escapes.

    >>> print(json_line({"path": "\u00e9t\u00e9 \udcff.png"}))
    {"path": "été \udcff.png"}
    """
    text = json.dumps(answer, ensure_ascii=False)
    return "".join(f"\\u{ord(letter):04x}" if "\ud800" <= letter <= "\udfff" else letter for letter in text)


def _table(answers: Iterable[Answer], top_k: int | None) -> Iterator[str]:
    """Yield a header and one line an answer: image, class, confidence, the next classes, and why it abstains."""
    stream = iter(answers)
    first = list(islice(stream, _MEASURED))
    width = min(_MAX_WIDTH, max(5, *(len(printable(answer["path"])) for answer in first), 5))
    yield f"{'image':<{width}}  {'class':<24}  confidence  next classes"
    for answer in chain(first, stream):
        name = f"{printable(answer['path']):<{width}}"
        if "error" in answer:
            yield printable(f"{name}  ! {answer['error']}")
            continue
        ranked = list(answer["all_predictions"].items())[1 : top_k or 3]
        others = ", ".join(f"{label} {probability:.1%}" for label, probability in ranked)
        reason = f"; abstains: {answer['reason']}" if answer["reason"] else ""
        yield printable(f"{name}  {answer['predicted_class']:<24}  {answer['confidence']:>10.1%}  {others}{reason}")


def _jsonl(answers: Iterable[Answer], top_k: int | None) -> Iterator[str]:
    return map(json_line, answers)


def _json(answers: Iterable[Answer], top_k: int | None) -> Iterator[str]:
    before = "["
    for line in map(json_line, answers):
        yield before + line
        before = ","
    yield "]"


def _csv(answers: Iterable[Answer], top_k: int | None) -> Iterator[str]:
    text = io.StringIO()
    write_row = csv_writer(text)
    for number, answer in enumerate(answers):
        if number == 0:
            write_row(_COLUMNS)
        write_row(["" if value is None else value for value in _row(answer)])
        yield text.getvalue()[:-1]
        text.seek(0)
        text.truncate()


def _row(answer: Answer) -> list[Any]:
    """Return the values of `_COLUMNS`, nested ones as JSON; for an image without an answer only its error."""
    if "error" in answer:
        return [answer["path"], "", None, answer["error"], "{}", "", "", ""]
    return [
        answer["path"],
        answer["predicted_class"],
        answer["confidence"],
        "",
        json.dumps(answer["all_predictions"], ensure_ascii=False),
        answer["decision"],
        answer["reason"],
        json.dumps(answer["prediction_set"], ensure_ascii=False),
    ]


_LINES: dict[str, Callable[[Iterable[Answer], int | None], Iterator[str]]] = {
    "table": _table,
    "json": _json,
    "jsonl": _jsonl,
    "csv": _csv,
}
FORMATS = (*_LINES, "parquet")


def write_answers(answers: Iterable[Answer], form: str, top_k: int | None, file: IO[bytes]) -> None:
    """Write answers to a file as they come; a table shows `top_k` classes of each."""
    if form == "parquet":
        _write_parquet(answers, file)
    else:
        for line in _LINES[form](answers, top_k):
            file.write((line + "\n").encode("utf-8", "surrogateescape"))
    file.flush()


def _write_parquet(answers: Iterable[Answer], file: IO[bytes]) -> None:
    """Write the columns of the CSV in row groups of 4096; `confidence` is a number, null where there is no answer."""
    import pyarrow  # type: ignore[import-untyped]  # takes half a second to import
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    types = [pyarrow.float64() if name == "confidence" else pyarrow.string() for name in _COLUMNS]
    schema = pyarrow.schema(zip(_COLUMNS, types, strict=True))
    stream = iter(answers)
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        while rows := [_row(answer) for answer in islice(stream, _ROW_GROUP)]:
            columns = [
                pyarrow.array(map(_utf8, column), kind)
                for column, kind in zip(zip(*rows, strict=True), types, strict=True)
            ]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema), row_group_size=_ROW_GROUP)


def _utf8(value: Any) -> Any:
    """Return text that UTF-8 can hold: bytes of a file name that are not UTF-8 become escapes."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def check_format(form: str, to_a_file: bool) -> None:
    """Raise ConfigError for an unknown format, or one that standard output cannot take."""
    if form not in FORMATS:
        raise ConfigError(f"there is no format {form!r}", f"use one of {', '.join(FORMATS)}")
    if form == "parquet" and not to_a_file:
        raise ConfigError("format=parquet needs a file to write to", "add --output FILE")
    if form == "parquet" and find_spec("pyarrow") is None:
        raise ConfigError("format=parquet needs a package that is not installed", install("arrow"))


@dataclass
class AnswerCounter:
    """A count of answers and of the errors among them, and the first of these. Its fields are in .FILE.run."""

    count: int = 0
    failed: int = 0
    first: str = ""

    def of(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """Yield the answers and count them."""
        for answer in answers:
            self.count += 1
            if "error" in answer:
                self.failed += 1
                self.first = self.first or f"{answer['path']!r} ({answer['error']})"
            yield answer

    def add(self, later: AnswerCounter) -> None:
        """Add the counts of answers that come after these."""
        self.count += later.count
        self.failed += later.failed
        self.first = self.first or later.first


def check_output_path(output: Path, items: Iterable[str]) -> None:
    """Raise ConfigError where a file of answers would replace a folder, a device or an image named by `items`."""
    with storage_errors(output):
        if output.is_dir():
            raise ConfigError(f"output={str(output)!r} is a folder", "name a file in it")
        if not is_replaceable(output):
            raise ConfigError(
                f"output={str(output)!r} is not a regular file", "leave --output out to write to standard output"
            )
    resolved = output.resolve()
    is_output = _same_file(output)
    for item in items:
        # A new image in a folder of images would be taken for one of them in the next run.
        within = is_image_name(output.name) and os.path.isdir(item) and resolved.is_relative_to(Path(item).resolve())
        named = [item] if os.path.exists(item) else glob.iglob(item, recursive=True)
        if within or (output.exists() and any(map(is_output, named))):
            raise _among_images(output)


def refuse_output(items: Iterable[ImageSource], output: Path) -> Iterator[ImageSource]:
    """Yield the images, also those named by a table or standard input; ConfigError for one that is the output file."""
    is_output = _same_file(output)
    for item in items:
        if isinstance(item.source, Path) and is_output(item.source):
            raise _among_images(output)
        yield item


def _same_file(output: Path) -> Callable[[str | Path], bool]:
    """Return a test whether a path is the output file, by whatever name; always false where that does not exist yet."""
    try:
        known = output.stat()
    except OSError:
        return lambda path: False

    def is_output(path: str | Path) -> bool:
        try:
            return os.path.samestat(os.stat(path), known)
        except (OSError, ValueError):  # the row of the image will have the reason
            return False

    return is_output


def _among_images(output: Path) -> ConfigError:
    return ConfigError(f"output={str(output)!r} is among the images", "choose another --output")
