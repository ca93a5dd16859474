"""Answers as a table, JSON, JSONL, CSV or Parquet, each written as it comes: no format needs to know them all."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice
from typing import IO, Any

from image_classifier.errors import ConfigError
from image_classifier.manifest import csv_writer
from image_classifier.text import printable

Answer = Mapping[str, Any]  # `Prediction.answer()`
_COLUMNS = ("path", "predicted_class", "confidence", "error", "all_predictions", "decision", "reason", "prediction_set")
_SEEN = 64  # answers by which a table's first column is made wide enough
_WIDEST = 60
_ROW_GROUP = 4096


def line_of(answer: Answer) -> str:
    """One answer as a line of JSON, UTF-8: the bytes of a file name that are not become escapes, so that it can be parsed."""
    text = json.dumps(answer, ensure_ascii=False)
    return "".join(f"\\u{ord(letter):04x}" if "\ud800" <= letter <= "\udfff" else letter for letter in text)


def _table(answers: Iterable[Answer], top_k: int | None) -> Iterator[str]:
    stream = iter(answers)
    first = list(islice(stream, _SEEN))
    width = min(_WIDEST, max(5, *(len(printable(answer["path"])) for answer in first), 5))
    yield f"{'image':<{width}}  {'class':<24}  confidence  next"
    for answer in chain(first, stream):
        name = f"{printable(answer['path']):<{width}}"
        if "error" in answer:
            yield printable(f"{name}  ! {answer['error']}")
            continue
        ranked = list(answer["all_predictions"].items())[1 : top_k or 3]
        others = ", ".join(f"{label} {probability:.1%}" for label, probability in ranked)
        why = f"; abstain, {answer['reason']}" if answer["reason"] else ""
        yield printable(f"{name}  {answer['predicted_class']:<24}  {answer['confidence']:>10.1%}  {others}{why}")


def _jsonl(answers: Iterable[Answer], top_k: int | None) -> Iterator[str]:
    return map(line_of, answers)


def _json(answers: Iterable[Answer], top_k: int | None) -> Iterator[str]:
    before = "["
    for line in map(line_of, answers):
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
    """The values of `_COLUMNS`; nested ones as JSON, and nothing but the reason for an image without an answer."""
    if "error" in answer:
        return [answer["path"], "", None, answer["error"], "{}", "", "", ""]
    nested = (json.dumps(answer[key], ensure_ascii=False) for key in ("all_predictions", "prediction_set"))
    probabilities, may_be = nested
    return [
        answer["path"],
        answer["predicted_class"],
        answer["confidence"],
        "",
        probabilities,
        answer["decision"],
        answer["reason"],
        may_be,
    ]


_LINES: dict[str, Callable[[Iterable[Answer], int | None], Iterator[str]]] = {
    "table": _table,
    "json": _json,
    "jsonl": _jsonl,
    "csv": _csv,
}
FORMATS = (*_LINES, "parquet")


def write_answers(answers: Iterable[Answer], form: str, top_k: int | None, file: IO[bytes]) -> None:
    """Write answers to a file as they come; `top_k` is how many classes a table shows."""
    if form == "parquet":
        _write_parquet(answers, file)
    else:
        for line in _LINES[form](answers, top_k):
            file.write((line + "\n").encode("utf-8", "surrogateescape"))
    file.flush()


def _write_parquet(answers: Iterable[Answer], file: IO[bytes]) -> None:
    """The columns of the CSV in row groups of 4096; `confidence` a number, null where there is no answer."""
    import pyarrow  # type: ignore[import-untyped]  # here, as it takes half a second
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
    """Text that UTF-8 can hold: the bytes of a file name that are not become escapes."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def check_format(form: str, to_a_file: bool) -> None:
    """ConfigError for a format that there is none of, or that standard output cannot take."""
    if form not in FORMATS:
        raise ConfigError(f"there is no format {form!r}", f"use one of {', '.join(FORMATS)}")
    if form == "parquet" and not to_a_file:
        raise ConfigError("format=parquet is written to a file", "add --output FILE")
    if form == "parquet" and find_spec("pyarrow") is None:
        raise ConfigError("format=parquet needs a package that is not installed", "pip install pyarrow")


@dataclass
class AnswerCounter:
    """How many answers went by, how many of them are errors, and the first of those."""

    count: int = 0
    failed: int = 0
    first: str = ""

    def of(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """The answers, counted as they go by."""
        for answer in answers:
            self.count += 1
            if "error" in answer:
                self.failed += 1
                self.first = self.first or f"{answer['path']!r} ({answer['error']})"
            yield answer

    def add(self, later: AnswerCounter) -> None:
        """Count what was counted elsewhere, of answers behind these."""
        self.count, self.failed, self.first = (
            self.count + later.count,
            self.failed + later.failed,
            self.first or later.first,
        )
