"""With norms held, answers stay and a logit is shared out among what came in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torchvision.models.vision_transformer import VisionTransformer

from image_classifier.modeling.attribution_rules import DetachedAttention

SIZES = st.lists(st.integers(1, 6), min_size=2, max_size=4)


@given(
    sizes=SIZES,
    num_axes=st.integers(1, 2),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    affine=st.booleans(),
    seed=st.integers(0, 99),
)
@hypothesis_settings(max_examples=60)
@pytest.mark.parametrize("norm", [functional.layer_norm, functional.rms_norm])
def test_a_held_norm_says_the_same_and_is_linear(
    norm: Callable, sizes: list[int], num_axes: int, scale: float, affine: bool, seed: int
) -> None:
    """Of a linear function the gradient times the input is the output."""
    generator = torch.Generator().manual_seed(seed)
    tensor = (scale * torch.randn(sizes, generator=generator, dtype=torch.float64)).requires_grad_()
    shape = sizes[-num_axes:]
    weight = torch.randn(shape, generator=generator, dtype=torch.float64) if affine else None
    with DetachedAttention():
        held = norm(tensor, shape, weight)
    assert torch.allclose(held, norm(tensor, shape, weight))
    (gradient,) = torch.autograd.grad(held.sum(), tensor)
    assert torch.allclose((gradient * tensor).sum(), held.sum())


def test_a_bias_and_an_epsilon_are_kept() -> None:
    tensor, bias = torch.randn(2, 5), torch.randn(5)
    with DetachedAttention():
        held = functional.layer_norm(tensor, (5,), bias=bias, eps=0.5), functional.rms_norm(tensor, (5,), eps=0.5)
    assert torch.allclose(held[0], functional.layer_norm(tensor, (5,), bias=bias, eps=0.5))
    assert torch.allclose(held[1], functional.rms_norm(tensor, (5,), eps=0.5))


@given(tokens=st.integers(1, 9), seed=st.integers(0, 99))
@hypothesis_settings(max_examples=20)
def test_gradients_flow_through_what_is_attended_to_alone(tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 2, tokens, 4, generator=generator, requires_grad=True) for _ in range(3))
    with DetachedAttention():
        fused = functional.scaled_dot_product_attention(query, key=key, value=value)
        scores = query @ key.transpose(2, 3) / 2
        explicit = [
            weights @ value
            for weights in (scores.softmax(-1), torch.softmax(scores, -1), functional.softmax(scores, dim=-1))
        ]
    for answer in (fused, *explicit):
        assert torch.allclose(answer, fused, atol=1e-5)
        gradients = torch.autograd.grad(answer.sum(), [query, key, value], allow_unused=True)
        assert gradients[:2] == (None, None)
        assert torch.allclose((gradients[2] * value).sum(), answer.sum(), atol=1e-4)


def test_answers_stay() -> None:
    networks = [
        VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3),
        timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3),
        nn.Sequential(nn.Flatten(), nn.LayerNorm(3 * 32 * 32), nn.Linear(3 * 32 * 32, 3), nn.Softmax(dim=1)),
    ]
    pixels = torch.randn(2, 3, 32, 32)
    for network in networks:
        plain = network.eval()(pixels)
        with DetachedAttention():
            held = network(pixels)
        assert torch.allclose(held, plain, atol=1e-5)
        assert torch.equal(network(pixels), plain)
