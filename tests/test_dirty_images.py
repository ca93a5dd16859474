"""Every file of `dirty-images`: the picture a person sees, or the one error."""

from __future__ import annotations

import csv
import re
import tarfile

import numpy as np
import pytest

from image_classifier.errors import UnreadableImage
from image_classifier.images import Preprocess, inspect, read_header, read_size

NO_IMAGE, TOO_LARGE, CUT, BROKEN = "not a JPEG, PNG", "pixels", "[Tt]runcated", "broken data stream"
REFUSED = {  # of the dirty files; every other one is a picture
    "bomb/badwidth.bmp": TOO_LARGE,
    "bomb/decompression_bomb.ico": NO_IMAGE,
    "bomb/fuzz_0436fb11.bmp": TOO_LARGE,
    "bomb/fuzz_c55a9974.bmp": TOO_LARGE,
    "bomb/oom-225817ca0f8c663be7ab4b9e717b02c661e66834.tif": NO_IMAGE,
    "bomb/reallybig.bmp": TOO_LARGE,
    "corrupt/broken.png": NO_IMAGE,
    "corrupt/fuzz_1cebb613.jpg": BROKEN,
    "corrupt/fuzz_2c572901.jpg": BROKEN,
    "corrupt/fuzz_358cd4e9.jpg": NO_IMAGE,
    "corrupt/fuzz_6f8f0be6.jpg": BROKEN,
    "corrupt/fuzz_b0ef2811.jpg": BROKEN,
    "corrupt/fuzz_b81e1921.jpg": CUT,
    "corrupt/fuzz_cf33aa8c.jpg": BROKEN,
    "corrupt/fuzz_ef9ebbca.jpg": NO_IMAGE,
    "corrupt/fuzz_fc24f915.jpg": CUT,
    "corrupt/libtiff_segfault.tif": NO_IMAGE,
    "corrupt/seek_too_large.tif": "seek",
    "corrupt/unknown_compression_method.png": NO_IMAGE,
    "corrupt/zero_height.j2k": NO_IMAGE,
    "deep/hopper_16bit.pgm": NO_IMAGE,
    "derived/bomb_400Mpx.png": TOO_LARGE,
    "derived/cut_2_bytes.jpg": CUT,
    "derived/empty.jpg": "empty",
    "derived/float_nan.tiff": "not numbers",
    "extreme_aspect/fuzz_348e67d5.jpg": "ends early",  # nine tenths mid-grey
    "extreme_aspect/fuzz_b014f64b.jpg": "ends early",
    "formats/hopper.ico": NO_IMAGE,
    "formats/hopper.ppm": NO_IMAGE,
    "junk/chelsea.zip": NO_IMAGE,
    "truncated/fuzz_06c41826.jpg": CUT,
    "truncated/truncated_end_chunk.png": CUT,
    "truncated/truncated_image.png": CUT,
    "truncated/truncated_jpeg.jpg": CUT,
    "truncated/ultrahdr.jpg": CUT,
}
SEEN = {  # what a person sees at (x, y), in fractions of width and height: looked at, one by one
    "animated/blend_op_over.png": (0.5, 0.5, (255, 0, 0)),
    "animated/dispose_prev.gif": (0.5, 0.5, (30, 144, 255)),
    "cmyk/pil_sample_cmyk.jpg": (0.01, 0.01, (255, 13, 25)),
    "corrupt/broken_exif_dpi.jpg": (0.5, 0.5, (0, 128, 1)),
    "deep/16bit.cropped.tif": (0.5, 0.5, (1, 1, 1)),  # samples near 400 of 65535: as good as black
    "deep/16bit.s.tif": (0.5, 0.5, (255, 255, 255)),  # signed: 32767 is white
    "deep/i_trns.png": (0.5, 0.5, (255, 255, 255)),
    "derived/UPPER.JPG": (0.25, 0.25, (142, 38, 25)),
    "derived/png_bad_idat_crc.png": (0.25, 0.25, (141, 37, 24)),
    "derived/trailing_garbage.jpg": (0.25, 0.25, (142, 38, 25)),
    "exif/Landscape_6.jpg": (0.25, 0.25, (218, 231, 250)),
    "exif/hopper_orientation_8.webp": (0.5, 0.5, (174, 93, 58)),
    "formats/hopper.bmp": (0.5, 0.5, (173, 70, 55)),
    "formats/hopper.tif": (0.5, 0.5, (173, 70, 55)),
    "palette_alpha_gray/p_trns_single.png": (0.5, 0.5, (255, 255, 255)),
    "palette_alpha_gray/rgb32bf-rgba.bmp": (0.5, 0.5, (0, 255, 255)),
    "palette_alpha_gray/transparent.gif": (0.02, 0.98, (255, 255, 255)),
    "palette_alpha_gray/uncompressed_la.png": (0.5, 0.5, (255, 255, 255)),
    "wrong_ext/shine127.jpg": (0.25, 0.25, (25, 83, 147)),
}


def test_every_real_dirty_file_is_the_picture_a_person_sees_or_the_one_error(shared_data, tmp_path):
    archive = shared_data / "dirty-images.tar.gz"
    if not archive.exists():
        pytest.skip("dirty-images.tar.gz is not here")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    with (tmp_path / "MANIFEST.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 79
    for row in rows:
        path = tmp_path / row["file"]
        answer, error = attempted(path)
        if row["file"] in REFUSED:
            assert re.search(REFUSED[row["file"]], error), f"{row['file']}: {error}"
            assert repr(path.name)[1:-1] in error
            continue
        assert answer is not None, error
        check_picture(row, path, *answer)


def attempted(path):
    """Header and pixels, or None and the one line; any other exception fails the test."""
    try:
        return inspect(path), ""
    except UnreadableImage as error:
        return None, str(error)


def check_picture(row, path, header, pixels):
    format_, mode, size = row["pillow13_header"].split()[:3]
    assert (header.format, header.mode) == ("JPEG" if format_ == "MPO" else format_, mode)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (header.height, header.width, 3)
    stored = [int(side) for side in size.split("x")]
    assert [header.width, header.height] == (stored[::-1] if header.orientation >= 5 else stored)
    assert read_header(path) == header
    assert read_size(path) == (header.width, header.height)
    assert Preprocess(32).read(path).shape == (32, 32, 3)
    if row["file"] in SEEN:
        x, y, colour = SEEN[row["file"]]
        found = pixels[int(y * header.height), int(x * header.width)].astype(int)
        assert abs(found - colour).max() <= 3, f"{row['file']}: {found}"
