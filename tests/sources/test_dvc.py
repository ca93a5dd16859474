from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from image_classifier.dataset.sources import Folder
from image_classifier.errors import SourceError
from image_classifier.sources.dvc import pull_missing

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning"
)  # DVC's and its clients' own


def dvc(root: Path, verb: str, *arguments: str) -> None:
    """What `dvc VERB` does, without the second that its command line takes to start."""
    from dvc.repo import Repo

    with Repo(str(root)) as repository:
        getattr(repository, verb)(*arguments)


@dataclass(frozen=True)
class Repository:
    """A DVC repository with two classes of images, pushed to a remote that does not verify, and then missing."""

    root: Path
    store: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    def forget(self) -> None:
        shutil.rmtree(self.data, ignore_errors=True)
        shutil.rmtree(self.root / ".dvc" / "cache", ignore_errors=True)

    def objects(self) -> list[Path]:
        """What the local remote holds of files, without the list of the folder."""
        return sorted(path for path in self.store.rglob("*") if path.is_file() and path.suffix != ".dir")

    def content(self) -> dict[str, bytes]:
        return {
            path.relative_to(self.root).as_posix(): path.read_bytes()
            for path in sorted(self.data.rglob("*"))
            if path.is_file()
        }


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Made once and copied by the tests."""
    folder = tmp_path_factory.mktemp("dvc")
    repository = Repository(folder / "repository", folder / "store")
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        (repository.data / name).parent.mkdir(parents=True, exist_ok=True)
        (repository.data / name).write_bytes(name.encode() * 100)
    from dvc.repo import Repo

    Repo.init(str(repository.root), no_scm=True).close()
    (repository.root / ".dvc/config").write_text(
        "[core]\nno_scm = true\nremote = store\n['remote \"store\"']\nurl = ../../store\n"
    )
    dvc(repository.root, "add", str(repository.data))
    dvc(repository.root, "push")
    return repository


@pytest.fixture
def repository(pushed: Repository, tmp_path: Path) -> Repository:
    shutil.copytree(pushed.root.parent, tmp_path / "dvc")
    copy = Repository(tmp_path / "dvc" / "repository", tmp_path / "dvc" / "store")
    for path in copy.store.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(copy.root / ".dvc" / "tmp")
    return copy


def test_what_is_missing_is_pulled_whole_and_the_configuration_stays(repository, monkeypatch):
    before, config = repository.content(), (repository.root / ".dvc/config").read_bytes()
    repository.forget()
    monkeypatch.chdir(repository.root)
    assert pull_missing(Path("data")) is True
    assert repository.content() == before
    assert (repository.root / ".dvc/config").read_bytes() == config
    assert not list((repository.root / ".dvc/tmp").glob("*.pulling"))
    assert pull_missing(Path("data")) is False


def test_a_part_of_a_tracked_folder_is_pulled_alone(repository):
    repository.forget()
    assert pull_missing(repository.data / "cat") is True
    assert sorted(repository.content()) == ["data/cat/1.png", "data/cat/2.png"]
    with pytest.raises(SourceError, match=r"'data/bird' is not part of what 'data\.dvc' tracks"):
        pull_missing(repository.data / "bird")


def test_the_source_pulls_and_can_be_told_not_to(repository):
    repository.forget()
    with pytest.raises(SourceError, match="does not exist"):
        Folder(dir=str(repository.data), dvc=False)()
    assert Folder(dir=str(repository.data))() == repository.data
    with pytest.raises(SourceError, match=r"DVC does not track it.*data\.dvc=false"):
        Folder(dir=str(repository.root / "other"), dvc=True)()


def test_nothing_is_loaded_where_nothing_is_missing_or_tracked(tmp_path):
    code = """if True:
        import sys
        from pathlib import Path
        from image_classifier.sources.dvc import pull_missing
        assert not pull_missing(Path.cwd())
        assert not pull_missing(Path("missing")) and not pull_missing(Path("missing"), False)
        assert not {"dvc", "yaml"} & set(sys.modules)"""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)})


def test_corrupt_objects_are_never_handed_out(repository):
    before = repository.content()
    repository.forget()
    spoilt = repository.objects()[0]
    good = spoilt.read_bytes()
    spoilt.write_bytes(b"x" * len(good))
    with pytest.raises(
        SourceError, match=r"'data/\w+/\d\.png' arrived corrupt: the bytes on the DVC remote 'store'.*push them again"
    ):
        pull_missing(repository.data)
    assert not repository.data.exists()
    spoilt.write_bytes(good)
    assert pull_missing(repository.data)
    assert repository.content() == before


def test_a_cache_that_an_unverified_pull_spoilt_is_fetched_again(repository):
    before = repository.content()
    spoilt = repository.objects()[0]
    good = spoilt.read_bytes()
    repository.forget()
    spoilt.write_bytes(b"x" * len(good))
    dvc(repository.root, "pull")  # DVC by itself: wrong bytes, and no word of it
    assert b"x" * len(good) in repository.content().values()
    shutil.rmtree(repository.data)
    with pytest.raises(SourceError, match="arrived corrupt"):
        pull_missing(repository.data)
    dvc(repository.root, "pull")
    shutil.rmtree(repository.data)
    spoilt.write_bytes(good)
    assert pull_missing(repository.data)
    assert repository.content() == before


def test_an_object_that_was_never_pushed(repository):
    repository.forget()
    repository.objects()[0].unlink()
    with pytest.raises(
        SourceError, match=r"the DVC remote 'store' .* does not have 'data/\w+/\d\.png': run `dvc push` where they are"
    ):
        pull_missing(repository.data)


def test_a_remote_that_is_gone(repository):
    repository.forget()
    shutil.rmtree(repository.store)
    with pytest.raises(
        SourceError, match=r"the DVC remote 'store' \(.*store\) is empty or does not exist: check its URL"
    ):
        pull_missing(repository.data)


def test_no_remote(repository):
    content = repository.content()
    (repository.root / ".dvc/config").write_text("[core]\nno_scm = true\n")
    shutil.rmtree(repository.data)
    assert pull_missing(repository.data)  # DVC's own cache has it
    assert repository.content() == content
    repository.forget()
    with pytest.raises(
        SourceError, match=r"'data' cannot be pulled: no DVC remote is chosen: dvc remote add --default"
    ):
        pull_missing(repository.data)


def test_no_repository(repository):
    repository.forget()
    shutil.rmtree(repository.root / ".dvc")
    with pytest.raises(SourceError, match=r"tracked by .*data\.dvc', which is in no DVC repository"):
        pull_missing(repository.data)


def test_a_missing_package_for_the_remote_is_named(repository):
    repository.forget()
    (repository.root / ".dvc/config").write_text(
        "[core]\nno_scm = true\nremote = far\n['remote \"far\"']\n url = gs://bucket/path\n"
    )
    with pytest.raises(SourceError, match="pip install dvc-gs"):
        pull_missing(repository.data)


def test_a_pull_that_was_cut_off_is_finished(repository, monkeypatch):
    before = repository.content()
    repository.forget()
    assert pull_missing(repository.data)
    from image_classifier.sources import dvc as module

    monkeypatch.setattr(module, "_compare", interrupted)
    shutil.rmtree(repository.data)
    with pytest.raises(KeyboardInterrupt):
        pull_missing(repository.data)
    monkeypatch.undo()
    (repository.data / "cat/1.png").unlink()  # as a kill half-way would leave it: a folder, but not all of it
    assert pull_missing(repository.data)
    assert repository.content() == before


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_output_of_a_pipeline(repository):
    content = repository.content()
    md5 = (repository.root / "data.dvc").read_text().partition("md5: ")[2].partition("\n")[0]
    (repository.root / "data.dvc").unlink()
    (repository.root / "dvc.yaml").write_text("stages:\n  prepare:\n    cmd: 'true'\n    outs: [data]\n")
    output = {"path": "data", "hash": "md5", "md5": md5, "size": 1, "nfiles": 4}
    (repository.root / "dvc.lock").write_text(
        json.dumps({"schema": "2.0", "stages": {"prepare": {"cmd": "true", "outs": [output]}}})
    )
    repository.forget()
    assert pull_missing(repository.data / "cat")
    assert pull_missing(repository.data / "dog")
    assert repository.content() == content
    repository.forget()
    (repository.root / ".dvc/config").write_text("[core]\nno_scm = true\n")
    assert pull_missing(repository.data) is False  # made here and never shared
    with pytest.raises(SourceError, match="no DVC remote is chosen"):
        pull_missing(repository.data, enabled=True)
