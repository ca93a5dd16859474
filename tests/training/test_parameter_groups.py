"""Parameter groups: each parameter in exactly one, nothing decayed that must not be, layers in the network's order."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import VisionTransformer

from image_classifier.errors import ConfigError
from image_classifier.modeling.backbones import torchvision_backbone
from image_classifier.modeling.classifier import Classifier
from image_classifier.modeling.convnet import MLP, ConvNet
from image_classifier.modeling.whitened import WhitenedNet
from image_classifier.training.optimizers.groups import KINDS, layers, parameter_groups
from image_classifier.training.optimizers.schedules import SchedulerSettings, build_optimizer_and_schedule
from tests.training.small_fits import Rates, fit, small_module

NETWORKS = {
    "convnet": partial(ConvNet, 32),
    "mlp": partial(MLP, 8),
    "whitened": partial(WhitenedNet, (8, 16, 16)),
    "resnet18": partial(torchvision_backbone, "resnet18"),
    "mobilenet": partial(torchvision_backbone, "mobilenet_v3_small"),
    "swin": partial(
        timm.create_model,
        "swin_tiny_patch4_window7_224",
        num_classes=0,
        embed_dim=24,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
    ),
    "vit": partial(timm.create_model, "vit_tiny_patch16_224", num_classes=0, depth=3),
    "convnext": partial(timm.create_model, "convnext_atto", num_classes=0, dims=(8, 16, 24, 32)),
}
_BUILT: dict[str, Classifier] = {}


def network(name: str) -> Classifier:
    if name not in _BUILT:
        _BUILT[name] = Classifier(NETWORKS[name](), nn.Linear(8, 3), (0.5,) * 3, (0.25,) * 3)
    return _BUILT[name]


def kinds(classifier: nn.Module) -> dict[str, str]:
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    return {names[id(one)]: group["kind"] for group in parameter_groups(classifier) for one in group["params"]}


@given(name=st.sampled_from(sorted(NETWORKS)), layer_decay=st.sampled_from([0.5, 0.9, 1.0]))
@settings(max_examples=20, deadline=None)
def test_every_trainable_parameter_is_in_exactly_one_group(name: str, layer_decay: float) -> None:
    classifier = network(name)
    found = [id(one) for group in parameter_groups(classifier, None, layer_decay) for one in group["params"]]
    assert sorted(found) == sorted(id(one) for one in classifier.parameters() if one.requires_grad)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_norms_biases_and_embeddings_are_not_decayed_and_all_else_is(name: str) -> None:
    classifier = network(name)
    for group in parameter_groups(classifier):
        assert group.get("weight_decay", 0.0) == 0.0
        assert group["kind"] in KINDS
        assert "weight_decay" in group or all(one.ndim > 1 for one in group["params"])
    kept = {id(one) for group in parameter_groups(classifier) if "weight_decay" in group for one in group["params"]}
    spared = ("bias", "cls_token", "pos_embed", "bias_table", ".gamma")
    learning = [(key, one) for key, one in classifier.named_parameters() if one.requires_grad]
    assert all((id(one) in kept) == (one.ndim <= 1 or key.endswith(spared)) for key, one in learning)


def test_kinds_say_what_a_parameter_does() -> None:
    found = kinds(network("vit"))
    assert found["backbone.patch_embed.proj.weight"] == "stem"
    assert found["backbone.blocks.0.attn.qkv.weight"] == found["backbone.blocks.2.mlp.fc2.weight"] == "matrix"
    assert found["head.weight"] == found["head.bias"] == "head"  # a head that learns slower does so as a whole
    assert found["backbone.blocks.0.norm1.bias"] == found["backbone.blocks.0.attn.qkv.bias"] == "vector"
    assert (
        kinds(network("convnext"))["backbone.stages.0.blocks.0.conv_dw.weight"] == "other"
    )  # one small kernel a channel: no matrix


def test_a_frozen_first_layer_makes_no_other_the_stem() -> None:
    assert "stem" not in kinds(network("whitened")).values()


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_layers_name_every_parameter_once_and_a_network_has_several(name: str) -> None:
    backbone = network(name).backbone
    found = layers(backbone)
    assert sorted(one for names in found for one in names) == sorted(one for one, _ in backbone.named_parameters())
    assert len(found) >= 2


def test_torchvision_layers_are_its_blocks_and_norms_go_with_what_they_follow() -> None:
    found = layers(network("resnet18").backbone)
    assert [names[0].rpartition(".conv1")[0] for names in found[1:]] == [
        f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)
    ]
    assert found[0] == ["conv1.weight", "bn1.weight", "bn1.bias"]


def test_a_torchvision_transformer_is_looked_into_and_its_embeddings_go_with_the_first_layer() -> None:
    network = VisionTransformer(image_size=32, patch_size=4, num_layers=6, num_heads=2, hidden_dim=96, mlp_dim=192)
    network.heads = nn.Sequential()
    found = layers(network)
    assert len(found) == 1 + 6
    assert {"class_token", "encoder.pos_embedding", "conv_proj.weight"} <= set(found[0])


@pytest.mark.parametrize("name", ["vit", "resnet18", "convnet"])
def test_each_layer_learns_slower_than_the_one_above_by_the_factor(name: str) -> None:
    classifier = network(name)
    names = {id(parameter): key for key, parameter in classifier.named_parameters()}
    groups = parameter_groups(classifier, None, layer_decay=0.5)
    scales = {names[id(one)]: group.get("lr_scale", 1.0) for group in groups for one in group["params"]}
    found = layers(classifier.backbone)
    for depth, layer in enumerate(found):
        assert {scales[f"backbone.{one}"] for one in layer} == {0.5 ** (len(found) - depth)}
    assert scales["head.weight"] == scales["head.bias"] == 1.0
    assert "lr_scale" not in groups[0]  # the rate that is logged is the full one


def test_a_neck_of_the_loss_learns_as_the_head_does() -> None:
    neck = nn.Linear(8, 4)
    groups = parameter_groups(network("convnet"), neck, layer_decay=0.5)
    heads = [group for group in groups if any(one is neck.weight for one in group["params"])]
    assert [(group["kind"], group.get("lr_scale", 1.0)) for group in heads] == [("head", 1.0)]
    assert sum(one is neck.bias for group in groups for one in group["params"]) == 1


def test_frozen_parameters_are_left_out_and_with_all_of_them_frozen_there_is_nothing_to_train() -> None:
    classifier = Classifier(ConvNet(8, (4, 8)), nn.Linear(8, 3), (0.5,) * 3, (0.25,) * 3)
    classifier.backbone.requires_grad_(False)
    assert [group["kind"] for group in parameter_groups(classifier)] == [
        "head",
        "head",
    ]  # the second one, its bias, without decay
    with pytest.raises(ConfigError, match="no parameter"):
        parameter_groups(classifier.requires_grad_(False))


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.1, float("nan")])
def test_an_impossible_factor_is_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match="layer_decay"):
        parameter_groups(network("convnet"), None, factor)


SCHEDULERS: dict[str, SchedulerSettings] = {
    "one_cycle": SchedulerSettings(
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, pct_start=0.25), "step", "total_steps"
    ),
    "cosine": SchedulerSettings(partial(torch.optim.lr_scheduler.CosineAnnealingLR), "step", "T_max"),
    "linear": SchedulerSettings(
        partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0), "step", "total_iters"
    ),
    "exponential": SchedulerSettings(partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)),
    "step": SchedulerSettings(partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.1)),
    "plateau": SchedulerSettings(
        partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5), monitor="val/loss"
    ),
    "constant": SchedulerSettings(),
}


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_keeps_the_layers_in_proportion(name: str, tmp_path: Path) -> None:
    rates = Rates()
    fit(
        small_module(partial(torch.optim.SGD, lr=0.1, momentum=0.9), SCHEDULERS[name], layer_decay=0.5),
        tmp_path,
        [rates],
    )
    assert len(rates.used) == 12
    for used in rates.used:
        assert max(used) == used[0]
        assert sorted({round(one / used[0], 6) for one in used}) == [0.125, 0.25, 0.5, 1.0]


def test_one_cycle_peaks_where_each_groups_own_rate_is() -> None:
    groups: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.zeros(1))]},
        {"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.25},
    ]
    moves = build_optimizer_and_schedule(
        partial(torch.optim.SGD, lr=0.1, momentum=0.9), groups, SCHEDULERS["one_cycle"], num_steps=40
    )
    assert [group["max_lr"] for group in moves.optimizer.param_groups] == [0.1, 0.025]
    assert "lr_scale" not in moves.optimizer.param_groups[1]
