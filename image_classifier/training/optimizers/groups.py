"""Parameter groups: weight decay, learning rate by layer, and the kind of each parameter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from image_classifier.errors import ConfigError

# A group's "kind" says where its parameters are in the network:
#   matrix  hidden linear layers and convolutions     stem    the first of them, which takes pixels
#   head    the last ones with their biases, necks    vector  norms, other biases, embeddings of positions and tokens
#   other   parameters with weight decay that are not matrices: kernels of grouped convolutions, unknown layers
# The order of the groups: the learning rate of the first one is logged.
KINDS = ("matrix", "head", "stem", "other", "vector")

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
_EMBEDDING = re.compile(
    r"(^|_)(pos|position|token|embed|embedding|bias|gamma|scale|temperature)($|_)|_token$|pos_embed"
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class _Described:
    """A trainable parameter: its kind, and the number of its layer from the stem on."""

    parameter: nn.Parameter
    kind: str
    depth: int

    @property
    def decays(self) -> bool:
        return self.kind != "vector" and not (self.kind == "head" and self.parameter.ndim <= 1)


def parameter_groups(
    classifier: nn.Module, criterion: nn.Module | None = None, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Return the trainable parameters by kind and depth, as torch's optimizers take them.

    "vector" and the head's biases have no weight decay (He et al., 2019, section 3.1). With `layer_decay` below 1 each
    layer below the head is trained more slowly by that factor than the one above (ELECTRA, Clark et al., 2020, appendix
    A): its group has an "lr_scale", which `build_optimizer` multiplies into the group's lr. The first group of the list
    has the full learning rate.

    Args:
        classifier: A network with a `backbone` and a `head`.
        criterion: The loss; its parameters, if it has any, are a neck and count as head.
        layer_decay: Factor of the learning rate from layer to layer, above 0 to 1.

    Raises:
        ConfigError: `layer_decay` is not from above 0 to 1, or nothing is trained.
    """
    if not 0 < layer_decay <= 1:
        raise ConfigError(
            f"invalid optimizer.layer_decay={layer_decay}",
            "use a factor above 0 and at most 1, such as 0.75; 1 turns it off",
        )
    described = list(_described(classifier, criterion))
    if not described:
        raise ConfigError("no parameter of the network is trained", "freeze less with model.freeze=")
    top = max(one.depth for one in described)
    groups: dict[tuple[float, int, bool], dict[str, Any]] = {}
    # Sorted by: learning rate (largest first), kind, decayed first.
    for one in described:
        scale = layer_decay ** (top - one.depth)
        group = groups.setdefault((-scale, KINDS.index(one.kind), not one.decays), {"params": [], "kind": one.kind})
        group["params"].append(one.parameter)
        if not one.decays:
            group["weight_decay"] = 0.0
        if scale < 1:
            group["lr_scale"] = scale
    return [groups[key] for key in sorted(groups)]


def layers(backbone: Any) -> list[list[str]]:
    """Return the names of a backbone's parameters, layer by layer from the stem on.

    Layers are those of timm's `group_matcher` where the backbone has one. Else they follow the order of the modules:
    the children of containers, and of a module with nine tenths of all parameters, are layers of their own. Norms
    belong to the layer before them, and parameters outside of the layers (position embeddings, class tokens) to the
    first.

    >>> layers(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1)))
    [['0.weight', '0.bias', '1.weight', '1.bias'], ['2.weight', '2.bias']]
    """
    if hasattr(backbone, "group_matcher"):
        from timm.models import group_parameters

        grouped = group_parameters(backbone, backbone.group_matcher(coarse=False))
        return [grouped[number] for number in sorted(grouped)]
    loose: list[str] = []
    grouped_names: list[list[str]] = []
    for prefix, module, is_layer in _parts(backbone, "", 0.9 * _size(backbone)):
        names = [f"{prefix}{name}" for name, _ in module.named_parameters(recurse=is_layer)]
        if not is_layer:
            loose += names
        elif grouped_names and all(parameter.ndim <= 1 for parameter in module.parameters()):
            grouped_names[-1] += names
        elif names:
            grouped_names.append(names)
    return [loose + grouped_names[0], *grouped_names[1:]] if grouped_names else [loose]


def _parts(module: nn.Module, prefix: str, trunk: float) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield a module's layers in order, and the containers around them.

    Each is the prefix of its parameters' names, the module, and whether it is a layer.
    """
    yield prefix, module, False
    for name, child in module.named_children():
        if type(child) in _CONTAINERS or (_size(child) > trunk and any(True for _ in child.children())):
            yield from _parts(child, f"{prefix}{name}.", trunk)
        else:
            yield f"{prefix}{name}.", child, True


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _described(classifier: nn.Module, criterion: nn.Module | None) -> Iterator[_Described]:
    backbone = classifier.get_submodule("backbone")
    head = classifier.get_submodule("head")
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
    """Return the kind of each parameter by name."""
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
            is_vector = sum(size > 1 for size in parameter.shape) <= 1
            kinds[name] = "vector" if is_vector or name in undecayed or _EMBEDDING.search(leaf) else "other"
    return kinds
