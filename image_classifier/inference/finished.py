"""What a run leaves beside its answers when it has ended, `.FILE.run`: by it `--resume` knows that nothing is left to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from image_classifier.atomic_io import write_bytes
from image_classifier.bundle import sha256_of
from image_classifier.errors import ConfigError, storage_errors
from image_classifier.inference.writers import Answer, AnswerCounter
from image_classifier.sources.image_source import ImageSource


class Names:
    """A hash of the names of images, in their order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str) -> None:
        """The next one."""
        self._hash.update(f"{name}\0".encode("utf-8", "surrogatepass"))

    def of(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """The answers, their names added as they go by."""
        for answer in answers:
            self.add(answer["path"])
            yield answer

    def __str__(self) -> str:
        return self._hash.hexdigest()


@dataclass(frozen=True)
class CompletionRecord:
    """The answers in a file and what is known of the run that ended with them."""

    output: Path

    @property
    def path(self) -> Path:
        """The file that says so."""
        return self.output.with_name(f".{self.output.name}.run")

    def write(self, run: Mapping[str, Any], told: AnswerCounter, names: Names) -> None:
        """Say which run wrote the output, of which images, and what came of them."""
        with storage_errors(self.output):
            known = {"run": run, "answers": sha256_of(self.output), "images": str(names), "told": asdict(told)}
        write_bytes(self.path, json.dumps(known).encode())

    def run(self) -> Mapping[str, Any] | None:
        """Which run that was; None where there is none, or the output is not what it left."""
        known = self._read()
        with storage_errors(self.output):
            is_whole = known is not None and self.output.is_file() and known["answers"] == sha256_of(self.output)
        return known["run"] if known and is_whole else None

    def told(self, items: Iterable[ImageSource]) -> AnswerCounter:
        """What came of the images; ConfigError where these are others."""
        known, names = self._read() or {}, Names()
        for item in items:
            names.add(item.name)
        if known["images"] != str(names):
            raise ConfigError(
                f"{str(self.output)!r} holds the answers for other images",
                "give --images as then, or leave --resume out to start over",
            )
        return AnswerCounter(**known["told"])

    def _read(self) -> dict[str, Any] | None:
        with storage_errors(self.path):
            content = self.path.read_bytes() if self.path.is_file() else b""
        try:
            found = json.loads(content)
        except ValueError:
            return None
        keys = {"run": dict, "answers": str, "images": str, "told": dict}
        is_ours = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in keys.items())
        return found if is_ours else None
