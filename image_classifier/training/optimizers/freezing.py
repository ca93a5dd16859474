"""Freezing: parameters that do not learn, and their modules kept in evaluation mode so that norm statistics and dropout rest too."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from image_classifier.errors import ConfigError
from image_classifier.text import did_you_mean


def freeze(classifier: nn.Module, wanted: str | Sequence[str] | None) -> frozenset[str]:
    """Stop the parameters under some prefixes from learning; returns their names.

    Args:
        classifier: A network with a `backbone`.
        wanted: `backbone` (linear probing), or prefixes of parameter names, whole between dots, with or without `backbone.` in front; None: nothing.

    Raises:
        ConfigError: A prefix that no parameter has.
    """
    prefixes = [wanted] if isinstance(wanted, str) else list(wanted or ())
    frozen: set[str] = set()
    for prefix in prefixes:
        frozen |= _named(classifier, str(prefix))
    set_frozen(classifier, frozen)
    return frozenset(frozen)


def set_frozen(classifier: nn.Module, frozen: Collection[str]) -> None:
    """Stop these parameters; gradients of before must not move them."""
    for name, parameter in classifier.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None


def freeze_norm_stats(classifier: nn.Module, frozen: Collection[str]) -> None:
    """Evaluation mode for every module all of whose parameters are frozen."""
    for prefix, module in classifier.named_modules():
        names = [f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()]
        if names and all(name in frozen for name in names):
            module.eval()


def describe(classifier: nn.Module, frozen: Collection[str]) -> str:
    """How many parameters the network has and how many of them learn, as a line of the log."""
    total = sum(parameter.numel() for parameter in classifier.parameters())
    learning = sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad)
    note = f" ({len(frozen)} tensors are frozen by model.freeze, their modules in evaluation mode)" if frozen else ""
    return f"parameters: {learning:,} of {total:,} learn{note}"


def _named(classifier: nn.Module, prefix: str) -> set[str]:
    names = [name for name, _ in classifier.named_parameters()]
    for full in (prefix, f"backbone.{prefix}"):
        found = {name for name in names if name == full or name.startswith(f"{full}.")}
        if found:
            return found
    known = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
    known |= {name.removeprefix("backbone.") for name in known}
    raise ConfigError(
        f"model.freeze: no parameter of the network begins with {prefix!r}",
        did_you_mean(prefix, sorted(known)).strip()
        or f"give backbone, or prefixes such as {sorted(known - {'backbone', 'head'})[0]}",
    )
