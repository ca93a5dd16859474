"""`infer --sort_into DIR`: a copy of each image in the folder of its class, abstentions in `_abstain`."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from image_classifier.errors import ConfigError, StorageError, UnreadableImage, storage_errors
from image_classifier.images import DecodeLimits, load_bytes
from image_classifier.predictions import Prediction
from image_classifier.sources.image_source import Content
from image_classifier.sources.web import file_name, is_url

ABSTAIN = "_abstain"
_UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|%\ud800-\udfff]')
_MAX_BYTES = 120  # of a name; a file system allows 255


@dataclass(frozen=True)
class Sorter:
    """Copies images into `directory`: no file there is overwritten, and nothing is written outside it."""

    directory: Path
    limits: DecodeLimits

    def check(self, items: Iterable[str]) -> None:
        """Raise ConfigError where the copies would be written into a folder of the images."""
        target = self.directory.resolve()
        for item in items:
            if os.path.isdir(item) and target.is_relative_to(Path(item).resolve()):
                raise ConfigError(
                    f"sort_into={str(self.directory)!r} is within the images in {item!r}", "choose a folder elsewhere"
                )

    def sorted(self, answers: Iterable[tuple[Prediction, Content]]) -> Iterator[tuple[Prediction, Content]]:
        """Yield the answers after copying each image; one that disappeared since becomes an answer with an error."""
        for prediction, content in answers:
            if prediction.error:
                yield prediction, content
                continue
            try:
                self._copy(prediction, content if isinstance(content, bytes) else load_bytes(content, self.limits))
            except UnreadableImage as error:
                prediction = Prediction(prediction.path, error=error.reason)
            yield prediction, content

    def _copy(self, prediction: Prediction, content: bytes) -> None:
        folder = self.directory / (ABSTAIN if prediction.reason else folder_name(prediction.label))
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not folder.resolve().is_relative_to(self.directory.resolve()):
                raise StorageError(f"{str(folder)!r} leads out of {str(self.directory)!r}", "remove the link")
            name = _file_name(prediction.path)
            # The name itself, then with a few and with all digits of the content's hash: the last cannot be taken.
            digest = hashlib.sha256(content).hexdigest()
            targets = [folder / name, *(folder / _with(name, digest[:length]) for length in (8, 64))]
            if not any(_holds(target, content) for target in targets):
                _write(next(target for target in targets if not os.path.lexists(target)), content)


def _holds(target: Path, content: bytes) -> bool:
    return target.is_file() and target.stat().st_size == len(content) and target.read_bytes() == content


def _write(target: Path, content: bytes) -> None:
    """Write a file completely or not at all.

    It is not synced: after a power cut it may be missing, but 100 000 syncs would take longer than the answers.
    """
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)  # left by a kill
    try:
        with part.open("xb") as file:
            file.write(content)
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def folder_name(label: str) -> str:
    """Return a folder name for a class; characters that a file system could misread become %XX, no two names are equal.

    >>> folder_name("cat"), folder_name("a/b"), folder_name("..")
    ('cat', 'a%2Fb', '%2E%2E')
    """
    return _safe(label, reserved=(ABSTAIN,))


def _safe(name: str, reserved: tuple[str, ...] = ()) -> str:
    text = _UNSAFE.sub(lambda match: _escaped(match.group()), name)
    if not text:
        return "%"  # no other name is this, as each % is escaped
    if text.startswith(".") or text in reserved:
        text = _escaped(text[0]) + text[1:]
    if text[-1] in " .":
        text = text[:-1] + _escaped(text[-1])
    if len(text.encode()) > _MAX_BYTES:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        text = f"{text.encode()[:_MAX_BYTES].decode('utf-8', 'ignore')}%{digest}"
    return text


def _escaped(letters: str) -> str:
    return "".join(f"%{byte:02X}" for byte in letters.encode("utf-8", "surrogateescape"))


def _file_name(path: str) -> str:
    name = file_name(path) if is_url(path) else PurePosixPath(path.replace("\\", "/")).name
    stem, suffix = os.path.splitext(name)
    return _safe((stem if path != "-" else "stdin") or "image") + _UNSAFE.sub("_", suffix[:10])


def _with(name: str, digits: str) -> str:
    stem, suffix = os.path.splitext(name)
    return f"{stem}-{digits}{suffix}"
