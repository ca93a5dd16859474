"""Freezing: parameters that are not trained, and their modules in evaluation mode: no norm statistics, no dropout."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from image_classifier.errors import ConfigError
from image_classifier.text import did_you_mean


def freeze(classifier: nn.Module, wanted: str | Sequence[str] | None) -> frozenset[str]:
    """Freeze the parameters under some prefixes; return their names.

    Args:
        classifier: A network with a `backbone`.
        wanted: `backbone` (linear probing), or prefixes of parameter names that end at a dot, with or without
            `backbone.` in front; None: nothing.

    Raises:
        ConfigError: No parameter has a prefix.

    >>> network = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    >>> sorted(freeze(network, "backbone"))
    ['backbone.bias', 'backbone.weight']
    """
    prefixes = [wanted] if isinstance(wanted, str) else list(wanted or ())
    frozen: set[str] = set()
    for prefix in prefixes:
        frozen |= _named(classifier, str(prefix))
    set_frozen(classifier, frozen)
    return frozenset(frozen)


def set_frozen(classifier: nn.Module, frozen: Collection[str]) -> None:
    """Freeze these parameters, and drop their gradients, which would still move them."""
    for name, parameter in classifier.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None


def freeze_norm_stats(classifier: nn.Module, frozen: Collection[str]) -> None:
    """Put every module whose parameters are all frozen into evaluation mode."""
    for prefix, module in classifier.named_modules():
        names = [f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()]
        if names and all(name in frozen for name in names):
            module.eval()


def freeze_batch_norm(network: nn.Module) -> None:
    """Put every batch normalisation into evaluation mode: mean and variance stay, scale and shift are trained."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def describe(classifier: nn.Module, frozen: Collection[str]) -> str:
    """Return a line of the log: the number of parameters, and how many are trained.

    >>> describe(nn.Linear(9, 1), frozenset())
    '10 parameters, all trained'
    """
    total = sum(parameter.numel() for parameter in classifier.parameters())
    trained = sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad)
    note = f" ({len(frozen)} tensors are frozen by model.freeze, their modules in evaluation mode)" if frozen else ""
    return f"{total:,} parameters, {'all' if trained == total else f'{trained:,}'} trained{note}"


def _named(classifier: nn.Module, prefix: str) -> set[str]:
    names = [name for name, _ in classifier.named_parameters()]
    for full in (prefix, f"backbone.{prefix}"):
        matching = {name for name in names if name == full or name.startswith(f"{full}.")}
        if matching:
            return matching
    known = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
    known |= {name.removeprefix("backbone.") for name in known}
    raise ConfigError(
        f"model.freeze: no parameter of the network starts with {prefix!r}",
        did_you_mean(prefix, sorted(known)).strip()
        or f"use backbone, or prefixes such as {sorted(known - {'backbone', 'head'})[0]}",
    )
