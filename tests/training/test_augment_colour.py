"""Changes of colour mean what Pillow means, to one grey level, whatever the image."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from image_classifier.training.augment import colour

Operation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Reference = Callable[[Image.Image, float], Image.Image]


def picture(seed: int, size: int, kind: str) -> np.ndarray:
    """uint8 [size, size, 3]: noise, few levels, a flat colour, or dark with a narrow range."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (size, size, 3))
    if kind == "few":
        pixels = pixels // 64 * 64
    elif kind == "flat":
        pixels[:] = random.integers(0, 256, 3)
    elif kind == "dark":
        pixels = 20 + pixels // 12
    return pixels.astype(np.uint8)


def assert_as_pillow(
    ours: Operation, pillow: Reference, images: list[np.ndarray], amounts: list[float], tolerance: int
) -> None:
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    result = ours(batch, torch.tensor(amounts)).permute(0, 2, 3, 1).numpy()
    for image, amount, got in zip(images, amounts, result, strict=True):
        wanted = np.asarray(pillow(Image.fromarray(image), amount))
        assert np.abs(got.astype(int) - wanted.astype(int)).max() <= tolerance


KINDS = st.lists(
    st.tuples(st.integers(0, 999), st.sampled_from(["noise", "few", "flat", "dark"])), min_size=1, max_size=4
)


@pytest.mark.parametrize(
    ("ours", "pillow"),
    [
        (colour.brightness, lambda image, factor: ImageEnhance.Brightness(image).enhance(factor)),
        (colour.contrast, lambda image, factor: ImageEnhance.Contrast(image).enhance(factor)),
        (colour.saturation, lambda image, factor: ImageEnhance.Color(image).enhance(factor)),
        (colour.sharpness, lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor)),
    ],
    ids=["brightness", "contrast", "saturation", "sharpness"],
)
@settings(deadline=None, max_examples=25)
@given(kinds=KINDS, size=st.integers(1, 24), factors=st.lists(st.floats(0, 2), min_size=4, max_size=4))
def test_enhancements(
    ours: Operation, pillow: Reference, kinds: list[tuple[int, str]], size: int, factors: list[float]
) -> None:
    images = [picture(seed, size, kind) for seed, kind in kinds]
    if ours is colour.sharpness and size < 3:
        return  # Pillow has no inner pixels either
    assert_as_pillow(ours, pillow, images, factors[: len(images)], tolerance=1)


@settings(deadline=None, max_examples=25)
@given(kinds=KINDS, size=st.integers(1, 24), bits=st.integers(1, 8), threshold=st.integers(0, 256))
def test_operations_on_levels_are_exact(kinds: list[tuple[int, str]], size: int, bits: int, threshold: int) -> None:
    images = [picture(seed, size, kind) for seed, kind in kinds]
    assert_as_pillow(
        colour.posterize, lambda image, amount: ImageOps.posterize(image, int(amount)), images, [bits] * len(images), 0
    )
    assert_as_pillow(
        colour.solarize,
        lambda image, amount: ImageOps.solarize(image, int(amount)),
        images,
        [threshold] * len(images),
        0,
    )
    assert_as_pillow(colour.equalize, lambda image, _: ImageOps.equalize(image), images, [0.0] * len(images), 0)
    assert_as_pillow(colour.autocontrast, lambda image, _: ImageOps.autocontrast(image), images, [0.0] * len(images), 1)


@given(seed=st.integers(0, 99))
def test_each_image_gets_its_own_amount(seed: int) -> None:
    pixels = torch.from_numpy(picture(seed, 8, "noise")).permute(2, 0, 1).expand(3, -1, -1, -1)
    black, same, bright = colour.brightness(pixels, torch.tensor([0.0, 1.0, 2.0]))
    assert (black == 0).all() and torch.equal(same, pixels[0])
    assert torch.equal(bright, (pixels[0].int() * 2).clamp(max=255).to(torch.uint8))
