"""A backbone cut in two at a layer: what is computed once and kept, and what is trained from there on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from image_classifier.training.transfer.fuse_norms import fuse_norms

_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Cut:
    """A place where one value is all that the rest of a backbone needs.

    Attributes:
        name: Of the value, as torch.fx names it.
        shape: Of one image's value, without the batch.
        lower: Names of the backbone's parameters below it.
        numbers: In the value of one image.
    """

    name: str
    shape: tuple[int, ...]
    lower: tuple[str, ...]

    @property
    def numbers(self) -> int:
        """How many numbers are kept for an image."""
        return int(torch.Size(self.shape).numel())


def cuts(backbone: nn.Module, pixels: torch.Tensor) -> list[Cut]:
    """Return the places where a backbone can be cut, from the first layer on; none where it cannot be traced.

    Args:
        backbone: Pixels float [N, 3, S, S] to embeddings.
        pixels: An example.
    """
    graph = traced(backbone, training=False)
    if graph is None:
        return []
    with torch.no_grad():
        shapes = _Shapes(graph)
        shapes.run(pixels)
    names = dict(backbone.named_parameters())
    found: list[Cut] = []
    lower: list[str] = []
    for node in graph.graph.nodes:
        if node.op == "call_module":
            lower += [name for name in names if name.startswith(f"{node.target}.") and name not in lower]
        if node.op == "get_attr" and node.target in names:
            lower.append(str(node.target))
        shape = shapes.found.get(node.name)
        if shape and lower and _is_cut(node, graph.graph) and len(lower) < len(names):
            cut = Cut(node.name, shape[1:], tuple(lower))
            # Of several places with the same layers below, the last one: it has the activation function behind it.
            if found and found[-1].lower == cut.lower:
                found.pop()
            found.append(cut)
    return found


def split(backbone: nn.Module, cut: Cut) -> tuple[nn.Module, nn.Module]:
    """Return the backbone below a cut, traced for evaluation, and above it, traced for training.

    Both share the backbone's own layers, convolutions fused with their normalisation.
    """
    lower, upper = traced(backbone, training=False), traced(backbone, training=True)
    if lower is None or upper is None:
        raise ValueError("this backbone cannot be cut")
    return fuse_norms(_below(lower, cut.name)), fuse_norms(_above(upper, cut.name))


def is_exact(backbone: nn.Module, lower: nn.Module, upper: nn.Module, pixels: torch.Tensor) -> bool:
    """Return whether both halves give what the whole backbone gives, in evaluation mode."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            expected, found = backbone(pixels), upper(lower(pixels))
        return expected.shape == found.shape and bool(torch.allclose(expected, found, atol=_TOLERANCE, rtol=_TOLERANCE))
    except Exception:  # a graph that does not run is no split
        return False
    finally:
        for module, mode in modes:
            module.training = mode


def traced(backbone: nn.Module, training: bool) -> fx.GraphModule | None:
    """Return a backbone as a graph that shares its layers; None where torch.fx cannot trace it."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.train(training)
    try:
        graph = _Tracer().trace(backbone)
        return fx.GraphModule(backbone, graph)
    except Exception:  # tracing runs the network's own code on stand-ins, which raises anything
        return None
    finally:
        for module, mode in modes:
            module.training = mode


class _Tracer(fx.Tracer):
    """A tracer that keeps every layer whose behaviour depends on its mode as one call, so that the mode stays alive."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_norm = isinstance(m, nn.modules.batchnorm._BatchNorm)
        return is_norm or not list(m.children()) or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of each tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1:
            self.found[n.name] = tuple(value.shape)
        return value


def _is_cut(node: fx.Node, graph: fx.Graph) -> bool:
    """Return whether no value from before this node, except its own, is used after it."""
    nodes = list(graph.nodes)
    place = {one: at for at, one in enumerate(nodes)}
    at = place[node]
    earlier = (one for one in nodes[:at] if one.op != "get_attr")
    return all(place[user] <= at for one in earlier for user in one.users)


def _below(module: fx.GraphModule, name: str) -> fx.GraphModule:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        values[node] = graph.node_copy(node, lambda one: values[one])
        if node.name == name:
            graph.output(values[node])
            break
    return fx.GraphModule(module, graph)


def _above(module: fx.GraphModule, name: str) -> fx.GraphModule:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    nodes = list(module.graph.nodes)
    at = next(place for place, node in enumerate(nodes) if node.name == name)
    values[nodes[at]] = graph.placeholder("activations")
    above = set(nodes[at + 1 :])
    for node in nodes[:at]:
        if node.op == "get_attr" and above & set(node.users):  # a parameter of the network itself, used above too
            values[node] = graph.node_copy(node)
    for node in nodes[at + 1 :]:
        values[node] = graph.node_copy(node, lambda one: values[one])
    return fx.GraphModule(module, graph)
