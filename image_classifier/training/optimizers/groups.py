"""Parameter groups: what is decayed, how fast each layer learns, and what kind each parameter is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from image_classifier.errors import ConfigError

# A group's "kind" says how its parameters enter the network:
#   matrix  hidden linear layers and convolutions     stem    the first of them, which sees pixels
#   head    the last ones with their biases, necks    vector  norms, other biases, embeddings of positions and tokens
#   other   what is decayed and is no matrix: kernels of grouped convolutions, weights of unknown layers
KINDS = (
    "matrix",
    "head",
    "stem",
    "other",
    "vector",
)  # the order of the groups: the first one's learning rate is the one that is logged

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
_EMBEDDING = re.compile(
    r"(^|_)(pos|position|token|embed|embedding|bias|gamma|scale|temperature)($|_)|_token$|pos_embed"
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class _Described:
    parameter: nn.Parameter
    kind: str
    depth: int

    @property
    def decays(self) -> bool:
        return self.kind != "vector" and not (self.kind == "head" and self.parameter.ndim <= 1)


def parameter_groups(
    classifier: nn.Module, criterion: nn.Module | None = None, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """The trainable parameters by kind and depth, as torch's optimizers take them.

    Weight decay is kept off "vector" and the head's biases (He et al., 2019, section 3.1). With `layer_decay` below 1 each layer below the head
    learns slower by that factor than the one above (Clark et al., 2020, ELECTRA, appendix A): its group has an "lr_scale", which whoever builds the
    optimizer multiplies into the group's lr. The group first in the list is one with the full learning rate.

    Args:
        classifier: A network with a `backbone` and a `head`.
        criterion: The loss; its parameters, if it has any, are a neck and count as head.
        layer_decay: Factor of the learning rate from layer to layer, above 0 to 1.

    Raises:
        ConfigError: An impossible `layer_decay`, or nothing to train.
    """
    if not 0 < layer_decay <= 1:
        raise ConfigError(
            f"optimizer.layer_decay={layer_decay} is impossible",
            "use a factor above 0 to 1, such as 0.75; 1 turns it off",
        )
    found = list(_described(classifier, criterion))
    if not found:
        raise ConfigError("no parameter of the network is trained", "freeze less with model.freeze=")
    top = max(one.depth for one in found)
    groups: dict[tuple[float, int, bool], dict[str, Any]] = {}
    for one in found:
        scale = layer_decay ** (top - one.depth)
        group = groups.setdefault((-scale, KINDS.index(one.kind), not one.decays), {"params": [], "kind": one.kind})
        group["params"].append(one.parameter)
        if not one.decays:
            group["weight_decay"] = 0.0
        if scale < 1:
            group["lr_scale"] = scale
    return [groups[key] for key in sorted(groups)]


def layers(backbone: Any) -> list[list[str]]:
    """The names of a backbone's parameters, layer by layer from the stem on.

    As timm groups them where it does (`group_matcher`); else by the order of the modules, where containers, and a module that holds nine tenths
    of all parameters, are looked into: their children are layers of their own. Norms belong to the layer before them, and parameters that lie
    beside the layers (position embeddings, class tokens) to the first.
    """
    if hasattr(backbone, "group_matcher"):
        from timm.models import group_parameters

        grouped = group_parameters(backbone, backbone.group_matcher(coarse=False))
        return [grouped[number] for number in sorted(grouped)]
    loose: list[str] = []
    found: list[list[str]] = []
    for prefix, module, is_layer in _parts(backbone, "", 0.9 * _size(backbone)):
        names = [f"{prefix}{name}" for name, _ in module.named_parameters(recurse=is_layer)]
        if not is_layer:
            loose += names
        elif found and all(parameter.ndim <= 1 for parameter in module.parameters()):
            found[-1] += names
        elif names:
            found.append(names)
    return [loose + found[0], *found[1:]] if found else [loose]


def _parts(module: nn.Module, prefix: str, trunk: float) -> Iterator[tuple[str, nn.Module, bool]]:
    """The layers of a module in order, and the modules looked into: prefix of the parameters' names, module, whether it is a layer."""
    yield prefix, module, False
    for name, child in module.named_children():
        if type(child) in _CONTAINERS or (_size(child) > trunk and any(True for _ in child.children())):
            yield from _parts(child, f"{prefix}{name}.", trunk)
        else:
            yield f"{prefix}{name}.", child, True


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _described(classifier: nn.Module, criterion: nn.Module | None) -> Iterator[_Described]:
    backbone, head = classifier.get_submodule("backbone"), classifier.get_submodule("head")
    depths = {name: depth for depth, names in enumerate(layers(backbone)) for name in names}
    top = max(depths.values(), default=-1) + 1
    kinds = _kinds(backbone)
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            yield _Described(parameter, kinds[name], depths.get(name, 0))
    seen = {id(parameter) for parameter in backbone.parameters()}
    for module in (head, criterion) if criterion is not None else (head,):
        for parameter in module.parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield _Described(parameter, "head", top)


def _kinds(backbone: Any) -> Mapping[str, str]:
    undecayed = set(backbone.no_weight_decay()) if hasattr(backbone, "no_weight_decay") else set()
    kinds: dict[str, str] = {}
    stem: str | None = None
    for name, parameter in backbone.named_parameters():
        parent, _, leaf = name.rpartition(".")
        owner = backbone.get_submodule(parent)
        if parameter.ndim > 1 and isinstance(owner, _LAYERS) and name not in undecayed:
            stem = stem or name
            kinds[name] = "stem" if name == stem else "other" if getattr(owner, "groups", 1) > 1 else "matrix"
        else:
            flat = sum(size > 1 for size in parameter.shape) <= 1
            kinds[name] = "vector" if flat or name in undecayed or _EMBEDDING.search(leaf) else "other"
    return kinds
