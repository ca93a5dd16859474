"""Images and answers in S3-like storage, `s3://BUCKET/KEY`, through pyarrow: AWS, MinIO and others.

Keys, region and endpoint come from the environment, as for every client of such storage: AWS_ACCESS_KEY_ID, AWS_REGION,
AWS_ENDPOINT_URL and others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from image_classifier.errors import ConfigError, DataError, SourceError, StorageError, UnreadableImage
from image_classifier.extras import install
from image_classifier.images import IMAGE_SUFFIXES, is_image_name
from image_classifier.sources.folders import is_visible
from image_classifier.sources.image_source import ImageSource

_SCHEME = "s3://"
_ATTEMPTS = 8  # with growing pauses: among a million images some server is busy


def is_stored(address: str) -> bool:
    """Return whether a name is an address in S3-like storage.

    >>> is_stored("s3://photos/cat.jpg"), is_stored("photos/cat.jpg")
    (True, False)
    """
    return address[: len(_SCHEME)].lower() == _SCHEME


@dataclass(frozen=True)
class Storage:
    """The server behind `s3://`, None for AWS.

    Machines that work together must agree on it; each takes its keys from its environment.
    """

    endpoint: str | None = None
    region: str | None = None

    @classmethod
    def here(cls) -> Storage:
        """Return the storage that the environment of this process names."""
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return cls(endpoint, os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"))

    def items(self, address: str, max_bytes: int) -> Iterator[ImageSource]:
        """Yield the image of that name, or those below it, by name, without hidden files and junk.

        Raises:
            DataError: There is none.
            SourceError: The storage does not answer, or refuses these keys.
        """
        path = _path_of(address)
        try:
            files = _opened(self, path)
            from pyarrow.fs import FileSelector, FileType  # type: ignore[import-untyped]

            (info,) = files.get_file_info([path])
            if info.type == FileType.File:
                yield self.item(address, max_bytes)
                return
            below = files.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
        except OSError as error:
            raise SourceError(
                f"cannot list {address!r} ({_reason(error)})", "check its name, the keys and the endpoint"
            ) from error
        names = sorted(
            tuple(info.path[len(path) :].strip("/").split("/")) for info in below if info.type == FileType.File
        )
        wanted = [parts for parts in names if is_image_name(parts[-1]) and all(map(is_visible, parts))]
        if not wanted:
            raise DataError(f"{address!r} holds no image", f"images end in {', '.join(sorted(IMAGE_SUFFIXES))}")
        for parts in wanted:
            yield self.item("/".join([address.rstrip("/"), *parts]), max_bytes)

    def item(self, address: str, max_bytes: int) -> ImageSource:
        """Return one image, which is fetched when it is its turn."""
        return ImageSource(address, partial(self.image, address, max_bytes))

    def image(self, address: str, max_bytes: int) -> bytes:
        """Return the bytes of an image, at most one more than `max_bytes`; UnreadableImage if there are none."""
        try:
            path = _path_of(address)
            with _opened(self, path).open_input_stream(path) as file:
                return bytes(file.read(max_bytes + 1))
        except FileNotFoundError as error:
            raise UnreadableImage(address, "there is no such file") from error
        except (OSError, ConfigError, SourceError) as error:
            raise UnreadableImage(address, _reason(error)) from error


@dataclass(frozen=True)
class Prefix:
    """A folder in S3-like storage, in which a file appears complete or not at all."""

    address: str
    storage: Storage

    def names(self) -> set[str]:
        """Return the names directly in it; StorageError if it cannot be listed."""
        try:
            path = _path_of(self.address)
            files = _opened(self.storage, path)
            from pyarrow.fs import FileSelector

            return {info.base_name for info in files.get_file_info(FileSelector(path, allow_not_found=True))}
        except OSError as error:
            raise self._refused(error) from error

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file, None if there is no such file."""
        path = f"{_path_of(self.address)}/{name}"
        try:
            with _opened(self.storage, path).open_input_stream(path) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._refused(error) from error

    def write(self, name: str, content: bytes) -> None:
        """Write a file; StorageError if the storage refuses."""
        path = f"{_path_of(self.address)}/{name}"
        try:
            with _opened(self.storage, path).open_output_stream(path) as file:
                file.write(content)
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> StorageError:
        return StorageError(
            f"cannot use {self.address!r} ({_reason(error)})",
            "check its name, the keys, the endpoint and what they allow",
        )


def _path_of(address: str) -> str:
    """Return `BUCKET/KEY`; ConfigError if there is no bucket."""
    path = address[len(_SCHEME) :].strip("/")
    if not path:
        raise ConfigError(f"{address!r} names no bucket", "write s3://BUCKET/FOLDER")
    return path


@cache
def _connected(storage: Storage, bucket: str) -> Any:
    from pyarrow import fs  # type: ignore[import-untyped]  # imported here: it takes half a second

    region = storage.region or (None if storage.endpoint else fs.resolve_s3_region(bucket))
    keys = {
        "endpoint_override": storage.endpoint,
        "region": region,
        "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    }
    return fs.S3FileSystem(**{key: value for key, value in keys.items() if value is not None})


def _opened(storage: Storage, path: str) -> Any:
    try:
        return _connected(storage, path.partition("/")[0])
    except ImportError as error:
        raise ConfigError("s3:// needs a package that is not installed", install("arrow")) from error


def _reason(error: Exception) -> str:
    """Return the storage's message without the number of the request."""
    return " ".join(str(error).split()).partition(" (Request ID")[0][:200]
