"""A worker of a cluster: it unpacks the model that it was sent, loads it once, and answers and writes shards."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_classifier import __version__
from image_classifier.atomic_io import atomic_directory, file_lock
from image_classifier.bundle import INFO_NAME, read_bundle, sha256_of
from image_classifier.errors import CheckpointError, ClassifierError, ConfigError, StorageError, storage_errors
from image_classifier.inference.predictor import Predictor
from image_classifier.inference.shards import Shards
from image_classifier.inference.writers import AnswerCounter
from image_classifier.sources.image_source import ImageSource

_loaded: dict[str, Predictor] = {}  # of this process, which answers many shards


@dataclass(frozen=True)
class WorkerModel:
    """A bundle or a lone file to send to other machines: its name, its hash, and the content of its files."""

    name: str
    sha256: str
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, path: Path) -> WorkerModel:
        """Read the model at a path; every file of a bundle is compared with its hash."""
        if not path.is_dir():
            return cls(path.name, sha256_of(path), {path.name: path.read_bytes()})
        bundle = read_bundle(path)
        bundle.verify()
        names = [INFO_NAME, *bundle.info.files]
        return cls(
            path.resolve().name, sha256_of(path / INFO_NAME), {name: (path / name).read_bytes() for name in names}
        )

    def unpacked(self, root: Path) -> Path:
        """Write the model below `root`, once for all workers of a machine, and return its path.

        Raises:
            CheckpointError: What is there is not what was sent.
        """
        with file_lock(root / f"{self.sha256}.lock"):
            folder = root / self.sha256
            if not folder.exists():
                with atomic_directory(folder) as unfinished:
                    for name, content in self.files.items():
                        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                        (unfinished / name).write_bytes(content)
            try:
                return self._checked(folder)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error.fact} on {socket.gethostname()}", f"remove {str(folder)!r} there, and run again"
                ) from error

    def _checked(self, folder: Path) -> Path:
        is_bundle = INFO_NAME in self.files
        path = folder if is_bundle else folder / self.name
        if sha256_of(path / INFO_NAME if is_bundle else path) != self.sha256:
            raise CheckpointError(f"the copy of the model in {str(folder)!r} is another one")
        if is_bundle:
            read_bundle(path).verify()
        return path


@dataclass(frozen=True)
class ShardJob:
    """The instructions for every worker.

    Args:
        sha256: Hash of the model.
        load: Returns a Predictor over the model at a path.
        shards: Where the answers go.
        cpus: Processors of each worker.
        fetch: Returns the model.
        folder: Folder in which models are unpacked; None: below the machine's folder for temporary files.
        version: Version of this package, which all machines must have.
    """

    sha256: str
    load: Callable[[Path], Predictor]
    shards: Shards
    top_k: int | None
    cpus: int
    fetch: Callable[[], WorkerModel] | None = None
    folder: str | None = None
    version: str = __version__

    def answer(self, number: int, items: Sequence[ImageSource]) -> AnswerCounter:
        """Answer a shard and write it, unless it was written before, and return the counts of its answers."""
        self.shards.check_shared(socket.gethostname())
        counter = AnswerCounter()
        known = self.shards.answers(number)
        if known is None:
            answers = (prediction.answer(self.top_k) for prediction, _ in self._predictor().answers(items))
            self.shards.write(number, counter.of(answers), self.top_k)
        else:
            deque(counter.of(known), maxlen=0)
        return counter

    def _predictor(self) -> Predictor:
        if self.sha256 not in _loaded:
            if self.version != __version__:
                fact = f"{socket.gethostname()} has image_classifier {__version__}, and this machine {self.version}"
                raise ConfigError(fact, "install the same one everywhere")
            os.environ["OMP_NUM_THREADS"] = str(self.cpus)  # read by `cpu.usable_cores` and torch
            assert self.fetch is not None
            root = Path(self.folder) if self.folder else _private_folder()
            _loaded[self.sha256] = self.load(self.fetch().unpacked(root))
        return _loaded[self.sha256]


def answer(batch: dict[str, Any], job: ShardJob) -> dict[str, Any]:
    """Answer one row of Ray Data, a shard.

    Returns a row with the counts of its answers, or with an error that a retry would not cure.
    """
    number = int(batch["shard"][0])
    result: AnswerCounter | ClassifierError
    try:
        result = job.answer(number, pickle.loads(batch["items"][0]))
    except ClassifierError as error:
        result = error
    return {"shard": [number], "result": [pickle.dumps(result)]}


def _private_folder() -> Path:
    """Return a folder for models that no other user may write to."""
    folder = Path(tempfile.gettempdir()) / f"image-classifier-{os.getuid()}"
    with storage_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise StorageError(f"{str(folder)!r} on {socket.gethostname()} belongs to another user", "remove it")
    return folder
