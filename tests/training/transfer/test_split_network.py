"""Backbones cut in two: both halves together are the whole, whatever the network."""

from __future__ import annotations

from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

from image_classifier.modeling.backbones import torchvision_backbone
from image_classifier.training.transfer.split_network import Cut, cuts, is_exact, split

NETWORKS = {
    "mobilenet_v2": 64,
    "resnet18": 32,
    "timm/mobilenetv3_small_050": 64,
    "timm/test_convnext": 64,
    "timm/vit_tiny_patch16_224": 64,
}


def backbone_of(name: str) -> nn.Module:
    """A network with weights and batch statistics that are not those of a new one."""
    torch.manual_seed(0)
    library, _, short = name.rpartition("/")
    more = {"img_size": NETWORKS[name], "depth": 2} if "vit" in name else {}
    backbone = timm.create_model(short, num_classes=0, **more) if library else torchvision_backbone(name)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return backbone


def some(found: list[Cut]) -> list[Cut]:
    """The first, the last and one between."""
    return [found[at] for at in sorted({0, len(found) // 2, len(found) - 1})]


@pytest.mark.parametrize("name", NETWORKS)
def test_at_every_cut_both_halves_are_the_whole_network(name: str) -> None:
    backbone, pixels = backbone_of(name).eval(), torch.rand(2, 3, NETWORKS[name], NETWORKS[name])
    found = cuts(backbone, pixels)
    assert len(found) >= 2 and len({cut.name for cut in found}) == len(found)
    with torch.no_grad():
        expected = backbone(pixels)
        for cut in some(found):
            lower, upper = split(backbone, cut)
            values = lower.eval()(pixels)
            assert values.shape[1:] == cut.shape and values[0].numel() == cut.numbers
            torch.testing.assert_close(upper.eval()(values).flatten(1), expected.flatten(1), rtol=1e-4, atol=1e-4)
            assert is_exact(backbone, lower, upper, pixels)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_parameter_is_below_or_above_a_cut(name: str) -> None:
    backbone = backbone_of(name)
    found = cuts(backbone, torch.rand(2, 3, NETWORKS[name], NETWORKS[name]))
    for cut in some(found):
        # What learns in a half is what its own output depends on.
        lower, upper = split(backbone, cut)
        backbone.eval()
        backbone.requires_grad_(True)
        upper(torch.rand(2, *cut.shape)).sum().backward()
        above = {key for key, value in backbone.named_parameters() if value.grad is not None}
        assert not above & set(cut.lower) and above | set(cut.lower) == set(dict(backbone.named_parameters()))
        backbone.zero_grad(set_to_none=True)
        lower(torch.rand(2, 3, NETWORKS[name], NETWORKS[name])).sum().backward()
        assert {key for key, value in backbone.named_parameters() if value.grad is not None} <= set(cut.lower)
        backbone.zero_grad(set_to_none=True)
    assert all(set(low.lower) < set(high.lower) for low, high in pairwise(found))


def test_the_upper_half_trains_the_networks_own_layers_and_leaves_the_lower_ones() -> None:
    backbone = backbone_of("mobilenet_v2")
    cut = cuts(backbone.eval(), torch.rand(2, 3, 64, 64))[-3]
    _, upper = split(backbone, cut)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    upper.train()
    torch.optim.SGD(upper.parameters(), lr=0.1).zero_grad()
    upper(torch.rand(2, *cut.shape)).square().sum().backward()
    torch.optim.SGD([value for value in upper.parameters() if value.grad is not None], lr=0.1).step()
    moved = {name for name, value in backbone.named_parameters() if not torch.equal(value, before[name])}
    assert moved and not moved & set(cut.lower)


def test_the_modes_of_a_network_are_as_before() -> None:
    backbone = backbone_of("resnet18").train()
    backbone.layer1.eval()
    modes = [module.training for module in backbone.modules()]
    pixels = torch.rand(2, 3, 32, 32)
    cut = cuts(backbone, pixels)[3]
    assert [module.training for module in backbone.modules()] == modes
    halves = split(backbone, cut)
    assert [module.training for module in backbone.modules()] == modes
    assert is_exact(backbone, *halves, pixels) and [module.training for module in backbone.modules()] == modes


def test_dropout_and_batch_norm_of_the_upper_half_follow_the_mode() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5))
    backbone.eval()
    cut = cuts(backbone, torch.rand(2, 3, 4, 4))[0]
    _, upper = split(backbone, cut)
    values = torch.rand(8, *cut.shape)
    assert torch.equal(upper.eval()(values), upper(values))
    upper.train()
    assert not torch.equal(upper(values), upper(values))
    assert upper.eval()(values).shape == (8, 64)


class Branching(nn.Module):
    """Its way depends on the pixels, which no graph shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 4), nn.Linear(12, 4)])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers[int(bool(pixels.sum() > 0))](pixels.flatten(1))


class Skipping(nn.Module):
    """The first layer's answer is used until the end: nothing between can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        first = self.first(pixels.flatten(1))
        return self.third(self.second(first)) + first


def test_a_network_that_cannot_be_traced_has_no_cut() -> None:
    assert cuts(Branching(), torch.rand(2, 3, 2, 2)) == []
    with pytest.raises(ValueError, match="cannot be cut"):
        split(Branching(), Cut("x", (4,), ("layers.0.weight",)))


def test_no_cut_is_between_a_value_and_its_later_use() -> None:
    assert [cut.lower for cut in cuts(Skipping(), torch.rand(2, 3, 2, 2))] == [("first.weight", "first.bias")]
