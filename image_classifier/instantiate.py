"""Objects from configuration nodes: `_target_` checked against an allow-list, arguments against the signature."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from image_classifier.errors import ClassifierError, ConfigError
from image_classifier.extras import EXTRA_OF, install_package
from image_classifier.mappings import literal_values
from image_classifier.text import did_you_mean

_LIGHTNING = ("callbacks.", "loggers.", "plugins.", "profilers.", "strategies.")

# A name that ends with a dot allows all below it; without a dot it allows only itself.
TRUSTED = (
    "torch.nn.",
    "torch.optim.",
    "torchvision.models.",
    "torchvision.transforms.",
    "torchvision.datasets.",
    "timm.create_model",
    "timm.optim.",
    "timm.scheduler.",
    "timm.loss.",
    *(
        f"{lightning}.{part}"
        for lightning in ("pytorch_lightning", "lightning.pytorch")
        for part in ("Trainer", *_LIGHTNING)
    ),
    "torchmetrics.",
    "image_classifier.dataset.sources.",
    "image_classifier.modeling.",
    "image_classifier.training.augment.",
    "image_classifier.training.callbacks.",
    "image_classifier.training.loggers.",
    "image_classifier.training.sharding.",
    "image_classifier.training.optimizers.",
)
# The networks that a checkpoint may name: a file of unknown origin must not build anything else.
NETWORKS = (
    "timm.create_model",
    "image_classifier.modeling.backbones.torchvision_backbone",
    "image_classifier.modeling.convnet.ConvNet",
    "image_classifier.modeling.convnet.MLP",
    "image_classifier.modeling.whitened.WhitenedNet",
)
# Classes that moved or were renamed, old dotted path to new: configurations, run folders, bundles and checkpoints that
# were saved before name the old one.
ALIASES = {
    f"image_classifier.{old}": f"image_classifier.{new}"
    for old, new in {
        "modeling.features.EmbeddingStore": "modeling.embeddings.EmbeddingStore",
        "modeling.held.Held": "modeling.attribution_rules.DetachedAttention",
        "training.augment.mix.Mix": "training.augment.mixup_cutmix.Mix",
        "training.augment.operations.Draw": "training.augment.rand_augment.Draw",
        "training.augment.operations.RandomOperations": "training.augment.rand_augment.RandomOperations",
        "training.callbacks.bad_loss.BadLoss": "training.callbacks.nan_guard.NanGuard",
        "training.callbacks.compiling.Compiling": "training.callbacks.torch_compile.TorchCompile",
        "training.callbacks.history.RunHistory": "training.callbacks.csv_metrics.CSVMetrics",
        "training.callbacks.rehearsing.Stopwatch": "training.callbacks.lr_sweep.StepTimer",
        "training.callbacks.rehearsing.Sweep": "training.callbacks.lr_sweep.LearningRateSweep",
        "training.callbacks.signals.Signals": "training.callbacks.preemption.SignalHandler",
        "training.callbacks.signals.StopOnSignal": "training.callbacks.preemption.StopOnSignal",
        "training.callbacks.state.ExactState": "training.callbacks.exact_resume.ExactResume",
        "training.callbacks.tuner.ReportToTuner": "training.callbacks.optuna_pruning.OptunaPruning",
        "training.optimizers.schedules.Moves": "training.optimizers.schedules.OptimizerAndSchedule",
    }.items()
}
_HOMES = (
    "timm.models.",
    "image_classifier.modeling.",
    "pytorch_lightning.trainer.",
    "lightning.pytorch.trainer.",
    "torch._C.",
)  # where names without a dot at the end live
_FOREIGN = tuple(entry for entry in TRUSTED if not entry.startswith("image_classifier."))
_KEPT = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")


def check_targets(node: Any, trusted: Iterable[str] = (), known: tuple[str, ...] = TRUSTED) -> None:
    """Check that each `_target_` of a tree is on the allow-list `known` or in one of the user's `trusted` packages.

    Raises:
        ConfigError: Names the key and the target, and says how to allow it.
    """
    allowed = _allowed(trusted, known)
    for key, target, _ in _targets(node):
        if not _is_trusted(target, allowed):
            package = target.partition(".")[0]
            hint = f"if you trust that package, write 'trusted_packages=[{package}]'"
            raise ConfigError(
                f"{_join(key, '_target_')} names {target}, which is not on the list of what a configuration may build",
                hint,
            )


def instantiate(
    node: Any, *args: Any, trusted: Iterable[str] = (), known: tuple[str, ...] = TRUSTED, key: str = "", **kwargs: Any
) -> Any:
    """Build the object a node describes, after `check_targets`; None for no node and for `_target_: null`.

    Args:
        node: A mapping with `_target_`, plain (its values are taken to the letter) or of OmegaConf.
        args: Positional arguments for the target.
        trusted: The user's own packages that a `_target_` may name.
        known: The allow-list.
        key: The dotted key of a plain mapping in the configuration, for messages.
        kwargs: Arguments that replace or add to those of the node.

    Raises:
        ConfigError: An untrusted target, a package that is missing, an argument the target does not take or refuses.
    """
    if node is None or (hasattr(node, "get") and "_target_" in node and node.get("_target_") is None):
        return None
    if isinstance(node, Mapping) and not OmegaConf.is_config(node):
        node = _at_key(node, key)
    node = _with_new_names(node)
    allowed = _allowed(trusted, known)
    check_targets(node, trusted, known)
    for key, target, given in _targets(node):
        _check_arguments(key, target, given, _located(key, target, allowed))
    try:
        return hydra.utils.instantiate(node, *args, **kwargs)
    except InstantiationException as error:
        raise _explained(error, node) from error.__cause__


def _at_key(node: Mapping[str, Any], key: str) -> Any:
    """Return a plain node as OmegaConf holds it at this key, so that errors name the key; no text is interpolated."""
    names = key.split(".") if key else []
    config: Any = literal_values(dict(node))
    for name in reversed(names):
        config = {name: config}
    config = OmegaConf.create(config)
    for name in names:
        config = config[name]
    return config


def _with_new_names(node: Any) -> Any:
    """Return the node, resolved and with new dotted paths where it names classes by old ones."""
    if not isinstance(node, DictConfig):
        return node
    plain = _plain(node)
    renamed = _renamed(plain)
    return node if renamed == plain else _at_key(renamed, str(node._get_full_key(None) or ""))


def _renamed(plain: Any) -> Any:
    if isinstance(plain, dict):
        node = {name: _renamed(value) for name, value in plain.items()}
        target = node.get("_target_")
        return node | {"_target_": ALIASES[target]} if isinstance(target, str) and target in ALIASES else node
    return [_renamed(value) for value in plain] if isinstance(plain, (list, tuple)) else plain


def _allowed(trusted: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    return (*known, *(f"{package.rstrip('.')}." for package in trusted))


def _is_trusted(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name.startswith(entry) if entry.endswith(".") else name == entry for entry in allowed)


def _targets(node: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each node of the tree that has a `_target_`: its key, the target by its new name, and the plain node."""
    key = str(node._get_full_key(None) or "") if isinstance(node, DictConfig) else ""
    yield from _walk(_plain(node), key)


def _plain(node: Any) -> Any:
    """Return a node of OmegaConf as plain containers with its interpolations resolved."""
    try:
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot resolve {error.full_key}", str(error).partition("\n")[0]) from error


def _walk(plain: Any, key: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if isinstance(plain, dict):
        if plain.get("_target_") is not None:
            target = str(plain["_target_"])
            yield key, ALIASES.get(target, target), plain
        for name, value in plain.items():
            yield from _walk(value, _join(key, str(name)))
    elif isinstance(plain, (list, tuple)):
        for position, value in enumerate(plain):
            yield from _walk(value, f"{key}[{position}]")


def _located(key: str, target: str, allowed: tuple[str, ...]) -> Callable[..., Any]:
    """Import the target and check that the object it leads to is trusted too: torch.nn.init.torch.load is not."""
    try:
        found = _import(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise _import_failed(key, target, error) from error
    home = f"{getattr(found, '__module__', None) or target}."
    homes = (*(entry for entry in allowed if entry.endswith(".")), *_HOMES)
    if not callable(found) or not home.startswith(homes):
        raise ConfigError(
            f"{_join(key, '_target_')} names {target}, which belongs to {home.rstrip('.')} and is not allowed"
        )
    return found  # type: ignore[no-any-return]


def _import(target: str) -> Any:
    """Return the object that a dotted name leads to; unlike Hydra's own function it logs nothing."""
    first, *parts = target.split(".")
    found: Any = importlib.import_module(first)
    path = first
    for part in parts:
        path = f"{path}.{part}"
        found = (
            getattr(found, part)
            if hasattr(found, part) or not inspect.ismodule(found)
            else importlib.import_module(path)
        )
    return found


def _import_failed(key: str, target: str, error: Exception) -> ConfigError:
    missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    fact = f"{_join(key, '_target_')}: cannot import {target}"
    if missing and (missing == target.partition(".")[0] or not target.startswith(missing)):
        package = missing.partition(".")[0]
        return ConfigError(fact, f"the package {package} is not installed: {install_package(package)}")
    parent, _, name = target.rpartition(".")
    return ConfigError(fact, f"{did_you_mean(name, _names(parent))}there is no {name} in {parent}")


def _names(module: str) -> list[str]:
    try:
        return [name for name in dir(_import(module)) if not name.startswith("_")]
    except Exception:  # nothing to suggest for a name that cannot be imported
        return []


def _check_arguments(key: str, target: str, given: dict[str, Any], found: Callable[..., Any]) -> None:
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # built into C
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    names = [parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY]
    for name in given:
        if name not in names and name not in _KEPT:
            raise _unknown_argument(key, target, name, names)


def _unknown_argument(key: str, target: str, name: str, names: Iterable[str]) -> ConfigError:
    return ConfigError(f"{_join(key, name)}: {target} takes no argument {name!r}", did_you_mean(name, names).strip())


def _explained(error: InstantiationException, node: Any) -> Exception:
    """Return the error of the target: a wrong value for a foreign class becomes one line, the rest stay as they are."""
    cause = error.__cause__
    where = re.search(r"full_key: (\S+)", str(error))
    key = where.group(1) if where else ""
    if not isinstance(cause, Exception):
        return ConfigError(f"cannot build {key or 'the object'}", str(error).partition("\n")[0])
    target, given = next(((target, given) for name, target, given in _targets(node) if name == key), ("", {}))
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
    if unexpected and unexpected.group(1) in given:
        return _unknown_argument(key, target, unexpected.group(1), ())
    if isinstance(cause, ModuleNotFoundError):
        return ConfigError(f"cannot build {key} ({target})", _missing(cause))
    lightning = type(cause).__name__ == "MisconfigurationException"  # Lightning's exception for a wrong setting
    foreign = isinstance(cause, (TypeError, ValueError, RuntimeError)) and _is_trusted(target, _FOREIGN)
    if isinstance(cause, ClassifierError) or not (lightning or foreign):
        return cause
    return ConfigError(f"{key}: {target} refuses its arguments", str(cause))


def _missing(error: ModuleNotFoundError) -> str:
    """Return what to install; Lightning names a missing package only in its text."""
    known = (word for word in re.findall(r"\w+", str(error)) if word in EXTRA_OF)
    package = error.name or next(known, "")
    return f"the package {package} is not installed: {install_package(package)}" if package else str(error)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
