"""Training and inference turn a name into bytes by the same rules: each rule, tried through both."""

from __future__ import annotations

import io
import json
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from image_classifier.dataset.discovery import discover
from image_classifier.dataset.sources import Folder
from image_classifier.errors import DataError, SourceError
from image_classifier.manifest import Manifest
from image_classifier.sources import addresses
from image_classifier.sources.archive import ArchiveLimits, UnpackLimits
from image_classifier.sources.download import Download, DownloadSettings
from image_classifier.sources.image_source import ImageSource
from image_classifier.sources.inputs import Inputs
from image_classifier.sources.suffixes import ARCHIVE_SUFFIXES
from image_classifier.sources.web import UrlLimits, WebClient
from tests.conftest import Command, write_image
from tests.sources.test_unpack import packed

MANY = UrlLimits(timeout_s=5)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def inferred(item: str, **options: object) -> list[ImageSource]:
    """The images that inference finds."""
    inputs = Inputs([item], io.BytesIO, **options)  # type: ignore[arg-type]
    inputs.check()
    return list(inputs)


def contents(images: list[ImageSource]) -> list[bytes]:
    """The bytes of images, sorted."""
    content = [image.content() for image in images]
    return sorted(item.read_bytes() if isinstance(item, Path) else item for item in content)


def trained_on(root: Path) -> list[bytes]:
    """The bytes of the images that training finds, sorted."""
    tree = discover([root])
    return sorted((root / image.path).read_bytes() for image in tree.images)


# Archives


@pytest.mark.parametrize("suffix", ARCHIVE_SUFFIXES)
def test_the_same_archive_is_trained_from_and_inferred_on(tree: Path, command: Command, suffix: str) -> None:
    archive = packed(tree, Path(f"set{suffix}"))
    images = trained_on(tree)
    assert contents(inferred(str(archive))) == images
    answer = command("prepare", "data=folder", f"data.archive={archive}")
    assert answer.code == 0, answer.err
    (manifest,) = Path("data/manifests").iterdir()
    (folder,) = Path("data").glob("set-*")
    records = Manifest.read(manifest, folder)
    assert sorted((folder / record.path).read_bytes() for record in records) == images


LIMITS = [
    ({"max_members": 2}, "(more than|too large for) 2 members", "max_members"),
    ({"max_bytes": 3000}, "more than 3,000 bytes", "max_bytes"),
]


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.zst"])
@pytest.mark.parametrize(("limits", "message", "key"), LIMITS)
def test_one_budget_refuses_in_both(tree: Path, suffix: str, limits: dict[str, int], message: str, key: str) -> None:
    archive = packed(tree, Path(f"set{suffix}"))
    with pytest.raises(DataError, match=rf"{message}.*archive\.{key}"):
        contents(inferred(str(archive), archive=ArchiveLimits(**limits)))
    with pytest.raises(SourceError, match=rf"{message}.*data\.unpack\.{key}"):
        Folder(archive=str(archive), unpack=UnpackLimits(**limits))()
    assert list(Path("data").iterdir()) == []  # nothing was written


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".tar.xz", ".tar.zst"])
def test_a_bomb_is_refused_in_both(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("image_classifier.sources.archive._FREE_BYTES", 16 * 2**20)  # a small bomb is packed faster
    Path("tree/cat").mkdir(parents=True)
    with Path("tree/cat/big.png").open("wb") as file:
        file.truncate(20 * 2**20)
    archive = Path(f"bomb{suffix}")
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bundle:
            bundle.write("tree/cat/big.png")
    else:
        packed(Path("tree"), archive)
    with pytest.raises(DataError, match="times its size"):
        contents(inferred(str(archive)))
    with pytest.raises(SourceError, match=r"more than 100 times its size.*data\.unpack\.max_ratio"):
        Folder(archive=str(archive), unpack=UnpackLimits(max_ratio=100))()
    assert list(Path("data").iterdir()) == []


def test_limits_are_keys_of_the_command_line(tree: Path, command: Command) -> None:
    archive = packed(tree, Path("set.tar.gz"))
    line = ("prepare", "data=folder", f"data.archive={archive}")
    answer = command(*line, "data.unpack.max_members=3")
    assert answer.code == 2 and "data.unpack.max_members" in answer.err
    assert "at least 1" in command(*line, "data.unpack.max_bytes=0").err
    assert command(*line).code == 0


@pytest.mark.parametrize("name", ["set.zip", "set.tar.gz", "set.tar.zst"])
def test_a_damaged_archive_is_said_to_be_damaged_by_both(tree: Path, name: str) -> None:
    archive = packed(tree, Path(name))
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(DataError, match="the archive is damaged"):
        contents(inferred(name))
    with pytest.raises(SourceError, match="the archive is damaged"):
        Folder(archive=name)()


# Folders


def test_both_see_the_same_files_of_a_folder(tmp_path: Path) -> None:
    names = (
        "cat/1.png",
        "cat/deep/2.PNG",
        "dog/3.jpg",
        "dog/notes.txt",
        "dog/.hidden.png",
        "dog/@eaDir/3.jpg",
        "dog/#recycle/old.png",
        "__MACOSX/cat/1.png",
        ".Trash/x.png",
        "cat/Thumbs.db",
    )
    for number, name in enumerate(names):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]))
    elsewhere = write_image(tmp_path / "elsewhere" / "4.png", 4)
    (tmp_path / "photos" / "cat" / "linked").symlink_to(elsewhere.parent)
    (tmp_path / "photos" / "cat" / "circle").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "cat" / "file.png").symlink_to(elsewhere)
    (tmp_path / "photos" / "cat" / "gone.png").symlink_to("nowhere")
    trained = {image.path for image in discover([Path("photos")]).images}
    assert trained == {"cat/1.png", "cat/deep/2.PNG", "cat/linked/4.png", "cat/file.png", "cat/gone.png", "dog/3.jpg"}
    assert {image.name.removeprefix("photos/") for image in inferred("photos")} == trained


def test_both_expand_the_home_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree.parent))
    assert Folder(dir="~/tree")() == tree
    assert contents(inferred("~/tree")) == contents(inferred("~/tree/*/*.png")) == trained_on(tree)
    write_image(Path("~here/cat/1.png"), 1)
    assert len(inferred("~here")) == 1
    assert Folder(dir="~here")() == Path("~here")


# Tables


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "path,label\n{a},cat\n{b},dog\n"),
        ("t.csv", "path;label\n{a};cat\n{b};dog\n"),
        ("t.csv", "label;path\ncat;{a}\n\ndog;{b}\n"),
        ("t.tsv", "path\tlabel\n{a}\tcat\n{b}\tdog\n"),
        ("t.csv", "\ufeff Path , LABEL\n{a},cat\n{b},dog\n"),
        ("t.csv", 'path,label\r\n"{a}", cat\r\n{b},dog\r\n'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_both_read_the_same_table(tree: Path, name: str, text: str, encoding: str) -> None:
    paths = ("cat/000.png", "dog/001.png")
    text = text.removeprefix("\ufeff") if encoding == "utf-16" else text
    (tree / name).write_bytes(text.format(a=paths[0], b=paths[1]).encode(encoding))
    assert [image.path for image in discover([tree / name]).images] == list(paths)
    assert [image.name for image in inferred(str(tree / name))] == [str(tree / path) for path in paths]


@pytest.mark.parametrize(("name", "text"), [("t.csv", 'path,label\n"a\n'), ("t.parquet", "no")])
def test_both_refuse_a_damaged_table_with_the_same_words(name: str, text: str) -> None:
    Path(name).write_text(text)
    messages = []
    for read in (lambda: discover([Path(name)]), lambda: inferred(name)):
        with pytest.raises(DataError) as caught:
            read()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


# The web


class Handler(BaseHTTPRequestHandler):
    """Serves `content` at every path; `failures` answers with 503 before, `cuts` breaks the next answers off."""

    protocol_version = "HTTP/1.1"
    content: ClassVar[bytes] = b""
    failures: ClassVar[int] = 0
    cuts: ClassVar[list[int]] = []
    location: ClassVar[str] = ""
    ranges: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        kind = type(self)
        self.close_connection = True
        kind.ranges.append(self.headers.get("Range"))
        if kind.failures or (kind.location and "moved" in self.path):
            self.send_response(503 if kind.failures else 302)
            kind.failures = max(0, kind.failures - 1)
            self.send_header("Location", kind.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        rest = kind.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(kind.content) - 1}/{len(kind.content)}")
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("ETag", '"one"')
        self.end_headers()
        self.wfile.write(rest[: kind.cuts.pop(0)] if kind.cuts else rest)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.content = bytes(range(256)) * 400
    Handler.failures = 0
    Handler.cuts = []
    Handler.location = ""
    Handler.ranges = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def by_inference(url: str, allow_private: bool = True) -> bytes:
    return WebClient(MANY, allow_private).image(url, 10**6)


def by_training(url: str, allow_private: bool | None = None) -> bytes:
    return Download(url, Path("downloads/set.zip"), pause_s=0.01, allow_private=allow_private)().read_bytes()


Fetch = Callable[..., bytes]
BOTH = pytest.mark.parametrize("fetch", [by_inference, by_training])


@pytest.mark.slow
@BOTH
def test_an_answer_that_may_pass_is_waited_for(server: str, fetch: Fetch) -> None:
    Handler.failures = 2
    assert fetch(f"{server}/1.png") == Handler.content


@BOTH
def test_what_broke_off_is_resumed(server: str, fetch: Fetch) -> None:
    Handler.cuts = [30_000, 20_000]
    assert fetch(f"{server}/1.png") == Handler.content
    assert Handler.ranges == [None, "bytes=30000-", "bytes=50000-"]


@BOTH
def test_an_address_without_a_host_is_refused_at_once(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: calls.append(1) or [])
    with pytest.raises(DataError, match="has no address"):
        fetch("http://nowhere.example/1.png")
    assert len(calls) == 1


@BOTH
def test_a_private_address_is_refused_where_it_is_not_allowed(server: str, fetch: Fetch) -> None:
    with pytest.raises(DataError, match=r"private network.*allow_private(_urls)?=true allows it"):
        fetch(f"{server}/1.png", allow_private=False)
    assert Handler.ranges == []


@pytest.mark.parametrize(("fetch", "allow_private"), [(by_inference, False), (by_training, False), (by_training, None)])
def test_no_redirect_leads_from_a_public_address_to_a_private_one(
    server: str, fetch: Fetch, allow_private: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Handler.location = f"{server.replace('127.0.0.1', '127.0.0.2')}/1.png"
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1")
    assert fetch(f"{server}/1.png", allow_private=allow_private) == Handler.content
    Path("downloads/set.zip").unlink(missing_ok=True)
    with pytest.raises(DataError, match="private network"):
        fetch(f"{server}/moved.png", allow_private=allow_private)
    assert len(Handler.ranges) == 2


def test_a_redirect_behind_a_proxy_is_judged_by_its_name(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy is all that this machine connects to."""
    monkeypatch.setenv("http_proxy", server)
    Handler.location = "http://10.0.0.1/secret"
    assert by_training("http://8.8.8.8/1.png") == Handler.content
    Path("downloads/set.zip").unlink()
    with pytest.raises(SourceError, match="leads to http://10.0.0.1/secret, an address of a private network"):
        by_training("http://8.8.8.8/moved.png")


def test_an_intranet_server_may_be_written_in_the_configuration(tree: Path, server: str, command: Command) -> None:
    Handler.content = packed(tree, Path("set.zip")).read_bytes()
    line = ("prepare", "data=folder", f"data.archive={server}/set.zip")
    answer = command(*line, "data.download.allow_private=false")
    assert answer.code == 2 and "data.download.allow_private=true allows it" in answer.err
    assert command(*line).code == 0
    assert json.dumps(Handler.ranges) == "[null]"


def test_settings_of_a_download_reach_every_source() -> None:
    refused = DownloadSettings(allow_private=False)
    with pytest.raises(SourceError, match="private network"):
        Folder(archive="http://127.0.0.1:1/set.zip", download=refused)()
