"""A convolution fused with the normalisation behind it: the same answers, the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

from image_classifier.training.transfer.fuse_norms import ConvWithNorm, fuse_norms


def pair(bias: bool = False, affine: bool = True, padding_mode: str = "zeros") -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=bias, padding_mode=padding_mode)
    norm = nn.BatchNorm2d(6, affine=affine)
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.3, 2)
    if affine:
        nn.init.uniform_(norm.weight, -1, 1)
        nn.init.uniform_(norm.bias, -1, 1)
    return nn.Sequential(conv, norm)


def fused_graph(network: nn.Module) -> fx.GraphModule:
    return fuse_norms(fx.symbolic_trace(network))


def fused(graph: fx.GraphModule) -> list[str]:
    return [node.target for node in graph.graph.nodes if node.op == "call_module" and "with_norm" in node.target]


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"affine": False}, {"padding_mode": "reflect"}])
def test_answers_and_gradients_are_those_of_the_two_layers(options: dict[str, object]) -> None:
    network = pair(**options).eval()
    other = fused_graph(copy.deepcopy(network))
    assert len(fused(other)) == 1
    images = torch.randn(2, 4, 8, 8, requires_grad=True)
    results = []
    for module in (network, other):
        answer = module(images)
        names = [name for name, _ in network.named_parameters()]
        parameters = [dict(module.named_parameters())[name] for name in names]
        results.append((answer, *torch.autograd.grad(answer.square().sum(), [images, *parameters])))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_learned_goes_to_the_networks_own_layers() -> None:
    network = pair().eval()
    graph = fused_graph(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    images = torch.randn(2, 4, 8, 8)
    before = network(images)
    graph(images).sum().backward()
    optimizer.step()
    assert not torch.allclose(network(images), before)
    torch.testing.assert_close(graph(images), network(images))


def test_normalisation_in_training_mode_still_uses_the_batch_and_moves_its_statistics() -> None:
    network = pair().train()
    graph, images, mean = fused_graph(network).train(), torch.randn(8, 4, 8, 8), network[1].running_mean.clone()
    torch.testing.assert_close(graph(images), copy.deepcopy(network)(images))
    assert not torch.equal(network[1].running_mean, mean)


def test_weights_that_outnumber_the_pixels_are_not_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    network = pair().eval()
    normalise = nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda norm, x: (calls.append(x.shape), normalise(norm, x))[1])
    module = ConvWithNorm(*network)
    module(torch.randn(2, 4, 8, 8))
    assert not calls
    small = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(module(small), network(small))
    assert len(calls) == 2


class Shared(nn.Module):
    """Layers that must not be fused: an output that is used twice, and a convolution that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.twice, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = self.first(images)
        values = values + self.norm(values)
        return self.two(self.twice(self.one(self.twice(values))))


class Subclass(nn.BatchNorm2d):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images).relu()


@pytest.mark.parametrize(
    "network",
    [
        Shared(),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
    ],
)
def test_other_layers_are_left_alone(network: nn.Module) -> None:
    graph = fused_graph(network.eval())
    assert not fused(graph)
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(graph(images), network(images))


def test_a_subclass_of_batch_normalisation_keeps_what_it_adds() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Subclass(3)).eval()
    tracer = fx.Tracer()
    tracer.is_leaf_module = lambda module, name: bool(name)
    graph = fuse_norms(fx.GraphModule(network, tracer.trace(network)))
    assert not fused(graph) and bool((graph(torch.randn(2, 3, 4, 4)) >= 0).all())


def test_in_bfloat16_weights_are_scaled_before_they_are_rounded() -> None:
    network = pair().eval()
    module, images = ConvWithNorm(*network), torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(images)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), network(images), rtol=2e-2, atol=4e-2)
