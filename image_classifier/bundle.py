"""The bundle: one folder with all that serving needs, never a pickle; and finding one by name."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from image_classifier.atomic_io import write_text
from image_classifier.errors import CheckpointError
from image_classifier.program import program

SCHEMA_VERSION = 1
_MOST_BYTES = 2**26  # of a bundle.json
_MOST_ARRAY_BYTES = 2**30  # of an .npz, unpacked: enough for the detector of a network with 16 000 features
_MAPS = ("preprocess", "normalise", "metrics", "provenance", "intervals", "decision", "files", "exports")
INFO_NAME = "bundle.json"


@dataclass(frozen=True)
class BundleInfo:
    """What `bundle.json` says: everything a client must know to ask the model, and where it came from.

    `preprocess` makes pixels of an image; `normalise` (mean and std of pixels in 0..1) happens inside the model;
    probabilities are softmax(logits / temperature); where the greatest is below `threshold` the answer is abstain; `decision` says how that and
    other limits were chosen, and from what (`evaluation.decision.Decision`); `metrics` holds {part: {name: value}} and `intervals` the 95 %
    intervals {part: {name: [low, high]}} of those that have one; `files` maps each file of the bundle to its sha256.
    """

    name: str
    classes: tuple[str, ...]
    preprocess: Mapping[str, Any]
    normalise: Mapping[str, Any]
    metrics: Mapping[str, Any]
    provenance: Mapping[str, Any]
    temperature: float = 1.0
    threshold: float = 0.0
    intervals: Mapping[str, Any] = field(default_factory=dict)
    decision: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    exports: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk."""

    directory: Path
    info: BundleInfo

    def path(self, name: str) -> Path:
        """One of the bundle's files; CheckpointError where it is missing."""
        path = self.directory / name
        with reading(path):
            if path.is_file():
                return path
        raise CheckpointError(
            f"the bundle {str(self.directory)!r} has no {name}", "train again, or choose another --backend"
        )

    def content(self, name: str) -> bytes:
        """The bytes of one of the bundle's files; CheckpointError where they are not those of its hash."""
        with reading(self.directory / name):
            content = self.path(name).read_bytes()
        self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare files with the hashes in bundle.json; CheckpointError names the first that differs."""
        for name in names or self.info.files:
            self._compare(name, sha256_of(self.path(name)))

    def _compare(self, name: str, digest: str) -> None:
        if digest != self.info.files.get(name):
            raise CheckpointError(
                f"{name} of the bundle {str(self.directory)!r} is damaged",
                "its sha256 differs from bundle.json: copy it anew",
            )

    def refuse_unlisted(self, folder: str) -> None:
        """CheckpointError where a folder of the bundle, which a server runs, holds what was not exported."""
        there = (path for path in (self.directory / folder).rglob("*") if path.is_symlink() or not path.is_dir())
        strange = sorted({path.relative_to(self.directory).as_posix() for path in there} - set(self.info.files))
        if strange:
            raise CheckpointError(
                f"the bundle {self.info.name!r} holds {strange[0]!r}, which was not exported",
                "a server would run it: remove it",
            )


def seal(directory: Path, info: BundleInfo) -> Bundle:
    """Write `bundle.json` over the files that lie in `directory`, with the hash of each."""
    files = {
        path.relative_to(directory).as_posix(): sha256_of(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    sealed = BundleInfo(**{**_shallow(info), "files": files})
    write_text(directory / INFO_NAME, json.dumps(asdict(sealed), indent=2, ensure_ascii=False) + "\n")
    return Bundle(directory, sealed)


def add_export(directory: Path, info: BundleInfo, name: str, facts: Mapping[str, Any], files: Sequence[str]) -> Bundle:
    """Write `bundle.json` anew for a folder to which these files were added: their hashes, and what is known of the export of this name."""
    gone = set(info.exports.get(name, {}).get("files", ())) - set(files)
    hashes = {file: known for file, known in info.files.items() if file not in gone} | {
        file: sha256_of(directory / file) for file in files
    }
    exports = {**info.exports, name: {**facts, "files": list(files)}}
    sealed = BundleInfo(**{**_shallow(info), "files": dict(sorted(hashes.items())), "exports": exports})
    write_text(directory / INFO_NAME, json.dumps(asdict(sealed), indent=2, ensure_ascii=False) + "\n")
    return Bundle(directory, sealed)


def read_bundle(directory: Path) -> Bundle:
    """Read a bundle's `bundle.json`; CheckpointError where it is not one or from a newer version."""
    try:
        path = directory / INFO_NAME
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["schema_version"]
        known = {item.name for item in fields(BundleInfo)}
        info = BundleInfo(**{key: value for key, value in content.items() if key in known})
        _check(info)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{str(directory)!r} is not a bundle ({type(error).__name__}: {error})", "it needs a whole bundle.json"
        ) from error
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{str(directory)!r} has bundle schema {version}, this version reads up to {SCHEMA_VERSION}",
            "update image_classifier",
        )
    return Bundle(directory, BundleInfo(**{**_shallow(info), "classes": tuple(info.classes)}))


def _check(info: BundleInfo) -> None:
    """ValueError where bundle.json, which may come from anywhere, says what no bundle can."""
    texts, maps = [info.name, *info.classes], [getattr(info, key) for key in _MAPS]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(value, dict) for value in maps):
        raise ValueError("a value of the wrong kind")
    if not info.classes or len(set(info.classes)) < len(info.classes):
        raise ValueError("classes must be named, each once")
    numbers = (info.temperature, info.threshold, info.schema_version)
    if (
        not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        or not 1e-6 <= info.temperature <= 1e6
    ):
        raise ValueError("an invalid number")
    _check_figures(info)
    for name, digest in info.files.items():
        place = PurePosixPath(name)
        if (
            place.is_absolute()
            or ".." in place.parts
            or "\\" in name
            or ":" in name
            or not re.fullmatch("[0-9a-f]{64}", str(digest))
        ):
            raise ValueError(f"{name!r} is no file of a bundle")


def _check_figures(info: BundleInfo) -> None:
    """ValueError where metrics, intervals or exports are not what they are in every bundle."""
    parts = [*info.metrics.values(), *info.intervals.values()]
    numbers = [value for part in info.metrics.values() if isinstance(part, dict) for value in part.values()]
    if not all(isinstance(part, dict) for part in (*parts, *info.exports.values())) or not all(
        map(_is_number, numbers)
    ):
        raise ValueError("metrics, intervals or exports of the wrong kind")
    for name, facts in info.exports.items():
        found = [facts, facts.get("bf16", {})]
        files, tolerance = facts.get("files", []), facts.get("tolerance", 0)
        if (
            not isinstance(files, list)
            or not all(isinstance(file, str) for file in files)
            or not (_is_number(tolerance) and 0 <= tolerance <= 1)
        ):
            raise ValueError(f"invalid export {name!r}")
        if not all(
            isinstance(row, dict) and _is_number(row.get(key, 0))
            for row in found
            for key in ("agreement", "largest_difference", "golden_agreement")
        ):
            raise ValueError(f"invalid results of the export {name!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """The operating system's refusal to read what a path means as a CheckpointError."""
    try:
        yield
    except OSError as error:
        place = str(error.filename or path)
        shown = place if len(place) < 200 else f"{place[:100]}..."
        raise CheckpointError(
            f"{shown!r} cannot be read ({error.strerror})", "check its name, its owner and the disk"
        ) from error


def find_checkpoint(name: str, models_dir: Path) -> Path:
    """The bundle folder, `.ckpt` or `.onnx` that a name means: a path, or a name anywhere under the models folder.

    Raises:
        CheckpointError: Nothing has that name (the nearest is suggested), or several things do (all are listed).
    """
    given = Path(os.path.expanduser(name))
    with reading(given):
        return _found(name, given, models_dir)


def _found(name: str, given: Path, models_dir: Path) -> Path:
    if _is_checkpoint(given):
        return given
    known = _checkpoints_under(models_dir)
    found = [path for path in known if name in _names(path, models_dir)]
    exact = [path for path in found if path.relative_to(models_dir).as_posix() == name]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if found:
        raise CheckpointError(
            f"{name!r} names {len(found)} checkpoints", f"write the path of one: {', '.join(map(str, found))}"
        )
    if given.exists():
        raise CheckpointError(
            f"{name!r} is no bundle, .ckpt or .onnx", "give a folder with bundle.json, or one such file"
        )
    if len(given.parts) > 1 and not (models_dir / given).parent.is_dir():
        raise CheckpointError(f"{name!r} does not exist", "check the path, or give a name under the models folder")
    raise CheckpointError(
        f"there is no checkpoint {name!r} under {str(models_dir)!r}", _suggestion(name, known, models_dir)
    )


def _is_checkpoint(path: Path) -> bool:
    return (path / INFO_NAME).is_file() or (path.is_file() and path.suffix in (".ckpt", ".onnx"))


def _checkpoints_under(models_dir: Path) -> list[Path]:
    bundles = {path.parent for path in models_dir.rglob(INFO_NAME)}
    files = (path for suffix in ("ckpt", "onnx") for path in models_dir.rglob(f"*.{suffix}"))
    outermost = (
        path for path in (*bundles, *files) if bundles.isdisjoint(path.parents)
    )  # an export inside a bundle is no checkpoint of its own
    return sorted(
        path for path in outermost if not any(part.startswith(".") for part in path.relative_to(models_dir).parts)
    )


def _names(path: Path, models_dir: Path) -> set[str]:
    relative = path.relative_to(models_dir)
    names = {path.name, relative.as_posix()}
    return names if (path / INFO_NAME).exists() else names | {path.stem, relative.with_suffix("").as_posix()}


def _suggestion(name: str, known: list[Path], models_dir: Path) -> str:
    names = [path.relative_to(models_dir).as_posix() for path in known]
    if not names:
        return f"train one first: {program()} train"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names[:10])}"


def _shallow(info: BundleInfo) -> dict[str, Any]:
    return {item.name: getattr(info, item.name) for item in fields(BundleInfo)}


def read_arrays(path: Path, kinds: Mapping[str, tuple[str, int]]) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` by name, `kinds` their types and numbers of axes; no more than a GiB of them is unpacked, and no pickle.

    Raises:
        CheckpointError: The file is damaged, too large, or holds others.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(
                item.file_size for item in archive.infolist()
            )  # zipfile unpacks no more of each than it says here
        if size > _MOST_ARRAY_BYTES:
            raise ValueError(f"it unpacks to {size} bytes, {_MOST_ARRAY_BYTES} may be")
        with np.load(path, allow_pickle=False) as content:
            found = {name: content[name] for name in kinds}
        for name, (dtype, axes) in kinds.items():
            if found[name].dtype != np.dtype(dtype) or found[name].ndim != axes or not found[name].size:
                raise ValueError(f"its {name} are {found[name].dtype} {list(found[name].shape)}")
        return found
    except Exception as error:  # a damaged archive makes its readers raise anything, and a header may claim any size
        raise CheckpointError(
            f"{str(path)!r} is damaged ({type(error).__name__}: {str(error)[:160]})", "copy the bundle anew"
        ) from error


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal; CheckpointError where they cannot be read."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
