from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    root = Path(__file__).resolve().parents[3]
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
    with pytest.raises(SourceError, match=r"tracked by .*data\.dvc', which lies in no DVC repository"):
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


# --- a real server of the S3 protocol ---


@dataclass(frozen=True)
class Bucket:
    url: str

    def client(self):
        import boto3

        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **keys)

    def authenticate_after(self, requests: int) -> None:
        """How many requests moto serves before it looks at their keys, of which none is right."""
        self.post("reset-auth", str(requests))

    def post(self, name: str, text: str = "") -> None:
        request = urllib.request.Request(
            f"{self.url}/moto-api/{name}", text.encode(), {"Content-Type": "text/plain"}, method="POST"
        )
        urllib.request.urlopen(request, timeout=10).close()


@pytest.fixture(scope="module")
def s3() -> Iterator[Bucket]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        bucket = Bucket(f"http://127.0.0.1:{port}")
        wait_for(lambda: urllib.request.urlopen(f"{bucket.url}/moto-api/", timeout=2).close())
        yield bucket
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=20)


def wait_for(action: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            action()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@pytest.fixture
def on_s3(repository: Repository, s3: Bucket, monkeypatch) -> Repository:
    """The same repository with its data on S3, in a bucket of its own."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(repository.root / "none"))
    s3.post("reset")
    s3.client().create_bucket(Bucket="images")
    configure(repository, s3.url)
    dvc(repository.root, "push")
    return repository


def configure(repository: Repository, endpoint: str, bucket: str = "images", key: str = "key") -> None:
    remote = f"url = s3://{bucket}/dvc\nendpointurl = {endpoint}\nregion = us-east-1\n"
    keys = f"access_key_id = {key}\nsecret_access_key = secret\n" if key else ""
    (repository.root / ".dvc/config").write_text(
        f"[core]\nno_scm = true\nremote = far\n['remote \"far\"']\n{remote}{keys}"
    )


@pytest.mark.slow
def test_s3_round_trip(on_s3):
    before = on_s3.content()
    on_s3.forget()
    assert pull_missing(on_s3.data)
    assert on_s3.content() == before


@pytest.mark.slow
def test_s3_corrupt_and_missing_objects(on_s3, s3):
    client = s3.client()
    keys = sorted(
        entry["Key"]
        for entry in client.list_objects_v2(Bucket="images")["Contents"]
        if not entry["Key"].endswith(".dir")
    )
    good = client.get_object(Bucket="images", Key=keys[0])["Body"].read()
    client.put_object(Bucket="images", Key=keys[0], Body=b"x" * len(good))
    on_s3.forget()
    with pytest.raises(
        SourceError, match=r"'data/\w+/\d\.png' arrived corrupt: the bytes on the DVC remote 'far' \(s3://images/dvc\)"
    ):
        pull_missing(on_s3.data)
    assert not on_s3.data.exists()
    client.delete_object(Bucket="images", Key=keys[0])
    on_s3.forget()
    with pytest.raises(SourceError, match=r"the DVC remote 'far' \(s3://images/dvc\) does not have 'data/\w+/\d\.png'"):
        pull_missing(on_s3.data)


@pytest.mark.slow
def test_s3_without_a_bucket(on_s3, s3):
    configure(on_s3, s3.url, bucket="absent")
    on_s3.forget()
    with pytest.raises(
        SourceError, match=r"the DVC remote 'far' \(s3://absent/dvc\) is empty or does not exist: check its URL"
    ):
        pull_missing(on_s3.data)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["", "WRONG"])
def test_s3_with_wrong_credentials(on_s3, s3, key):
    s3.authenticate_after(0)
    configure(on_s3, s3.url, key=key)
    on_s3.forget()
    try:
        with pytest.raises(
            SourceError,
            match=r"the DVC remote 'far' \(s3://images/dvc\) refuses access .*: "
            r"check its key: dvc remote modify --local far",
        ):
            pull_missing(on_s3.data)
    finally:
        s3.authenticate_after(1_000_000)


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A server that answers everything with this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_an_s3_server_that_forbids(on_s3):
    on_s3.forget()
    with answering(403) as url:
        configure(on_s3, url)
        with pytest.raises(SourceError, match="refuses access"):
            pull_missing(on_s3.data)


@pytest.mark.slow
def test_an_s3_server_that_is_not_there(on_s3):
    on_s3.forget()
    configure(on_s3, "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(SourceError, match=r"the DVC remote 'far' .*cannot be reached .*: check the network"):
        pull_missing(on_s3.data)
    assert time.monotonic() - start < 60
