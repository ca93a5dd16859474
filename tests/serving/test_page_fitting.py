"""What is larger than the server takes is made smaller in the browser, and nothing else is touched."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serving.page_stub import StubServer
from tests.serving.page_tab import UNREADABLE, Open

pytestmark = pytest.mark.browser
WORDS = re.compile(
    r"Too large for the server, so a smaller copy was sent: "
    r"([\d,]+)\s×\s([\d,]+) pixels \((.+)\) instead of ([\d,]+)\s×\s([\d,]+) \((.+)\)\."
)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_file_of_too_many_bytes_is_sent_as_a_smaller_jpeg(opened: Open, stub: StubServer, tmp_path: Path) -> None:
    noise(1500, 1000).save(tmp_path / "roses.png")
    tab = opened()
    tab.send(tmp_path / "roses.png")
    tab.wait(".entry.done", 1)
    sent = stub.stub.contents["roses.png"]
    picture = Image.open(io.BytesIO(sent))
    assert len(sent) <= 2**20 < (tmp_path / "roses.png").stat().st_size and picture.format == "JPEG"
    assert (
        picture.width / picture.height == pytest.approx(1.5, abs=0.01) and len(sent) > 2**19
    )  # no smaller than it must be
    found = WORDS.fullmatch(tab.texts(".shrunk")[0])
    assert found and [int(text.replace(",", "")) for text in found.group(1, 2, 4, 5)] == [
        picture.width,
        picture.height,
        1500,
        1000,
    ]
    assert tab.texts(".path") == ["roses.png"] and tab.page.evaluate(UNREADABLE) == []
    tab.page.click("[data-key=explain]")
    tab.wait(".picture canvas", 1)
    assert stub.stub.contents["roses.png"] == sent
    tab.page.wait_for_timeout(1500)  # it writes the answers down a moment later
    tab.page.reload()
    assert WORDS.fullmatch(tab.wait(".shrunk", 1).text_content())


def test_too_many_pixels_become_fewer_and_stay_upright_and_white_behind(
    opened: Open, stub: StubServer, tmp_path: Path
) -> None:
    stub.stub.max_pixels = 20_000
    turned = Image.new("RGB", (300, 150), "blue")
    turned.paste("red", (0, 0, 150, 150))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: its left is above
    turned.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (200, 200), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    tab = opened(locale="ru-RU")
    tab.send(tmp_path / "turned.jpg", tmp_path / "clear.png")
    tab.wait(".entry.done", 2)
    upright, white = (Image.open(io.BytesIO(stub.stub.contents[name])) for name in ("turned.jpg", "clear.png"))
    assert 19_000 < upright.width * upright.height <= 20_000 and upright.height / upright.width == pytest.approx(
        2, abs=0.02
    )
    assert upright.getexif().get(0x0112, 1) == 1
    above, below = (upright.getpixel((upright.width // 2, upright.height * part // 4)) for part in (1, 3))
    assert above[0] > 200 > 60 > above[2] and below[2] > 200 > 60 > below[0]
    assert min(white.getpixel((70, 70))) > 250
    for words, size in zip(tab.texts(".shrunk"), ("150\u00a0×\u00a0300", "200\u00a0×\u00a0200"), strict=True):
        assert words.startswith("Файл слишком велик для сервера") and size in words


def test_what_fits_is_sent_to_the_byte(opened: Open, stub: StubServer, tmp_path: Path) -> None:
    stub.stub.max_pixels = 300 * 200
    noise(300, 200).save(tmp_path / "roses.jpg", quality=95)
    stub.stub.max_bytes = (tmp_path / "roses.jpg").stat().st_size
    (tmp_path / "none.jpg").write_bytes(b"\xff\xd8\xff no picture")
    tab = opened()
    tab.send(tmp_path / "roses.jpg", tmp_path / "none.jpg")
    tab.wait(".entry.done", 2)
    assert {name: (tmp_path / name).read_bytes() for name in ("roses.jpg", "none.jpg")} == stub.stub.contents
    assert tab.texts(".shrunk") == []


def test_a_server_without_jpeg_gets_no_jpeg(opened: Open, stub: StubServer, tmp_path: Path) -> None:
    stub.stub.formats, stub.stub.max_bytes = ("PNG",), 1000
    noise(300, 200).save(tmp_path / "roses.png")
    tab = opened()
    tab.send(tmp_path / "roses.png")
    assert "the server accepts up to" in tab.wait(".entry.error", 1).text_content() and stub.stub.contents == {}
