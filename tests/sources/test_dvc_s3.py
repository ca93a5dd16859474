"""DVC with a remote on S3, against a server of that protocol on this machine."""

from __future__ import annotations

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

import pytest

from image_classifier.errors import SourceError
from image_classifier.sources.dvc import pull_missing
from tests.sources.test_dvc import Repository, dvc, pushed, repository  # noqa: F401  (a fixture)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning"
)  # DVC's and its clients' own

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
def on_s3(repository: Repository, s3: Bucket, monkeypatch) -> Repository:  # noqa: F811
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


def configure(repository: Repository, endpoint: str, bucket: str = "images", key: str = "key") -> None:  # noqa: F811
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
