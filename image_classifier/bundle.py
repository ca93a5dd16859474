"""The bundle: one folder with all that inference needs and no pickle; and how one is found by name."""

from __future__ import annotations

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
from image_classifier.text import listed, nearest

SCHEMA_VERSION = 1
_MAX_BYTES = 2**26  # of a bundle.json
_MAX_ARRAY_BYTES = 2**30  # of an .npz, unpacked: enough for the detector of a network with 16 000 features
_MAPS = ("preprocess", "normalise", "metrics", "provenance", "intervals", "decision", "files", "exports")
INFO_NAME = "bundle.json"


@dataclass(frozen=True)
class BundleInfo:
    """The content of `bundle.json`: all that a client needs to use the model, and how it was trained.

    `preprocess` turns an image into pixels; `normalise` (mean and std of pixels in 0..1) happens inside the model.
    Probabilities are softmax(logits / temperature); the answer is `abstain` where the highest is below `threshold`.
    `decision` keeps how this and the other limits were chosen (evaluation/reliability/abstention.py). `metrics` is
    {split: {name: value}}, `intervals` the 95 % intervals {split: {name: [low, high]}} of those that have one. `files`
    maps each file of the bundle to its sha256.
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
        """Return the path of a file of the bundle; raise CheckpointError where it is missing."""
        path = self.directory / name
        with reading(path):
            if path.is_file():
                return path
        raise CheckpointError(
            f"the bundle {str(self.directory)!r} has no {name}", "train again, or choose another --backend"
        )

    def content(self, name: str) -> bytes:
        """Return the bytes of a file of the bundle; raise CheckpointError where they do not match its hash."""
        with reading(self.directory / name):
            content = self.path(name).read_bytes()
        self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare files with the hashes in bundle.json; raise CheckpointError for the first that differs."""
        for name in names or self.info.files:
            self._compare(name, sha256_of(self.path(name)))

    def _compare(self, name: str, digest: str) -> None:
        if digest != self.info.files.get(name):
            raise CheckpointError(
                f"{name} of the bundle {str(self.directory)!r} is damaged",
                "its sha256 differs from bundle.json: copy it again",
            )

    def refuse_unlisted(self, folder: str) -> None:
        """Raise CheckpointError where a folder that a server will run holds a file that was not exported."""
        files = (path for path in (self.directory / folder).rglob("*") if path.is_symlink() or not path.is_dir())
        unlisted = sorted({path.relative_to(self.directory).as_posix() for path in files} - set(self.info.files))
        if unlisted:
            raise CheckpointError(
                f"the bundle {self.info.name!r} holds {unlisted[0]!r}, which was not exported",
                "a server would run it: remove it",
            )


def seal(directory: Path, info: BundleInfo) -> Bundle:
    """Write `bundle.json` for the files in `directory`, with the hash of each, and return the bundle."""
    files = {
        path.relative_to(directory).as_posix(): sha256_of(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    sealed = BundleInfo(**{**_shallow(info), "files": files})
    write_text(directory / INFO_NAME, json.dumps(asdict(sealed), indent=2, ensure_ascii=False) + "\n")
    return Bundle(directory, sealed)


def add_export(directory: Path, info: BundleInfo, name: str, facts: Mapping[str, Any], files: Sequence[str]) -> Bundle:
    """Update `bundle.json` with the files of an export and its `facts`, and return the bundle."""
    gone = set(info.exports.get(name, {}).get("files", ())) - set(files)
    hashes = {file: known for file, known in info.files.items() if file not in gone} | {
        file: sha256_of(directory / file) for file in files
    }
    exports = {**info.exports, name: {**facts, "files": list(files)}}
    sealed = BundleInfo(**{**_shallow(info), "files": dict(sorted(hashes.items())), "exports": exports})
    write_text(directory / INFO_NAME, json.dumps(asdict(sealed), indent=2, ensure_ascii=False) + "\n")
    return Bundle(directory, sealed)


def read_bundle(directory: Path) -> Bundle:
    """Read `bundle.json`; raise CheckpointError where it is damaged or from a newer version."""
    try:
        path = directory / INFO_NAME
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["schema_version"]
        known = {item.name for item in fields(BundleInfo)}
        info = BundleInfo(**{key: value for key, value in content.items() if key in known})
        _check(info)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{str(directory)!r} is not a bundle ({type(error).__name__}: {error})",
            "its bundle.json is missing or damaged",
        ) from error
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{str(directory)!r} has bundle schema {version}, this version reads up to {SCHEMA_VERSION}",
            "update image_classifier",
        )
    return Bundle(directory, BundleInfo(**{**_shallow(info), "classes": tuple(info.classes)}))


def _check(info: BundleInfo) -> None:
    """Raise ValueError for values that no bundle has: bundle.json may come from anywhere."""
    texts, maps = [info.name, *info.classes], [getattr(info, key) for key in _MAPS]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(value, dict) for value in maps):
        raise ValueError("a value of the wrong type")
    if not info.classes or len(set(info.classes)) < len(info.classes):
        raise ValueError("classes must have different names")
    numbers = (info.temperature, info.threshold, info.schema_version)
    if (
        not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        or not 1e-6 <= info.temperature <= 1e6
    ):
        raise ValueError("temperature, threshold or schema_version out of range")
    _check_figures(info)
    for name, digest in info.files.items():
        path = PurePosixPath(name)
        if (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in name
            or ":" in name
            or not re.fullmatch("[0-9a-f]{64}", str(digest))
        ):
            raise ValueError(f"invalid file entry {name!r}")


def _check_figures(info: BundleInfo) -> None:
    """Raise ValueError where metrics, intervals or exports have another shape than in every bundle."""
    splits = [*info.metrics.values(), *info.intervals.values()]
    numbers = [value for split in info.metrics.values() if isinstance(split, dict) for value in split.values()]
    are_maps = all(isinstance(item, dict) for item in (*splits, *info.exports.values()))
    if not are_maps or not all(map(_is_number, numbers)):
        raise ValueError("metrics, intervals or exports of the wrong type")
    for name, facts in info.exports.items():
        measured = [facts, facts.get("bf16", {})]
        files, tolerance = facts.get("files", []), facts.get("tolerance", 0)
        if (
            not isinstance(files, list)
            or not all(isinstance(file, str) for file in files)
            or not (_is_number(tolerance) and 0 <= tolerance <= 1)
        ):
            raise ValueError(f"invalid files or tolerance of the export {name!r}")
        if not all(
            isinstance(row, dict) and _is_number(row.get(key, 0))
            for row in measured
            for key in ("agreement", "largest_difference", "golden_agreement")
        ):
            raise ValueError(f"invalid measurements of the export {name!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to read `path` into a CheckpointError."""
    try:
        yield
    except OSError as error:
        name = str(error.filename or path)
        shown = name if len(name) < 200 else f"{name[:100]}..."
        raise CheckpointError(
            f"{shown!r} cannot be read ({error.strerror})", "check its name, its owner and the disk"
        ) from error


def find_checkpoint(name: str, models_dir: Path) -> Path:
    """Return the bundle folder, `.ckpt` or `.onnx` of a name: a path, or a name anywhere under the models folder.

    Raises:
        CheckpointError: Nothing has that name (the nearest is suggested), or several things do (all are listed).
    """
    given = Path(os.path.expanduser(name))
    with reading(given):
        return _find(name, given, models_dir)


def _find(name: str, given: Path, models_dir: Path) -> Path:
    if _is_checkpoint(given):
        return given
    known = _checkpoints_under(models_dir)
    matches = [path for path in known if name in _names(path, models_dir)]
    exact = [path for path in matches if path.relative_to(models_dir).as_posix() == name]
    if len(exact or matches) == 1:
        return (exact or matches)[0]
    if matches:
        raise CheckpointError(
            f"{len(matches)} checkpoints are named {name!r}", f"write the path of one: {', '.join(map(str, matches))}"
        )
    if given.exists():
        raise CheckpointError(
            f"{name!r} is not a bundle, a .ckpt or an .onnx", "give a folder with bundle.json, or one such file"
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
    # An export inside a bundle is no checkpoint by itself.
    outermost = (path for path in (*bundles, *files) if bundles.isdisjoint(path.parents))
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
    near = nearest(name, names, cutoff=0.5)
    return f"did you mean {near}?" if near else f"there are {listed(names, 10)}"


def _shallow(info: BundleInfo) -> dict[str, Any]:
    return {item.name: getattr(info, item.name) for item in fields(BundleInfo)}


def read_arrays(path: Path, kinds: Mapping[str, tuple[str, int]]) -> dict[str, np.ndarray]:
    """Return arrays of an `.npz` by name; at most 1 GiB is unpacked, and no pickle.

    Args:
        path: The file.
        kinds: The type and the number of axes of each array.

    Raises:
        CheckpointError: The file is damaged or too large, or an array has another type or number of axes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())  # zipfile unpacks no more of each than this
        if size > _MAX_ARRAY_BYTES:
            raise ValueError(f"it unpacks to {size} bytes, the limit is {_MAX_ARRAY_BYTES}")
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in kinds}
        for name, (dtype, axes) in kinds.items():
            if arrays[name].dtype != np.dtype(dtype) or arrays[name].ndim != axes or not arrays[name].size:
                raise ValueError(f"its {name} are {arrays[name].dtype} {list(arrays[name].shape)}")
        return arrays
    except Exception as error:  # a damaged archive makes its readers raise anything, and a header may claim any size
        raise CheckpointError(
            f"{str(path)!r} is damaged ({type(error).__name__}: {str(error)[:160]})", "copy the bundle again"
        ) from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal; raise CheckpointError where it cannot be read."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
