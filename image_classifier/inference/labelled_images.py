"""A labelled folder of the user to test on; an error for another folder has the command that fits it."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from image_classifier.dataset.discovery import list_folder
from image_classifier.dataset.prepare import load_test_manifest
from image_classifier.errors import DataError
from image_classifier.images import DecodeLimits, is_image_name
from image_classifier.manifest import Manifest
from image_classifier.program import program
from image_classifier.sources.table import is_table
from image_classifier.text import listed

_MAX_LISTED = 10  # classes in a message


def read_labelled(
    folder: Path, checkpoint_name: str, classes: Sequence[str], limits: DecodeLimits, cache_dir: Path, progress: bool
) -> Manifest:
    """Return the images of a folder with one sub-folder per class, or of a table.

    Raises:
        DataError: It is missing, empty, without labels or has classes that the model does not know.
        UnreadableImage: One of its images cannot be read.
    """
    _check_labelled(folder, checkpoint_name, classes)
    manifest = load_test_manifest([folder], limits, cache_dir, progress)
    _check_classes(folder, manifest, checkpoint_name, classes)
    return manifest


def _check_labelled(folder: Path, checkpoint_name: str, classes: Sequence[str]) -> None:
    if not folder.exists():
        raise DataError(
            f"there is no folder {os.fspath(folder)!r}", f"check the path; the current folder is {os.getcwd()!r}"
        )
    if not folder.is_dir():
        if is_table(folder):
            return
        if is_image_name(folder.name):
            raise DataError(
                f"{os.fspath(folder)!r} is one image, not a folder of classes", _infer(folder, checkpoint_name)
            )
        raise DataError(
            f"{os.fspath(folder)!r} is not a folder",
            "give one with a sub-folder per class, or a table (.csv) of paths and labels",
        )
    listing = list_folder(folder)
    if not listing.folders and not listing.images:
        raise DataError(
            f"{os.fspath(folder)!r} holds no images",
            "give a folder with one sub-folder per class: FOLDER/cat/1.jpg, FOLDER/dog/2.jpg",
        )
    if not listing.folders:
        resolved = folder.resolve()
        if resolved.name in classes:
            command = _command("test", checkpoint_name, "--test_dir", _short(resolved.parent))
            raise DataError(
                f"the images are directly in {os.fspath(folder)!r}, which is the single class {resolved.name!r}",
                f"test its parent folder: {command} (or {_infer(folder, checkpoint_name)})",
            )
        raise DataError(
            f"the images in {os.fspath(folder)!r} have no labels: no class folders", _infer(folder, checkpoint_name)
        )


def _check_classes(folder: Path, manifest: Manifest, checkpoint_name: str, classes: Sequence[str]) -> None:
    unknown = [label for label in manifest.classes if label not in set(classes)]
    if not unknown:
        return
    named = listed([repr(label) for label in unknown])
    known = listed(classes, _MAX_LISTED)
    if len(unknown) == len(manifest.classes):
        raise DataError(
            f"no folder in {os.fspath(folder)!r} is a class of the model ({named})",
            f"its classes are {known}. Unlabelled images? {_infer(folder, checkpoint_name)}",
        )
    lower = {label.lower(): label for label in classes}
    near = difflib.get_close_matches(unknown[0].lower(), lower, n=1)
    guess = f"is {unknown[0]!r} {lower[near[0]]!r}? " if near else ""
    raise DataError(
        f"{os.fspath(folder)!r} has classes that the model does not know ({named})",
        f"{guess}rename or move them; its classes are {known}",
    )


def _infer(path: Path, checkpoint_name: str) -> str:
    return f"classify them with: {_command('infer', checkpoint_name, '--images', os.fspath(path))}"


def _command(verb: str, checkpoint_name: str, option: str, value: str) -> str:
    """Return a line to copy into a shell; a value that begins with a dash needs the equals sign."""
    joined = [f"{option}={shlex.quote(value)}"] if value.startswith("-") else [option, shlex.quote(value)]
    return " ".join([program(), verb, "--checkpoint_name", shlex.quote(checkpoint_name), *joined])


def _short(path: Path) -> str:
    """Return the path relative to the current folder where it lies below that."""
    here = Path.cwd().resolve()
    return os.fspath(path.relative_to(here)) if path.is_relative_to(here) else os.fspath(path)
