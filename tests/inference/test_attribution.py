"""Heat maps: they lie where the evidence lies, follow the head, and leave the classifier as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionTransformer

from image_classifier.inference.attribution import Attribution, attribution_map
from image_classifier.modeling.backbones import torchvision_backbone
from image_classifier.modeling.classifier import Classifier, build_classifier
from image_classifier.modeling.convnet import MLP, ConvNet
from image_classifier.modeling.whitened import WhitenedNet

MEAN, STD = [0.5] * 3, [0.25] * 3


def transformer(pool: str) -> nn.Module:
    return VisionTransformer(
        img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=0, global_pool=pool
    )


def torchvision_transformer() -> nn.Module:
    network = TorchvisionTransformer(32, 4, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64)
    network.heads = nn.Identity()
    return network


def swin() -> nn.Module:
    network = SwinTransformer([2, 2], 16, [1, 1], [2, 2], [4, 4])
    network.head = nn.Identity()
    return network


def stem() -> nn.Module:
    network = transformer("token")
    network.patch_embed.proj = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 32, 3, 2, 1))
    return network


def timm_swin() -> nn.Module:
    return TimmSwin(
        img_size=32, patch_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=0
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "convnet": (lambda: ConvNet(32, [8, 16]), 32, "Grad-CAM"),
    "flattened": (
        lambda: ConvNet(
            32, [8, 16], ["conv", "activation", "pool", "norm"], dropout=0.2, global_pool=False, hidden=[9]
        ),
        32,
        "Grad-CAM",
    ),
    "whitened": (lambda: WhitenedNet([8, 16, 16]), 32, "Grad-CAM"),
    "torchvision resnet18": (lambda: torchvision_backbone("resnet18"), 64, "Grad-CAM"),
    "torchvision mobilenet": (lambda: torchvision_backbone("mobilenet_v3_small"), 64, "Grad-CAM"),
    "torchvision swin": (swin, 32, "token relevance"),
    "timm swin": (timm_swin, 32, "token relevance"),
    "torchvision vit": (torchvision_transformer, 32, "token relevance"),
    "timm vit, class token": (lambda: transformer("token"), 32, "token relevance"),
    "timm vit, mean": (lambda: transformer("avg"), 32, "token relevance"),
    "timm vit, stem": (stem, 32, "token relevance"),
    "timm convnext": (lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=0), 64, "Grad-CAM"),
    "timm mobilenet": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=0), 96, "Grad-CAM"),
    "mlp": (lambda: MLP(32, [16]), 32, "input gradient"),
}


def classifier_of(name: str, tta: str = "none") -> tuple[Classifier, np.ndarray]:
    torch.manual_seed(3)
    make, size, _ = NETWORKS[name]
    pixels = np.random.default_rng(1).integers(0, 256, (3, size, size), dtype=np.uint8)
    return build_classifier(make(), 4, size, MEAN, STD, tta=tta), pixels


def assert_heat(found: Attribution, size: int) -> None:
    assert found.heat.shape == (size, size) and found.heat.dtype == np.float32
    assert found.heat.min() >= 0 and found.heat.max() in (0, 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_a_heat_map_and_is_left_as_it_was(name: str) -> None:
    classifier, pixels = classifier_of(name)
    classifier.train()
    next(classifier.head.modules()).eval()  # a mix of modes, as a frozen part has it
    for parameter in classifier.backbone.parameters():
        parameter.requires_grad_(False)
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    modes = [module.training for module in classifier.modules()]
    found = [attribution_map(classifier, pixels, target) for target in (0, 1, 2, 3)]
    for one in found:
        assert_heat(one, pixels.shape[1])
        assert one.method == NETWORKS[name][2]
    assert any(one.heat.any() for one in found)
    again = attribution_map(classifier, pixels, 3)
    assert np.array_equal(again.heat, found[3].heat)
    assert [module.training for module in classifier.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())
    assert not any(module._forward_hooks for module in classifier.modules())
    assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize("name", ["convnet", "timm vit, class token", "mlp"])
def test_another_head_gives_another_map(name: str) -> None:
    """The sanity check of Adebayo et al. (2018): a map that does not depend on the weights explains nothing."""
    classifier, pixels = classifier_of(name)
    with torch.no_grad():
        nn.init.normal_(classifier.head.weight)
        before = attribution_map(classifier, pixels, 1).heat
        nn.init.normal_(classifier.head.weight)
    after = attribution_map(classifier, pixels, 1).heat
    assert np.abs(after - before).mean() > 0.01


def test_the_plain_view_is_explained_whatever_is_averaged() -> None:
    plain, pixels = classifier_of("convnet")
    averaged, _ = classifier_of("convnet", tta="flip_shift")
    assert np.array_equal(attribution_map(plain, pixels, 2).heat, attribution_map(averaged, pixels, 2).heat)


def test_hooks_go_when_the_network_fails() -> None:
    classifier, _ = classifier_of("mlp")
    with pytest.raises(RuntimeError):
        attribution_map(classifier, np.zeros((3, 5, 5), np.uint8), 0)
    assert not any(module._forward_hooks for module in classifier.modules())
    assert all(module.training for module in classifier.modules())


def red_detector() -> Classifier:
    """Class 1 is the mean of red over green, class 0 that of green over red."""
    convolution = nn.Conv2d(3, 2, 3, padding=1, bias=False)
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.weight[0, :2, 1, 1] = torch.tensor([1.0, -1.0])
        convolution.weight[1, :2, 1, 1] = torch.tensor([-1.0, 1.0])
    head = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    return Classifier(nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), head, MEAN, STD)


@given(top=st.integers(0, 18), left=st.integers(0, 18), seed=st.integers(0, 99))
@hypothesis_settings(max_examples=25)
def test_grad_cam_is_the_patch_that_decides(top: int, left: int, seed: int) -> None:
    pixels = np.repeat(
        np.random.default_rng(seed).integers(0, 256, (1, 24, 24), dtype=np.uint8), 3, axis=0
    )  # grey: speaks for no class
    pixels[:, top : top + 6, left : left + 6] = np.array([250, 10, 10]).reshape(3, 1, 1)
    red, green = (attribution_map(red_detector(), pixels, target).heat for target in (1, 0))
    inside = np.zeros((24, 24), dtype=bool)
    inside[top : top + 6, left : left + 6] = True
    assert red[inside].min() > 0.99 and red[~inside].max() == 0
    assert not green.any()


def test_pixels_that_an_mlp_does_not_weigh_stay_cold() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.ReLU())
    with torch.no_grad():
        weights = network[1].weight.view(8, 3, 16, 16)
        weights[:, :, :, :10] = 0
        weights[:, :, :4] = 0
    classifier = Classifier(network, nn.Linear(8, 2), MEAN, STD)
    heat = attribution_map(classifier, np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8), 0).heat
    assert heat[5:, 11:].max() == 1 and heat[:3].max() == 0 and heat[:, :9].max() == 0


def squares(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise uint8 [N, 3, 32, 32] with one 8 px square whose colour is the class [N]; its corner, a multiple of 4 px,
    [N, 2].
    """
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
    pixels = rng.integers(60, 196, (count, 3, 32, 32), dtype=np.uint8)
    targets, corners = rng.integers(0, 3, count), 4 * rng.integers(0, 7, (count, 2))
    for row, (target, (top, left)) in enumerate(zip(targets, corners, strict=True)):
        pixels[row, :, top : top + 8, left : left + 8] = colours[target][:, None, None]
    return pixels, targets, corners


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Layers this small only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def share_of_hits(name: str, steps: int, count: int) -> float:
    """The pointing game (Zhang et al., 2018) after some training: how often the hottest place is in the object; by
    chance for 1 image in 7.
    """
    classifier, _ = classifier_of(name)
    rng, optimizer = np.random.default_rng(0), torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    for _ in range(steps):
        pixels, targets, _ = squares(rng, 32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(torch.from_numpy(pixels)), torch.from_numpy(targets)).backward()
        optimizer.step()
    classifier.eval()
    pixels, targets, corners = squares(rng, count)
    assert (classifier(torch.from_numpy(pixels)).argmax(1).numpy() == targets).mean() > 0.95
    hits = 0
    for image, target, (top, left) in zip(pixels, targets, corners, strict=True):
        heat = attribution_map(classifier, image, int(target)).heat
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        hits += top - 2 <= row < top + 10 and left - 2 <= column < left + 10  # two pixels of grace: maps are coarse
    return hits / count


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_trained_transformer_points_at_what_it_learnt() -> None:
    assert share_of_hits("timm vit, class token", 75, 20) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "convnet",
        "flattened",
        "torchvision vit",
        "timm vit, class token",
        "timm vit, mean",
        "torchvision swin",
        "timm swin",
    ],
)
def test_a_trained_network_points_at_what_it_learnt(name: str) -> None:
    assert share_of_hits(name, 150, 60) >= 0.8


@pytest.mark.parametrize("name", ["timm vit, class token", "timm swin"])
def test_fused_and_explicit_attention_have_the_same_map(name: str) -> None:
    classifier, pixels = classifier_of(name)
    attentions = [module for module in classifier.modules() if hasattr(module, "fused_attn")]
    heats = []
    for fused in (True, False):
        for module in attentions:
            module.fused_attn = fused
        heats.append(attribution_map(classifier, pixels, 1).heat)
    assert len(attentions) == 2 and np.allclose(*heats, atol=1e-4)


def test_a_map_is_the_same_under_inference_mode() -> None:
    classifier, pixels = classifier_of("timm vit, class token")
    heat = attribution_map(classifier, pixels, 1).heat
    with torch.inference_mode():
        assert np.array_equal(attribution_map(classifier, pixels, 1).heat, heat)
