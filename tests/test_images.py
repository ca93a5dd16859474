from __future__ import annotations

import io
import os
import struct
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_classifier.errors import ConfigError, UnreadableImage
from image_classifier.images import DecodeLimits, Preprocess, decode, is_image_name, read_size

GRADIENT = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 16-bit greys whose 8-bit values are 0..255
CORNERS = np.zeros((16, 24, 3), dtype=np.uint8)
CORNERS[:8, :12] = (255, 0, 0)
CORNERS[:8, 12:] = (0, 255, 0)
CORNERS[8:, :12] = (0, 0, 255)


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def attempted(source, read=decode):
    """What `read` gives, or None and its one line; any other exception fails the test."""
    try:
        return read(source), ""
    except UnreadableImage as error:
        line = str(error)
    assert "\n" not in line
    return None, line


def test_every_real_dirty_file_gives_pixels_or_the_one_error(shared_data, tmp_path):
    archive = shared_data / "dirty-images.tar.gz"
    if not archive.exists():
        pytest.skip("dirty-images.tar.gz is not here")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    read = 0
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        pixels, error = attempted(path)
        if pixels is None:
            assert repr(path.name)[1:-1] in error
            continue
        read += 1
        assert pixels.dtype == np.uint8
        assert pixels.shape[2:] == (3,)
        assert read_size(path) == (pixels.shape[1], pixels.shape[0])
        assert Preprocess(32)(pixels).shape == (32, 32, 3)
    assert read >= 40


@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_never_clipped(format_):
    pixels = decode(encoded(Image.fromarray(GRADIENT), format_))
    np.testing.assert_array_equal(pixels[:, :, 0].ravel(), np.arange(256))
    np.testing.assert_array_equal(pixels[:, :, 0], pixels[:, :, 2])


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floats_are_scaled_by_the_range_they_use(top):
    pixels = decode(encoded(Image.fromarray((GRADIENT / 65535 * top).astype(np.float32)), "TIFF"))
    np.testing.assert_allclose(pixels[:, :, 0].ravel(), np.arange(256), atol=1)


def test_floats_that_are_not_numbers_are_refused():
    with pytest.raises(UnreadableImage, match="not numbers"):
        decode(encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode):
    rgba = Image.fromarray(np.dstack([CORNERS, np.repeat(np.array([[0] * 12 + [255] * 12], np.uint8), 16, axis=0)]))
    image = rgba.quantize(8) if mode == "P" else rgba.convert(mode)
    pixels = decode(encoded(image, "PNG"))
    assert (pixels[:, :12] == 255).all()
    assert (pixels[10, 20] == 0).all()


def test_half_transparent_black_is_grey():
    assert decode(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG"))[0, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(format_, orientation):
    """The stored pixels are turned as a camera would, so that applying the tag gives CORNERS back."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation -> the Pillow transpose that stores it so
    image = Image.fromarray(CORNERS)
    stored = image if orientation == 1 else image.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format_ == "WEBP" else {"quality": 95} if format_ == "JPEG" else {}
    content = encoded(stored, format_, exif=exif, **options)
    pixels = decode(content)
    assert pixels.shape == CORNERS.shape
    assert read_size(content) == (24, 16)
    np.testing.assert_allclose(pixels[4::8, 6::12].astype(int), CORNERS[4::8, 6::12], atol=12)


def test_cmyk_and_grey_and_bilevel_become_rgb():
    assert decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[4, 4, 0] > 240
    assert decode(encoded(Image.new("L", (8, 8), 7), "PNG")).tolist() == [[[7] * 3] * 8] * 8
    assert decode(encoded(Image.new("1", (8, 8), 1), "PNG")).min() == 255


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format_ in ("GIF", "WEBP", "PNG"):
        content = encoded(frames[0], format_, save_all=True, append_images=frames[1:])
        assert decode(content)[4, 4, 0] > 240


def test_limits_are_read_from_the_header(tmp_path):
    content = encoded(Image.new("1", (9000, 9000)), "PNG")  # some kilobytes that become 240 megabytes
    with pytest.raises(UnreadableImage, match="megapixels"):
        decode(content)
    with pytest.raises(UnreadableImage, match="megapixels"):
        read_size(content, DecodeLimits(max_pixels=100))
    with pytest.raises(UnreadableImage, match="larger than"):
        decode(b"x" * 2**20, DecodeLimits(max_bytes=1000))


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_damage_is_never_another_error(format_, data):
    content = bytearray(encoded(Image.fromarray(CORNERS), format_))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    for read in (decode, read_size):
        attempted(bytes(content), read)


def test_half_a_jpeg_is_refused():
    content = encoded(Image.fromarray(CORNERS), "JPEG")
    with pytest.raises(UnreadableImage, match="truncated"):
        decode(content[:-20])


def test_what_is_not_a_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    for name, reason in (("pipe.png", "not a file"), ("folder.png", "not a file"), ("empty.png", "empty"), ("none.png", "no such file")):
        with pytest.raises(UnreadableImage, match=reason):
            decode(tmp_path / name)


def test_warnings_of_pillow_stay_inside_even_with_threads():
    """A JPEG with a broken EXIF block makes Pillow warn; the tests turn warnings into errors."""
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x010E, 2, 1000, 5000)
    content = encoded(Image.fromarray(CORNERS), "JPEG", exif=exif)
    before = warnings.filters[:]
    with ThreadPoolExecutor(8) as pool:
        shapes = set(pool.map(lambda _: decode(content).shape, range(200)))
    assert shapes == {CORNERS.shape}
    assert warnings.filters == before


def test_names_of_images():
    assert all(map(is_image_name, ["a.jpg", "A.JPEG", "-x y.Png", "ä'\".webp", "a.b.tif"]))
    assert not any(map(is_image_name, [".hidden.jpg", "Thumbs.db", "noextension", "a.txt", ".jpg", "a.jpg.part"]))


SHAPES = st.tuples(st.integers(1, 120), st.integers(1, 120))


@settings(deadline=None)
@given(
    SHAPES,
    st.integers(1, 40),
    st.sampled_from(["crop", "squash", "pad"]),
    st.sampled_from(["bilinear", "bicubic"]),
    st.sampled_from([1.0, 0.875, 0.3]),
)
def test_preprocess_gives_the_square_and_keeps_a_flat_colour(shape, size, mode, interpolation, crop_fraction):
    pixels = Preprocess(size, mode, interpolation, crop_fraction)(np.full((*shape, 3), 77, np.uint8))
    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.uint8
    assert set(np.unique(pixels)) <= ({0, 77} if mode == "pad" else {77})


@settings(deadline=None)
@given(SHAPES, st.integers(1, 40), st.sampled_from([1.0, 0.875]), st.integers(0, 9))
def test_crop_is_resize_then_centre_crop(shape, size, fraction, seed):
    image = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    shorter = round(size / fraction)
    height, width = (max(shorter, round(side * (shorter / min(shape)))) for side in shape)
    whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    top, left = (height - size) // 2, (width - size) // 2
    expected = whole[top : top + size, left : left + size].astype(int)
    assert abs(Preprocess(size, crop_fraction=fraction)(image).astype(int) - expected).max() <= 2  # Pillow keeps the box in float32


def test_a_picture_of_the_right_size_is_untouched():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for mode in ("crop", "squash", "pad"):
        np.testing.assert_array_equal(Preprocess(32, mode)(image), image)


def test_an_absurd_shape_needs_no_absurd_memory():
    assert Preprocess(64)(np.zeros((1, 3_000_000, 3), np.uint8)).shape == (64, 64, 3)


def test_preprocess_travels_as_a_dict():
    preprocess = Preprocess(48, "pad", "bicubic", 0.9)
    assert Preprocess.from_dict(preprocess.as_dict()) == preprocess
    for bad in ({"size": 8, "colour": 1}, {"mode": "crop"}):
        with pytest.raises(ConfigError):
            Preprocess.from_dict(bad)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"size": 0}, "data.image_size"),
        ({"size": 8, "mode": "stretch"}, "data.resize"),
        ({"size": 8, "interpolation": "nearest"}, "data.interpolation"),
        ({"size": 8, "crop_fraction": 0.0}, "data.crop_fraction"),
        ({"size": 8, "crop_fraction": 1.5}, "data.crop_fraction"),
    ],
)
def test_a_value_that_cannot_be_names_its_key(values, key):
    with pytest.raises(ConfigError, match=key):
        Preprocess(**values)
