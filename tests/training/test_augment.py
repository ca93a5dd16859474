"""Augmentation changes pictures, never their shape, type or the run's repeatability."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.errors import ConfigError
from image_classifier.training.augment import BatchAugment


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    count=st.integers(1, 5),
    size=st.sampled_from([8, 17]),
    flip=st.booleans(),
    rotation=st.floats(0, 45),
    light=st.floats(0, 0.5),
    seed=st.integers(0, 9),
)
def test_shape_type_and_repeatability(count: int, size: int, flip: bool, rotation: float, light: float, seed: int) -> None:
    augment = BatchAugment(flip=flip, rotation=rotation, brightness=light, contrast=light)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator(seed))
    once, again = augment(pixels, generator(seed)), augment(pixels, generator(seed))
    assert once.shape == pixels.shape and once.dtype == torch.uint8
    assert torch.equal(once, again)


def test_doing_nothing_changes_nothing() -> None:
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    still = BatchAugment(crop_scale=(1, 1), aspect=(1, 1), flip=False)
    assert torch.equal(still(pixels, generator()), pixels)


def test_a_flip_is_exact_and_happens_to_about_half() -> None:
    pixels = torch.randint(0, 256, (400, 3, 6, 6), dtype=torch.uint8)
    flipped = BatchAugment(crop_scale=(1, 1), aspect=(1, 1), flip=True)(pixels, generator())
    same = (flipped == pixels).flatten(1).all(1)
    mirrored = (flipped == pixels.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_each_image_of_a_batch_is_changed_in_its_own_way() -> None:
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(8, -1, -1, -1)
    changed = BatchAugment()(pixels, generator())
    assert len({tuple(image.flatten().tolist()) for image in changed}) == 8


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 1.5), (0.9, 0.5), (0.5,)])
def test_an_impossible_range_is_refused(scale: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="crop_scale"):
        BatchAugment(crop_scale=scale)
