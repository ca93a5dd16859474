"""A folder of the user's own to test on: its images with their classes, or what else to do with it, as a command to copy."""

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

_SHOWN = 10  # classes in a message


def read_labelled(
    folder: Path, checkpoint_name: str, classes: Sequence[str], limits: DecodeLimits, cache_dir: Path, progress: bool
) -> Manifest:
    """The images of a folder with one sub-folder per class, or of a table.

    Raises:
        DataError: It is missing, empty, without labels or of classes that the model does not know; the hint is the command that fits.
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
        own = folder.resolve()
        if own.name in classes:
            fact = f"the images lie directly in {os.fspath(folder)!r}, which is the one class {own.name!r}"
            instead = _command("test", checkpoint_name, "--test_dir", _shown(own.parent))
            raise DataError(fact, f"test the folder that holds it: {instead} (or {_infer(folder, checkpoint_name)})")
        raise DataError(
            f"the images in {os.fspath(folder)!r} have no labels: no class folders", _infer(folder, checkpoint_name)
        )


def _check_classes(folder: Path, manifest: Manifest, checkpoint_name: str, classes: Sequence[str]) -> None:
    unknown = [label for label in manifest.classes if label not in set(classes)]
    if not unknown:
        return
    named = ", ".join(map(repr, unknown[:5])) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
    known = f"{', '.join(classes[:_SHOWN])}{' …' if len(classes) > _SHOWN else ''}"
    if len(unknown) == len(manifest.classes):
        fact = f"no folder in {os.fspath(folder)!r} is a class of the model ({named})"
        raise DataError(fact, f"its classes are {known}. Unlabelled images? {_infer(folder, checkpoint_name)}")
    lower = {label.lower(): label for label in classes}
    near = difflib.get_close_matches(unknown[0].lower(), lower, n=1)
    guess = f"is {unknown[0]!r} {lower[near[0]]!r}? " if near else ""
    fact = f"{os.fspath(folder)!r} has classes that the model does not know ({named})"
    raise DataError(fact, f"{guess}rename or move them; its classes are {known}")


def _infer(path: Path, checkpoint_name: str) -> str:
    return f"ask what they show: {_command('infer', checkpoint_name, '--images', os.fspath(path))}"


def _command(verb: str, checkpoint_name: str, option: str, value: str) -> str:
    """A line to copy into a shell; a value that begins with a dash needs the equals sign."""
    joined = [f"{option}={shlex.quote(value)}"] if value.startswith("-") else [option, shlex.quote(value)]
    return " ".join([program(), verb, "--checkpoint_name", shlex.quote(checkpoint_name), *joined])


def _shown(path: Path) -> str:
    """As short as it is true: from the current folder where it lies below."""
    here = Path.cwd().resolve()
    return os.fspath(path.relative_to(here)) if path.is_relative_to(here) else os.fspath(path)
