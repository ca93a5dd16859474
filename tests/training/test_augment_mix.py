"""Mixed labels are the shares of what is seen, whatever the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classifier.training.augment import Mix


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of one level each, 20 times their class, so that a pixel says where it is from."""
    targets = torch.arange(count)
    return (20 * targets).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous(), targets


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 12), size=st.sampled_from([4, 9, 32]), probability=st.floats(0, 1), seed=st.integers(0, 999)
)
def test_the_label_shares_are_the_pixel_shares_of_a_cut(count: int, size: int, probability: float, seed: int) -> None:
    pixels, targets = flat(count, size)
    mixed, shares = Mix(mixup=None, cutmix=1.0, probability=probability)(pixels, targets, count, generator(seed))
    counted = torch.nn.functional.one_hot(mixed[:, 0].flatten(1).long() // 20, count).float().mean(dim=1)
    assert shares.dtype == torch.float32 and torch.allclose(shares, counted, atol=1e-6)
    assert mixed.dtype == torch.uint8 and torch.allclose(shares.sum(dim=1), torch.ones(count))


@settings(deadline=None, max_examples=40)
@given(count=st.integers(2, 12), alpha=st.floats(0.1, 4), seed=st.integers(0, 999))
def test_a_blend_is_of_two_images_by_their_shares(count: int, alpha: float, seed: int) -> None:
    pixels, targets = flat(count, 5)
    mixed, shares = Mix(mixup=alpha, cutmix=None)(pixels, targets, count, generator(seed))
    assert torch.allclose(mixed.float().mean(dim=(1, 2, 3)), shares @ (20.0 * targets), atol=0.51)
    assert (shares.amax(dim=1) >= 0.5).all() and torch.equal(
        shares.argmax(dim=1)[shares.amax(dim=1) > 0.5], targets[shares.amax(dim=1) > 0.5]
    )
    assert ((shares > 0).sum(dim=1) <= 2).all()


def test_of_both_each_image_takes_one_and_the_rest_is_left_alone() -> None:
    pixels, targets = flat(12, 16)
    pixels, targets = pixels.repeat(50, 1, 1, 1), targets.repeat(50)
    mixed, shares = Mix(0.5, 1.0, probability=0.5)(pixels, targets, 12, generator(0))
    levels = torch.tensor([len(image.unique()) for image in mixed])
    blended = (levels == 1) & (shares.amax(dim=1) < 1)
    untouched = (mixed == pixels).flatten(1).all(dim=1)
    assert 100 < (levels == 2).sum() < 200 and 80 < blended.sum() < 200
    assert 250 < untouched.sum() < 400
    assert torch.equal(shares[untouched].argmax(dim=1), targets[untouched])


def test_a_batch_of_one_stays_as_it_is() -> None:
    pixels, targets = flat(1, 4)
    mixed, shares = Mix()(pixels, targets, 3, generator(0))
    assert torch.equal(mixed, pixels) and shares.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("mix", [Mix(), Mix(mixup=None), Mix(cutmix=None)])
def test_equal_seeds_give_equal_mixes(mix: Mix) -> None:
    pixels, targets = flat(8, 8)
    first, second, other = (mix(pixels, targets, 8, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[1], other[1])
