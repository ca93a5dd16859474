"""Under bfloat16 autocast on a processor, depthwise convolutions with a slow gradient are computed in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from image_classifier.training.depthwise import depthwise_in_float32

CPU = torch.device("cpu")


@contextmanager
def training_step() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16), depthwise_in_float32(CPU):
        yield


@pytest.mark.parametrize(
    ("convolution", "is_float32"),
    [
        (nn.Conv2d(8, 8, 3, stride=2, groups=8), True),
        (nn.Conv2d(8, 8, 5, groups=8), True),
        (nn.Conv2d(8, 16, 7, padding="same", groups=8), True),
        (nn.Conv2d(8, 8, 3, stride=(1, 2), groups=8, bias=False), True),
        (nn.Conv2d(8, 8, 3, groups=8), False),
        (nn.Conv2d(8, 8, 3, stride=2, groups=4), False),
        (nn.Conv2d(8, 8, 3, stride=2), False),
        (nn.Conv2d(1, 8, 5, stride=2), False),
    ],
)
def test_only_depthwise_ones_that_are_no_plain_three_by_three(convolution: nn.Conv2d, is_float32: bool) -> None:
    pixels = torch.rand(2, convolution.in_channels, 9, 9, requires_grad=True)
    expected = convolution(pixels)
    with training_step():
        found = convolution(pixels.bfloat16())
    assert found.dtype == (torch.float32 if is_float32 else torch.bfloat16)
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)
    found.float().sum().backward()
    assert convolution.weight.grad is not None and convolution.weight.grad.dtype == torch.float32
    assert pixels.grad is not None and bool(pixels.grad.abs().sum() > 0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_nothing_changes_without_a_gradient_without_autocast_and_in_float16(half: torch.dtype) -> None:
    convolution, pixels = nn.Conv2d(8, 8, 3, stride=2, groups=8), torch.rand(2, 8, 9, 9)
    with torch.no_grad(), training_step():
        assert convolution(pixels).dtype == torch.bfloat16
    with depthwise_in_float32(CPU):
        assert torch.equal(convolution(pixels), convolution(pixels))
    if half == torch.float16:
        with torch.autocast("cpu", half), depthwise_in_float32(CPU):
            assert convolution(pixels).dtype == half


def test_a_network_may_name_the_arguments_and_keep_its_weights_in_bfloat16() -> None:
    convolution, pixels = nn.Conv2d(8, 8, 3, stride=2, groups=8), torch.rand(2, 8, 9, 9)
    given = {"weight": convolution.weight, "bias": convolution.bias, "stride": 2, "groups": 8}
    expected = convolution(pixels).detach()
    with training_step():
        named = nn.functional.conv2d(input=pixels, **given)
        half_named = nn.functional.conv2d(pixels, **given)
        in_bfloat16 = convolution.bfloat16()(pixels)
    for found in (named, half_named, in_bfloat16):
        torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.slow
def test_a_compiled_network_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    pixels, gradients = torch.rand(2, 3, 9, 9), []
    for forward in (network, torch.compile(network)):
        network.zero_grad()
        with training_step():
            values = forward(pixels)
        values.float().square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, atol=0.02, rtol=0.02)
