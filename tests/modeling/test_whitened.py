"""The whitened network: its first layer decorrelates patches, and its blocks start by passing images through."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from image_classifier.errors import ConfigError
from image_classifier.modeling.whitened import WhitenedNet


def smooth_images(number: int = 64, size: int = 12) -> torch.Tensor:
    """Images whose neighbouring pixels and channels are alike, as in photographs."""
    noise = torch.randn(number, 1, size, size, generator=torch.Generator().manual_seed(0)).repeat(1, 3, 1, 1)
    return functional.avg_pool2d(noise, 3, 1, 1) + 0.1 * torch.randn(
        number, 3, size, size, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_whitening_filters_decorrelate_the_patches_of_the_images_they_come_from(size: int) -> None:
    network = WhitenedNet((8, 8), whitening_size=size)
    images = smooth_images()
    network.fit_to(images)
    filters = 3 * size**2
    answers = functional.conv2d(images, network.whiten.weight)[:, :filters].transpose(0, 1).reshape(filters, -1)
    covariance = answers @ answers.T / answers.shape[1]
    assert torch.allclose(covariance, torch.diag(covariance.diag()), atol=1e-3)
    assert (covariance.diag() <= 1 + 1e-4).all()
    assert covariance.diag().max() > 0.9
    assert torch.equal(network.whiten.weight[:filters], -network.whiten.weight[filters:])


def test_filters_of_constant_images_are_finite() -> None:
    network = WhitenedNet((8,))
    network.fit_to(torch.zeros(4, 3, 8, 8))
    assert torch.isfinite(network.whiten.weight).all()


def test_whitening_filters_and_the_scale_of_norms_are_not_trained() -> None:
    network = WhitenedNet()
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    still = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert still == {
        name
        for name, _ in network.named_parameters()
        if name == "whiten.weight" or (".norms." in name and name.endswith("weight"))
    }


@settings(deadline=None, max_examples=10)
@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    convolutions=st.integers(1, 3),
    residual=st.booleans(),
    size=st.integers(16, 40),
    number=st.integers(2, 3),
)
def test_any_image_size_gives_one_embedding_of_the_last_width(
    widths: list[int], convolutions: int, residual: bool, size: int, number: int
) -> None:
    network = WhitenedNet(widths, max(convolutions, 3) if residual else convolutions, residual)
    assert network(torch.randn(number, 3, size, size)).shape == (number, widths[-1])


@pytest.mark.parametrize(
    "impossible",
    [{"widths": ()}, {"convolutions": 0}, {"residual": True}, {"norm_momentum": 1.0}, {"whitening_size": 0}],
)
def test_impossible_settings_are_one_line(impossible: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="invalid model.backbone"):
        WhitenedNet(**impossible)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_in_bfloat16_its_gradients_stay_numbers() -> None:
    network = WhitenedNet(widths=(8, 8, 8))
    network.compile()
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(4, 3, 16, 16)).float().square().sum().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert len(gradients) == 1 + 6 * 2  # bias of the first layer; six convolutions and their norms
    assert all(bool(torch.isfinite(gradient).all()) and bool(gradient.any()) for gradient in gradients)
