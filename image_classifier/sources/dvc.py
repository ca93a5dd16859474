"""Images and models that DVC tracks, pulled if they are missing; every file is compared with DVC's hash."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_classifier.atomic_io import file_lock, write_text
from image_classifier.errors import SourceError, StorageError, storage_errors
from image_classifier.extras import install_package
from image_classifier.sources.addresses import shown
from image_classifier.text import listed

log = logging.getLogger(__name__)

_LOGGERS = ("dvc", "dvc_data", "dvc_objects")
_CONNECT_TIMEOUT_S = 10  # and botocore tries five times; its default of 60 would take five minutes
_REFUSALS = {"NoCredentialsError", "PartialCredentialsError", "PermissionError"}
_UNREACHABLE = {
    "HTTPClientError",
    "EndpointConnectionError",
    "ConnectionError",
    "ClientError",
    "TimeoutError",
    "gaierror",
    "ClientConnectorError",
}
_REFUSED = (
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "Forbidden",
    "AuthFailure",
    "InvalidClientTokenId",
)


@dataclass(frozen=True)
class Tracked:
    """A path that DVC tracks in `file` (a .dvc file or dvc.lock) of the repository `root`."""

    path: Path
    file: Path
    root: Path

    @property
    def marker(self) -> Path:
        """The file that exists while the path is pulled: after a kill it shows that the path is incomplete."""
        name = hashlib.sha256(str(self.path).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return self.root / ".dvc" / "tmp" / f"{name}.pulling"


class _WrongBytes(Exception):
    """Files whose bytes do not have DVC's hash; `paths` are theirs and those of DVC's cache."""

    def __init__(self, names: list[str], paths: list[Path]) -> None:
        super().__init__(names)
        self.names = names
        self.paths = paths


def pull_missing(path: Path, enabled: bool | None = None) -> bool:
    """Pull `path` with DVC if it is missing; return whether it was pulled.

    Args:
        path: A DVC output, or something inside one.
        enabled: False: never. None: if there is a .dvc file next to it or next to a folder above it, or if a dvc.lock
            lists it and there is a remote. True: the same, but it is an error if nothing tracks the path.

    Raises:
        SourceError: There is no remote, it cannot be reached or refuses access, or its files are missing or corrupt.
        StorageError: No space or no permission.
    """
    absolute = Path(os.path.abspath(path))
    root = next((folder for folder in absolute.parents if os.path.isdir(folder / ".dvc")), None)
    if enabled is False or (os.path.exists(path) and not (root and any((root / ".dvc" / "tmp").glob("*.pulling")))):
        return False
    file = _tracking(absolute, root)
    if file is None:
        if enabled and not os.path.exists(path):
            raise SourceError(
                f"{str(path)!r} does not exist and DVC does not track it", "check the path, or pass data.dvc=false"
            )
        return False
    if root is None:
        raise SourceError(
            f"{str(path)!r} is tracked by {str(file)!r}, which is in no DVC repository",
            "clone the repository with its .dvc folder",
        )
    tracked = Tracked(absolute, file, root)
    return not (path.exists() and not tracked.marker.exists()) and _pull_once(tracked, path, enabled)


def _tracking(absolute: Path, root: Path | None) -> Path | None:
    """Return the .dvc file next to the path or to a folder above it, else the dvc.lock that lists one of them."""
    candidates = [
        path
        for path in (absolute, *absolute.parents)
        if path.name and (root is None or path.is_relative_to(root)) and path != root
    ]
    # os.path.isfile: it raises nothing for a folder without permission or a name that is too long.
    for path in candidates:
        dvc_file = path.with_name(f"{path.name}.dvc")
        if os.path.isfile(dvc_file):
            return dvc_file
    names = {str(path) for path in candidates}
    for path in candidates:
        lock = path.parent / "dvc.lock"
        if root and os.path.isfile(lock) and not names.isdisjoint(_outputs(lock)):
            return lock
    return None


def _outputs(lock: Path) -> Iterator[str]:
    import yaml

    try:
        stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages") or {}
        for stage in stages.values():
            for output in stage.get("outs") or ():
                yield str(lock.parent / output["path"])
    except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise SourceError(f"{str(lock)!r} cannot be read ({type(error).__name__})", "restore it from git") from error


def _pull_once(tracked: Tracked, path: Path, enabled: bool | None) -> bool:
    """Pull in one process at a time; a second one finds the work done."""
    with storage_errors(tracked.marker), file_lock(tracked.root / ".dvc" / "tmp" / "image_classifier.lock"):
        if path.exists() and not tracked.marker.exists():
            return True
        names, default = _remotes(tracked)
        if not names and enabled is None and tracked.file.name == "dvc.lock":
            return False  # made here by `dvc repro` and never pushed: the caller has the better message
        log.info("pulling %s with DVC", path)
        write_text(tracked.marker, f"{tracked.path}\n")
        try:
            _pull_verified(tracked, names, default)
        except BaseException:
            if not path.exists():  # whatever appears there later was put there by hand
                tracked.marker.unlink()
            raise
        tracked.marker.unlink()
        return True


def _pull_verified(tracked: Tracked, urls: dict[str, str], default: str) -> None:
    try:
        _pull(tracked, urls, default)
    except _WrongBytes as wrong:  # an earlier pull without verification left them in DVC's cache
        log.warning("DVC's cache holds wrong bytes for %s: fetching again", _few(wrong.names))
        for path in wrong.paths:
            if path.is_file() or path.is_symlink():
                path.unlink()
        try:
            _pull(tracked, urls, default)
        except _WrongBytes as again:
            raise SourceError(
                _corrupt(tracked, again.names, "in DVC's cache"), "remove .dvc/cache and try again"
            ) from again


def _remotes(tracked: Tracked) -> tuple[dict[str, str], str]:
    """Return the URLs of the configured remotes by name, and the name of the one to use."""
    from dvc.config import Config
    from dvc.exceptions import DvcException

    try:
        config = Config(str(tracked.root / ".dvc"))
    except DvcException as error:
        raise SourceError(
            f"the DVC configuration of {str(tracked.root)!r} cannot be read ({_line(error)})", "see .dvc/config"
        ) from error
    urls = {name: str(remote.get("url", "")) for name, remote in config["remote"].items()}
    return urls, str(config["core"].get("remote") or (next(iter(urls)) if len(urls) == 1 else ""))


def _pull(tracked: Tracked, urls: dict[str, str], default: str) -> None:
    from dvc.repo import Repo

    target = str(tracked.file) if tracked.file.name == f"{tracked.path.name}.dvc" else str(tracked.path)
    overrides = {name: _override(url) for name, url in urls.items()}
    config = {"core": {"remote": default, "analytics": False} if default else {"analytics": False}, "remote": overrides}
    with _captured_logs() as records:
        repo = None
        try:
            repo = Repo(str(tracked.root), config=config)
            repo.pull(targets=[target])
            _compare(repo, tracked)
        except _WrongBytes:
            raise
        except Exception as error:  # DVC's, its storage clients' or theirs
            raise _explained(error, records, repo, tracked, (default, urls.get(default, ""))) from error
        finally:
            if repo:
                repo.close()


def _override(url: str) -> dict[str, Any]:
    """Return settings of a remote for this pull: without `verify` DVC accepts whatever bytes the remote has."""
    return {"verify": True, "connect_timeout": _CONNECT_TIMEOUT_S} if url.startswith("s3://") else {"verify": True}


def _entries(repo: Any, tracked: Tracked, store: Any = None) -> list[tuple[Path, Any, Any]]:
    """Return path, hash and cache of each file that belongs at the path.

    Only the folder's list is returned if neither cache nor `store` has it.
    """
    from dvc_data.hashfile.transfer import find_tree_by_obj_id

    entries = []
    for output in repo.find_outs_by_path(str(tracked.path), strict=False):
        listing = output.get_obj() or (
            find_tree_by_obj_id([store], output.hash_info) if output.is_dir_checksum else None
        )
        if listing is None or not hasattr(listing, "__iter__"):
            entries.append((Path(output.fs_path), output.hash_info, output.cache))
            continue
        entries += [(Path(output.fs_path, *key), hash_info, output.cache) for key, _, hash_info in listing]
    return [entry for entry in entries if entry[1] and (entry[0].is_relative_to(tracked.path) or entry[1].isdir)]


def _compare(repo: Any, tracked: Tracked) -> None:
    """Raise _WrongBytes for files without DVC's hash; its cache and its record of dates and sizes are not trusted."""
    from dvc.fs import localfs
    from dvc_data.hashfile.hash import hash_file

    def is_wrong(entry: tuple[Path, Any, Any]) -> bool:
        path, known, _ = entry
        return not path.is_file() or hash_file(str(path), localfs, known.name)[1].value != known.value

    entries = _entries(repo, tracked)
    with ThreadPoolExecutor() as pool:
        wrong = [entry for entry, differs in zip(entries, pool.map(is_wrong, entries), strict=True) if differs]
    if wrong:
        names = [_relative(tracked, path) for path, _, _ in wrong]
        raise _WrongBytes(
            names, [Path(copy) for path, known, cache in wrong for copy in (path, cache.oid_to_path(known.value))]
        )
    if not tracked.path.exists():
        raise SourceError(
            f"{_relative(tracked, tracked.path)!r} is not part of what {_relative(tracked, tracked.file)!r} tracks",
            "check the path",
        )


def _explained(
    error: Exception, records: list[logging.LogRecord], repo: Any, tracked: Tracked, remote: tuple[str, str]
) -> Exception:
    """Return the error to raise: DVC logs the causes, and raises only how many files failed."""
    if isinstance(error, (SourceError, StorageError)):
        return error
    logged = [record.exc_info[1] for record in records if record.exc_info and record.exc_info[1]]
    causes = [cause for cause in (error, error.__cause__, *logged) if cause]
    fact, hint = _reason(causes, tracked, remote)
    if not fact:
        try:
            fact, hint = _lacking(tracked, repo, remote)
        except Exception as again:  # the storage that failed once may fail again
            log.debug("asking the remote what it has failed too: %s", _line(again))
    path = _relative(tracked, tracked.path)
    return SourceError(f"{path!r} cannot be pulled: {fact or _line(error)}", hint or f"see what `dvc pull {path}` says")


def _reason(causes: list[BaseException], tracked: Tracked, remote: tuple[str, str]) -> tuple[str, str]:
    """Return fact and hint as far as the exceptions show them; "" if the remote must be looked at."""
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    text = " ".join(str(cause) for cause in causes)
    scheme, why = remote[1].partition(":")[0], _line(causes[-1])
    if "LockError" in kinds:
        return f"another DVC command is at work in {str(tracked.root)!r}", "wait until it has ended"
    if "NoRemoteError" in kinds or not remote[0]:
        return "no DVC remote is chosen", "dvc remote add --default NAME URL, or put the files there by hand"
    if "RemoteMissingDepsError" in kinds or ("ImportError" in kinds and f"dvc-{scheme}" in text):
        return f"{_named(remote)} needs the package dvc-{scheme}", install_package(f"dvc-{scheme}")
    if kinds & _REFUSALS or any(word in text for word in _REFUSED):
        return (
            f"{_named(remote)} refuses access ({why})",
            f"check its key: dvc remote modify --local {remote[0]} access_key_id KEY, and secret_access_key",
        )
    if kinds & _UNREACHABLE:
        return f"{_named(remote)} cannot be reached ({why})", "check the network and the remote's URL or endpointurl"
    return "", ""


def _lacking(tracked: Tracked, repo: Any, remote: tuple[str, str]) -> tuple[str, str]:
    """Return fact and hint for the files that are missing: those on the remote arrived corrupt and were removed."""
    store = repo.cloud.get_remote(remote[0])
    if not store.fs.exists(store.path):
        return f"{_named(remote)} is empty or does not exist", "check its URL: dvc remote list"
    absent = [
        (path, known) for path, known, cache in _entries(repo, tracked, store.odb) if not cache.exists(known.value)
    ]
    missing = [_relative(tracked, path) for path, known in absent if not store.odb.exists(known.value)]
    if missing:
        return f"{_named(remote)} does not have {_few(missing)}", "run `dvc push` where they are"
    wrong = [_relative(tracked, path) for path, _ in absent]
    return (_corrupt(tracked, wrong, f"on {_named(remote)}"), "push them again") if wrong else ("", "")


def _named(remote: tuple[str, str]) -> str:
    return f"the DVC remote {remote[0]!r} ({shown(remote[1])})"


def _corrupt(tracked: Tracked, names: list[str], where: str) -> str:
    return (
        f"{_few(names)} arrived corrupt: the bytes {where} do not have the hash in {_relative(tracked, tracked.file)!r}"
    )


def _few(names: list[str]) -> str:
    return listed([repr(name) for name in names], 3, "files")


def _relative(tracked: Tracked, path: Path) -> str:
    return path.relative_to(tracked.root).as_posix()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


@contextmanager
def _captured_logs() -> Iterator[list[logging.LogRecord]]:
    """Yield the records that DVC's loggers write inside the block, and keep them off the terminal."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[assignment, method-assign]
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield records
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
