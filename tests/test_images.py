from __future__ import annotations

import io
import json
import os
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_classifier.errors import ConfigError, UnreadableImage
from image_classifier.images import DecodeLimits, Preprocess, decode, inspect, is_image_name, read_header, read_size

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
    with pytest.raises(UnreadableImage, match="pixels"):
        decode(content)
    with pytest.raises(UnreadableImage, match="pixels"):
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
    for name, reason in (
        ("pipe.png", "not a file"),
        ("folder.png", "not a file"),
        ("empty.png", "empty"),
        ("none.png", "no such file"),
    ):
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
    assert (
        abs(Preprocess(size, crop_fraction=fraction)(image).astype(int) - expected).max() <= 2
    )  # Pillow keeps the box in float32


def test_a_picture_of_the_right_size_is_untouched():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for mode in ("crop", "squash", "pad"):
        np.testing.assert_array_equal(Preprocess(32, mode)(image), image)


def test_an_absurd_shape_needs_no_absurd_memory():
    assert Preprocess(64)(np.zeros((1, 3_000_000, 3), np.uint8)).shape == (64, 64, 3)


def test_preprocess_travels_as_a_dict():
    preprocess = Preprocess(48, "pad", "bicubic", 0.9, background=(1, 2, 3), scaled_decoding=True)
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.as_dict()))) == preprocess
    assert Preprocess.from_dict(
        {"size": 8, "mode": "crop", "interpolation": "bilinear", "crop_fraction": 1.0}
    ) == Preprocess(8)
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
        ({"size": 8, "background": (0, 0)}, "data.background"),
        ({"size": 8, "background": [0, 0, 256]}, "data.background"),
        ({"size": 8, "background": "white"}, "data.background"),
        ({"size": 8, "scaled_decoding": "often"}, "data.scaled_decoding"),
    ],
)
def test_a_value_that_cannot_be_names_its_key(values, key):
    with pytest.raises(ConfigError, match=key):
        Preprocess(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_bytes": 0}, "data.limits.max_bytes"),
        ({"max_bytes": "50MB"}, "data.limits.max_bytes"),
        ({"max_pixels": 10**9}, "data.limits.max_pixels"),
        ({"formats": ["JPG"]}, "unknown format 'JPG' in data.limits.formats: did you mean JPEG"),
        ({"formats": ["PDF"]}, "choose from JPEG, PNG"),
        ({"formats": "JPEG"}, "data.limits.formats must be a list"),
        ({"formats": []}, "data.limits.formats must be a list"),
    ],
)
def test_a_limit_that_cannot_be_names_its_key(values, message):
    with pytest.raises(ConfigError, match=message):
        DecodeLimits(**values)


def test_only_the_formats_allowed_are_read():
    limits = DecodeLimits(formats=["PNG", "JPEG"])
    assert limits == DecodeLimits(formats=("JPEG", "PNG"))
    assert read_header(encoded(Image.fromarray(CORNERS), "PNG"), limits).format == "PNG"
    with pytest.raises(UnreadableImage, match="not a JPEG or PNG image"):
        decode(encoded(Image.fromarray(CORNERS), "GIF"), limits)


def test_transparency_lies_on_the_background_asked_for():
    content = encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "PNG")
    assert decode(content, background=(1, 2, 3))[0, 0].tolist() == [1, 2, 3]
    assert Preprocess(4, background=[1, 2, 3]).read(content)[0, 0].tolist() == [1, 2, 3]
    with pytest.raises(ConfigError, match="data.background"):
        decode(content, background=(1, 2))


BLOTCHES = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
PHOTOGRAPH = Image.fromarray(BLOTCHES).resize((401, 299), Image.Resampling.BICUBIC)  # sides that no scale divides


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 500), st.integers(1, 400), st.integers(1, 8), st.sampled_from(["RGB", "L", "CMYK"]))
def test_a_scaled_jpeg_is_upright_and_at_least_what_was_asked(width, height, orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(PHOTOGRAPH.crop((0, 0, 400, 296)).convert(mode), "JPEG", exif=exif, quality=95)
    header, whole = inspect(content)
    again, pixels = inspect(content, at_least=(width, height))
    assert again == header
    if header.width < 2 * width or header.height < 2 * height:
        np.testing.assert_array_equal(pixels, whole)
        return
    assert pixels.shape[1] >= width and pixels.shape[0] >= height
    assert pixels.shape[1] <= (header.width + 1) // 2
    reduced = np.asarray(Image.fromarray(whole).resize(pixels.shape[1::-1], Image.Resampling.BOX)).astype(int)
    assert abs(reduced - pixels).mean() < 4


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decoding_barely_moves_the_pixels(mode, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a.jpg").write_bytes(encoded(PHOTOGRAPH, "JPEG", quality=95, exif=exif))
    full, scaled = (
        Preprocess(32, mode, scaled_decoding=scaled).read(tmp_path / "a.jpg").astype(int) for scaled in (False, True)
    )
    assert (full != scaled).any()
    assert abs(full - scaled).mean() < 1
    assert abs(full - scaled).max() <= 12
    np.testing.assert_array_equal(
        scaled, Preprocess(32, mode, scaled_decoding=True).read((tmp_path / "a.jpg").read_bytes())
    )
    large = Preprocess(200, mode, scaled_decoding=True)  # nothing to gain: the full picture
    np.testing.assert_array_equal(large.read(tmp_path / "a.jpg"), large(decode(tmp_path / "a.jpg")))
