"""Every network: right shapes, a gradient for each parameter, and it can learn eight images by heart."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from image_classifier.errors import ConfigError
from image_classifier.modeling.backbones import pretrained_normalise, torchvision_backbone
from image_classifier.modeling.classifier import Classifier, build_classifier
from image_classifier.modeling.convnet import MLP, ConvNet

SIZE = 64
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convnet": lambda: ConvNet(SIZE),
    "simpsons_cnn": lambda: ConvNet(
        SIZE,
        [8, 16, 32, 64, 96, 128],
        ["conv", "activation", "pool", "norm"],
        dropout=[0.2] * 4 + [0.0] * 2,
        global_pool=False,
        hidden=[64, 64],
    ),
    "simpsons_focal": lambda: ConvNet(
        SIZE, [16, 32, 64, 128], ["conv", "activation", "pool", "norm"], hidden=[120, 84], hidden_dropout=[0, 0.1]
    ),
    "mlp": lambda: MLP(SIZE, [32]),
    "resnet18": lambda: torchvision_backbone("resnet18"),
    "mobilenet_v3_small": lambda: torchvision_backbone("mobilenet_v3_small"),
}


def build(name: str, classes: int = 5) -> Classifier:
    torch.manual_seed(0)
    return build_classifier(NETWORKS[name](), classes, SIZE, MEAN, STD)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_finite_and_every_parameter_gets_a_gradient(name: str) -> None:
    classifier = build(name)
    logits = classifier(torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8))
    assert logits.shape == (4, 5) and logits.dtype == torch.float32
    loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert torch.isfinite(loss)
    without = [
        key
        for key, parameter in classifier.named_parameters()
        if parameter.grad is None or not torch.isfinite(parameter.grad).all()
    ]
    assert without == []


@pytest.mark.parametrize("name", ["convnet", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_eight_images_are_learnt_by_heart(name: str) -> None:
    classifier = build(name)
    pixels = torch.randint(0, 256, (8, 3, SIZE, SIZE), dtype=torch.uint8)
    targets = torch.arange(8) % 5
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(pixels), targets).backward()
        optimizer.step()
    assert (classifier(pixels).argmax(1) == targets).all()


def test_pixels_are_normalised_inside() -> None:
    classifier = Classifier(nn.Identity(), nn.Identity(), MEAN, STD)
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(classifier(pixels), expected.flatten(1))


@given(
    channels=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    order=st.permutations(["conv", "norm", "activation", "pool"]),
    hidden=st.lists(st.integers(1, 16), max_size=2),
    global_pool=st.booleans(),
)
def test_any_order_and_width_makes_a_network(
    channels: list[int], order: list[str], hidden: list[int], global_pool: bool
) -> None:
    network = ConvNet(16, channels, order, hidden=hidden, global_pool=global_pool, dropout=0.1).eval()
    assert network(torch.zeros(2, 3, 16, 16)).shape[0] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"channels": [8] * 5}, "too small for 5 blocks"),
        ({"channels": []}, "is empty"),
        ({"order": ["norm", "pool"]}, "is not an order"),
        ({"activation": "rellu"}, "use one of relu"),
        ({"dropout": [0.1, 0.2]}, "2 values for 3 layers"),
        ({"dropout": 1.5}, "below 1"),
    ],
)
def test_an_impossible_network_says_why(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ConvNet(16, **arguments)  # type: ignore[arg-type]


def test_an_unknown_torchvision_network_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="resnet18"):
        torchvision_backbone("resnet81")


def test_a_backbone_that_cannot_take_the_size_says_so() -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size"):
        build_classifier(torchvision_backbone("vit_b_16"), 3, 64, MEAN, STD)


def test_normalisation_comes_from_pretrained_weights_only() -> None:
    backbone = nn.Identity()
    backbone.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # type: ignore[assignment]
    assert pretrained_normalise(backbone, {"pretrained": False}) is None
    assert pretrained_normalise(backbone, {"pretrained": True}) == ([0.5] * 3, [0.5] * 3)
    assert pretrained_normalise(backbone, {"weights": "DEFAULT"}) == ([0.5] * 3, [0.5] * 3)
