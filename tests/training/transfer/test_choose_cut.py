"""The cut is the lowest within the budget, by times of which each layer's share is its own."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from image_classifier.errors import ConfigError
from image_classifier.training.transfer import choose_cut as tested
from image_classifier.training.transfer.choose_cut import CutBudget, LayerTimes, cheapest_enough, measured, stage_ends
from image_classifier.training.transfer.split_network import Cut, cuts, traced
from tests.training.transfer.small_inputs import small_backbone
from tests.training.transfer.test_split_network import NETWORKS, backbone_of

PLENTY = CutBudget(views=4, epochs=18, num_kept=10, cost=2.2, max_gb=1.0)


def cut(name: str, numbers: int) -> Cut:
    return Cut(name, (numbers,), (name,))


@pytest.mark.parametrize("name", NETWORKS)
def test_all_layers_are_timed_and_the_network_stays_as_it_was(name: str) -> None:
    backbone, pixels = backbone_of(name).eval(), torch.rand(2, 3, NETWORKS[name], NETWORKS[name])
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    graph = traced(backbone, training=False)
    assert graph is not None
    random = torch.get_rng_state()
    times = measured(graph, pixels, torch.bfloat16)
    assert list(times.forward) == list(times.step) == [node.name for node in graph.graph.nodes]
    assert min(times.step.values()) >= 0 and sum(times.step.values()) > sum(times.forward.values()) > 0
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_each_layer_pays_for_its_own_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of a layer's gradient is that layer's, not its neighbours'."""
    clock = [0.0]
    monkeypatch.setattr(tested, "_now", lambda: clock[0])

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(context: torch.autograd.function.FunctionCtx, values: torch.Tensor) -> torch.Tensor:
            clock[0] += 1
            return values.clone()

        @staticmethod
        def backward(context: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
            clock[0] += 10
            return gradient

    class SlowLayer(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return Slow.apply(values)

    backbone = nn.Sequential(nn.Conv2d(3, 4, 1), SlowLayer(), nn.Conv2d(4, 4, 1), nn.Flatten()).eval()
    graph = traced(backbone, training=False)
    assert graph is not None
    times = measured(graph, torch.rand(2, 3, 8, 8), None)
    assert {name: seconds for name, seconds in times.forward.items() if seconds} == {"_1": 1.0}
    assert {name: seconds for name, seconds in times.step.items() if seconds} == {"_1": 11.0}


@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 5)), min_size=2, max_size=8),
    st.integers(1, 8),
    st.integers(8, 30),
)
def test_the_higher_the_cut_the_cheaper(layers: list[tuple[float, float]], views: int, epochs: int) -> None:
    names = [f"l{number}" for number in range(len(layers))]
    times = LayerTimes(
        dict(zip(names, (forward for forward, _ in layers), strict=True)),
        dict(zip(names, (forward + gradient for forward, gradient in layers), strict=True)),
    )
    budget = CutBudget(views, epochs, 1, 2.2, 1.0)
    costs = [times.cost(cut(name, 1), budget) for name in names]
    assert all(low >= high - 1e-9 for low, high in pairwise(costs))
    assert costs[-1] == pytest.approx(views * sum(times.forward.values()) / sum(times.step.values()))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=40))
def test_a_stage_end_is_the_last_of_its_size_and_never_wide(sizes: list[int]) -> None:
    known = [cut(str(at), size) for at, size in enumerate(sizes)]
    found = [int(one.name) for one in stage_ends(known)]
    assert found == sorted(set(found)) and min(sizes) in {sizes[at] for at in found}
    assert all(sizes[at] <= 2 * min(sizes[: at + 1]) for at in found)
    for at in range(len(sizes) - 1):
        if sizes[at] != sizes[at + 1] and sizes[at] <= 2 * min(sizes[: at + 1]):
            assert at in found


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("mobilenet_v2", ["add", "add_2", "add_5", "add_7", "add_9"]),
        ("resnet18", ["layer1_1_relu_1", "layer2_1_relu_1", "layer3_1_relu_1"]),
    ],
)
def test_the_ends_of_known_networks(name: str, ends: list[str]) -> None:
    backbone = backbone_of(name).eval()
    found = [one.name for one in stage_ends(cuts(backbone, torch.rand(1, 3, 64, 64)))]
    assert [one for one in found if one in ends] == ends and len(found) <= 12


def test_a_network_of_equal_layers_is_cut_at_some_of_them() -> None:
    found = stage_ends([cut(str(layer), 7) for layer in range(24)])
    assert [one.name for one in found] == ["3", "7", "11", "15", "19", "23"]


@pytest.mark.parametrize(("cost", "chosen"), [(100.0, "low"), (9.9, "middle"), (4.0, "high"), (0.1, "high")])
def test_the_lowest_within_the_budget_is_chosen_else_the_cheapest(
    cost: float, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [cut(name, numbers) for name, numbers in (("low", 8), ("middle", 4), ("high", 2))]
    monkeypatch.setattr(tested, "stage_ends", list)
    times = LayerTimes({"low": 1, "middle": 1, "high": 1}, {"low": 2, "middle": 2, "high": 2})
    monkeypatch.setattr(tested, "measured", lambda *_: times)
    budget = CutBudget(views=4, epochs=18, num_kept=10, cost=cost, max_gb=1.0)
    found = cheapest_enough(known, small_backbone().eval(), 16, None, budget, tmp_path)
    assert found is not None and found.name == chosen


def test_without_room_on_the_disk_there_is_none_and_the_log_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = small_backbone().eval()
    known = cuts(backbone, torch.rand(1, 3, 16, 16))
    assert cheapest_enough(known, backbone, 16, None, PLENTY, tmp_path)
    monkeypatch.setattr(tested.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    assert cheapest_enough(known, backbone, 16, None, PLENTY, tmp_path) is None
    assert caplog.messages[-1].endswith("is 5e-08 GB; free some space, or raise the limit")


def test_a_name_that_is_no_cut_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"no layer at which the network can be cut.*did you mean layer3_1_relu_1"):
        tested.named_cut([cut("layer3_1_relu_1", 4)], "layer3_1_relu", PLENTY)
