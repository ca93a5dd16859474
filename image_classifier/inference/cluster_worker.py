"""What one worker of a cluster does: it unpacks the model that it was sent, loads it once, and answers and writes one shard after the other."""

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
    """A bundle, or a lone file, on its way to other machines: its name, the hash that it must have there, and its files."""

    name: str
    sha256: str
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, path: Path) -> WorkerModel:
        """What lies there, every file of a bundle compared with its hash."""
        if not path.is_dir():
            return cls(path.name, sha256_of(path), {path.name: path.read_bytes()})
        bundle = read_bundle(path)
        bundle.verify()
        names = [INFO_NAME, *bundle.info.files]
        return cls(
            path.resolve().name, sha256_of(path / INFO_NAME), {name: (path / name).read_bytes() for name in names}
        )

    def unpacked(self, root: Path) -> Path:
        """Where it lies below `root`, once for all workers of a machine; CheckpointError where that is not what was sent."""
        with file_lock(root / f"{self.sha256}.lock"):
            folder = root / self.sha256
            if not folder.exists():
                with atomic_directory(folder) as part:
                    for name, content in self.files.items():
                        (part / name).parent.mkdir(parents=True, exist_ok=True)
                        (part / name).write_bytes(content)
            try:
                return self._checked(folder)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error.fact} on {socket.gethostname()}", f"remove {str(folder)!r} there, and run again"
                ) from error

    def _checked(self, folder: Path) -> Path:
        lone = self.files.keys() != {INFO_NAME} | self.files.keys()
        path = folder / self.name if lone else folder
        if sha256_of(path if lone else path / INFO_NAME) != self.sha256:
            raise CheckpointError(f"the copy of the model in {str(folder)!r} is another one")
        if not lone:
            read_bundle(path).verify()
        return path


@dataclass(frozen=True)
class ShardJob:
    """What every worker is told: `load` gives a Predictor over the model of this hash when it lies at a path.

    Args:
        fetch: Gives the Model, where it is to come from.
        folder: Where models are unpacked; None: below the machine's own folder for temporary files.
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
        """Answer a shard and write it, unless it was written before."""
        self.shards.check_shared(socket.gethostname())
        told = AnswerCounter()
        known = self.shards.answers(number)
        if known is None:
            answers = (prediction.answer(self.top_k) for prediction, _ in self._predictor().answers(items))
            self.shards.write(number, told.of(answers), self.top_k)
        else:
            deque(told.of(known), maxlen=0)
        return told

    def _predictor(self) -> Predictor:
        if self.sha256 not in _loaded:
            if self.version != __version__:
                fact = f"{socket.gethostname()} has image_classifier {__version__}, and this machine {self.version}"
                raise ConfigError(fact, "install the same one everywhere")
            os.environ["OMP_NUM_THREADS"] = str(self.cpus)  # what `predictor.cores` and torch go by
            assert self.fetch is not None
            _loaded[self.sha256] = self.load(self.fetch().unpacked(Path(self.folder) if self.folder else _own_folder()))
        return _loaded[self.sha256]


def answer(batch: dict[str, Any], job: ShardJob) -> dict[str, Any]:
    """One row of Ray Data, a shard, to one row: what is told of it, or what no other try would mend."""
    told: AnswerCounter | ClassifierError
    try:
        told = job.answer(int(batch["shard"][0]), pickle.loads(batch["items"][0]))
    except ClassifierError as error:
        told = error
    return {"shard": [int(batch["shard"][0])], "told": [pickle.dumps(told)]}


def _own_folder() -> Path:
    """A folder for models that nobody else may write to."""
    folder = Path(tempfile.gettempdir()) / f"image-classifier-{os.getuid()}"
    with storage_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise StorageError(f"{str(folder)!r} on {socket.gethostname()} is someone else's", "remove it")
    return folder
