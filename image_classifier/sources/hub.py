"""Data sets of the Hugging Face Hub and of Kaggle, fetched once by their clients, `datasets` and `kagglehub`."""

from __future__ import annotations

import importlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from image_classifier.errors import ConfigError, SourceError, UnreadableImage, storage_errors
from image_classifier.extras import install_package
from image_classifier.images import is_image_name, read_header
from image_classifier.progress import with_bar
from image_classifier.sources.unpack import new_tree

log = logging.getLogger(__name__)

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
_LABELS = ("label", "labels", "fine_label", "class", "category")
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tiff"}


def is_hub_name(name: str) -> bool:
    """Return whether `name` begins with hf: or kaggle:."""
    return name.startswith(("hf:", "kaggle:"))


def fetch_from_hub(
    name: str,
    folder: Path,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Path:
    """Return the folder of a data set, which is fetched if it is not there.

    Args:
        name: `hf:[OWNER/]NAME[:CONFIG]`, `kaggle:OWNER/NAME[/versions/N]` or `kaggle:COMPETITION`.
        folder: Where the images (Hugging Face) or a link to the client's copy (Kaggle) go.
        revision: Branch, tag or commit; Hugging Face only.
        image_column: The column of images if there are several; Hugging Face only.
        label_column: The column of labels if it is not obvious; Hugging Face only.

    Raises:
        ConfigError: The name or a column is invalid.
        SourceError: The client is not installed, there is no network, or the data set is not available.
        StorageError: No space or no permission.
    """
    kind, _, wanted = name.partition(":")
    if not _NAME.fullmatch(wanted.partition(":")[0]) or ".." in wanted:
        raise ConfigError(f"{name!r} is not the name of a data set", "write hf:OWNER/NAME or kaggle:OWNER/NAME")
    target = folder / kind / re.sub(r"[^\w.-]", "--", f"{wanted}@{revision}" if revision else wanted)
    if not target.exists():  # nor does a link to a copy that was removed
        if kind == "hf":
            _write_hugging_face(wanted, target, revision, (image_column, label_column))
            return target
        return _linked(_from_kaggle(wanted), target)
    return target


def _write_hugging_face(name: str, target: Path, revision: str | None, columns: tuple[str | None, str | None]) -> None:
    client = _client("datasets")
    if not sys.stderr.isatty():
        client.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # else each of five attempts without a network is logged
    log.info("fetching %s from the Hugging Face Hub", name)
    repository, _, config = name.partition(":")
    try:
        splits: Mapping[str, Any] = client.load_dataset(repository, config or None, revision=revision)
    except Exception as error:  # clients raise anything
        page = f"https://huggingface.co/datasets/{repository}"
        hint = f"no network? get {page} elsewhere and pass data.dir=FOLDER or data.archive=FILE"
        raise SourceError(f"'hf:{name}' cannot be fetched ({_reason(error)})", hint) from error
    with new_tree(target) as part:
        for split, rows in splits.items():
            _write_split(
                client, rows, part / split if len(splits) > 1 else part, columns, _client_folders(client, repository)
            )


def _client_folders(client: Any, repository: str) -> tuple[Path, ...]:
    """Return the folders of the client: a row may name a file in them, and no other file of this machine."""
    config = getattr(client, "config", None)
    caches = (getattr(config, name, None) for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE"))
    return tuple(Path(path).resolve() for path in (repository, *caches) if path)


def _write_split(
    client: Any, rows: Any, folder: Path, columns: tuple[str | None, str | None], client_dirs: Sequence[Path]
) -> None:
    """Write the file of each row as it is, not decoded and encoded again."""
    image_column, label_column = _columns(client, rows.features, *columns)
    rows = rows.select_columns([image_column, label_column]).cast_column(image_column, client.Image(decode=False))
    named = getattr(rows.features[label_column], "int2str", str)
    unlabelled = 0
    labels: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(_tracked(rows, folder.name)):
        label = row[label_column]
        if label is None or label == -1:  # as in the test split of a competition
            unlabelled += 1
            continue
        label = str(named(label))
        class_dir = folder / folder_name(label)
        if labels.setdefault(class_dir.name, label) != label:
            raise SourceError(
                f"the classes {label!r} and {labels[class_dir.name]!r} would share a folder",
                "write the images into folders of your own",
            )
        class_dir.mkdir(exist_ok=True)
        _write_image(row[image_column], class_dir, number, client_dirs)
    if unlabelled:
        log.warning("%s: %d images without a label are skipped", folder.name, unlabelled)


def folder_name(label: str) -> str:
    """Return a class name as the name of a visible folder; SourceError if it cannot be one.

    >>> folder_name("cats/dogs")
    'cats_dogs'
    """
    name = label.replace("/", "_").replace("\\", "_")
    if not name or name.startswith(".") or "\0" in name:
        raise SourceError(
            f"the class {label!r} cannot be used as the name of a folder",
            "write the images into folders of your own, and pass data.dir=FOLDER",
        )
    return name


def _write_image(image: Mapping[str, Any], class_dir: Path, number: int, client_dirs: Sequence[Path]) -> None:
    content, path = image["bytes"], image["path"] or ""
    suffix = os.path.splitext(path)[1].lower() if is_image_name(os.path.basename(path)) else _suffix(content)
    target = class_dir / f"{number:06d}{suffix}"
    if content is None:
        if not any(Path(path).resolve().is_relative_to(folder) for folder in client_dirs):
            raise SourceError(f"the data set names {path!r}, a file that does not belong to it", "do not use it")
        shutil.copyfile(path, target)
    else:
        target.write_bytes(content)


def _suffix(content: bytes | None) -> str:
    try:
        return _SUFFIXES[read_header(content or b"").format]
    except UnreadableImage:
        return ".png"  # the audit reports what is wrong with it


def _columns(client: Any, features: Mapping[str, Any], image: str | None, label: str | None) -> tuple[str, str]:
    images = [name for name, kind in features.items() if isinstance(kind, client.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, client.ClassLabel)]
    image = image or (images[0] if len(images) == 1 else None)
    likely = [name for name in _LABELS if name in features]
    label = label or (labels[0] if len(labels) == 1 else next(iter(likely), None))
    for key, name in (("image_column", image), ("label_column", label)):
        if name not in features:
            raise ConfigError(
                f"data.source.{key} is not clear: the columns are {', '.join(features)}",
                f"pass data=hf data.source.{key}=NAME",
            )
    return str(image), str(label)


def _from_kaggle(name: str) -> Path:
    client = _client("kagglehub")
    competition = "/" not in name
    page = f"https://www.kaggle.com/{'competitions' if competition else 'datasets'}/{name}"
    log.info("fetching %s", page)
    try:
        return Path(client.competition_download(name) if competition else client.dataset_download(name))
    except Exception as error:  # clients raise anything
        hint = f"no network or no KAGGLE_API_TOKEN? get {page} in a browser and pass data.archive=FILE.zip"
        raise SourceError(f"'kaggle:{name}' cannot be fetched ({_reason(error)})", hint) from error


def _linked(source: Path, target: Path) -> Path:
    """Return `target`, a link to `source` so that a later run needs no network; `source` if links are not possible."""
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
    try:
        target.symlink_to(source.resolve(), target_is_directory=True)
    except FileExistsError:
        return target  # another run was faster
    except OSError:
        return source  # Windows without the right to make links
    return target


def _client(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        otherwise = "or fetch the data set in a browser and pass data.dir=FOLDER or data.archive=FILE"
        hint = f"{install_package(package)}, {otherwise}"
        raise SourceError(f"the client {package} is not installed", hint) from error


def _tracked(rows: Any, name: str) -> Iterable[Any]:
    return with_bar(rows, f"writing {name}", len(rows)) if sys.stderr.isatty() else rows


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
