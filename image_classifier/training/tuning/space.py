"""Search space of a study, from conf/search: checked, and its values as overrides of the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from image_classifier.errors import ConfigError
from image_classifier.override_grammar import quoted
from image_classifier.text import did_you_mean

KINDS = ("float", "int", "categorical")
_NUMBER_FIELDS = ("low", "high", "log", "step")
_CHOICE_FIELDS = ("choices",)
_HOW_TO_WRITE = "write {kind: float, low: 1e-4, high: 1e-1, log: true} or {kind: categorical, choices: [a, b]}"
# Set by `tune` for each trial, or the same for all of a study.
_NOT_SEARCHABLE = ("name", "overwrite", "resume", "run_dir", "runs_dir", "models_dir", "plots_dir", "trusted_packages")


@dataclass(frozen=True)
class SearchDimension:
    """One key of the configuration and the values to try: a range of numbers, or choices.

    Args:
        key: The key, such as optimizer.lr, or a group, such as model.
        kind: float, int or categorical.
        low: The smallest number.
        high: The largest number.
        log: Whether numbers are drawn on a logarithmic scale.
        step: The distance between numbers; None: any number of the range.
        choices: Values as written on a command line.
    """

    key: str
    kind: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.key.partition(".")[0] in _NOT_SEARCHABLE:
            raise ConfigError(f"search.{self.key} is not searchable", "a study sets this key itself for each trial")
        if self.kind == "categorical":
            if len(set(self.choices)) != len(self.choices) or not self.choices:
                raise ConfigError(
                    f"search.{self.key}.choices must be a list of different values", "write such as [a, b]"
                )
        else:
            self._check_range()

    def _check_range(self) -> None:
        for name in ("low", "high", "step"):
            value = getattr(self, name)
            if not (value is None and name == "step") and not self._is_number(value):
                expected = "a whole number" if self.kind == "int" else "a number"
                raise ConfigError(f"search.{self.key}.{name} must be {expected}, not {value!r}")
        if not (self.low or 0) < (self.high or 0):
            raise ConfigError(f"search.{self.key}.low must be below high, and {self.low} is not below {self.high}")
        if self.log and (self.low or 0) <= 0:
            raise ConfigError(f"search.{self.key}.low must be above 0 where log is true, not {self.low}")
        if self.step is not None and (self.log or self.step <= 0):
            raise ConfigError(f"search.{self.key}.step must be above 0, and log must be false")

    def _is_number(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return self.kind != "int" or value == int(value)

    @property
    def distribution(self) -> BaseDistribution:
        """The dimension as Optuna's distribution."""
        if self.kind == "categorical":
            return CategoricalDistribution(self.choices)
        low, high = self.low or 0, self.high or 0
        if self.kind == "int":
            return IntDistribution(int(low), int(high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(float(low), float(high), log=self.log, step=self.step)

    @property
    def extremes(self) -> tuple[str, ...]:
        """Overrides that test whether all values are valid: both ends of the range, or each choice."""
        ends = (
            self.choices
            if self.kind == "categorical"
            else [override_value(_number(value, self.kind)) for value in (self.low, self.high)]
        )
        return tuple(f"{self.key}={end}" for end in ends)

    def override(self, value: Any) -> str:
        """Return a value that Optuna chose as an override.

        >>> SearchDimension("optimizer.lr", "float", 0.1, 1.0).override(0.30000000000000004)
        'optimizer.lr=0.3'
        """
        return f"{self.key}={value if self.kind == 'categorical' else override_value(_number(value, self.kind))}"


def parse_space(node: Mapping[str, Any]) -> tuple[SearchDimension, ...]:
    """Return the dimensions of a resolved `search` node; null leaves one out.

    Raises:
        ConfigError: A dimension is invalid.
    """
    dimensions = tuple(_dimensions(node, ""))
    if not dimensions:
        raise ConfigError("search is empty", _HOW_TO_WRITE)
    return dimensions


def as_plain(space: tuple[SearchDimension, ...]) -> list[dict[str, Any]]:
    """Return the space as plain values, by which two of them are compared."""
    return [{**asdict(dimension), "choices": list(dimension.choices)} for dimension in space]


def _dimensions(node: Mapping[str, Any], prefix: str) -> Iterator[SearchDimension]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"search.{key}={value!r} is not a range or a list of choices", _HOW_TO_WRITE)
        if "kind" in value:
            yield _dimension(key, value)
            yield from _dimensions(
                {name: item for name, item in value.items() if isinstance(item, Mapping)}, f"{key}."
            )  # model and model.head_dropout
        elif set(value) & {*_NUMBER_FIELDS, *_CHOICE_FIELDS} and not any(
            isinstance(item, Mapping) for item in value.values()
        ):
            raise ConfigError(f"search.{key}.kind is missing", f"use one of {', '.join(KINDS)}")
        else:
            yield from _dimensions(value, f"{key}.")


def _dimension(key: str, value: Mapping[str, Any]) -> SearchDimension:
    kind = value["kind"]
    if kind not in KINDS:
        raise ConfigError(
            f"invalid search.{key}.kind={kind}",
            f"{did_you_mean(str(kind), KINDS)}use one of {', '.join(KINDS)}",
        )
    known = _CHOICE_FIELDS if kind == "categorical" else _NUMBER_FIELDS
    given = {name: item for name, item in value.items() if name != "kind" and not isinstance(item, Mapping)}
    for name in given:
        if name not in known:
            hint = did_you_mean(name, [item.name for item in fields(SearchDimension)])
            raise ConfigError(f"search.{key}.{name} is not a key of kind {kind}", f"{hint}use {', '.join(known)}")
    if not isinstance(given.get("log", False), bool):
        raise ConfigError(f"search.{key}.log must be true or false, not {given['log']!r}")
    if "choices" in given:
        given["choices"] = (
            tuple(override_value(item) for item in given["choices"]) if isinstance(given["choices"], list) else ()
        )
    return SearchDimension(key, kind, **given)


def _number(value: Any, kind: str) -> int | float:
    # 0.3, where steps add up to 0.30000000000000004.
    return int(value) if kind == "int" else float(f"{value:.12g}")


def override_value(value: Any) -> str:
    """Return a plain value in Hydra's override grammar, in the shortest form that Hydra reads as the same value.

    >>> override_value({"kind": "a b", "values": [1, None, "true"]})
    "{kind:'a b',values:[1,null,'true']}"
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(override_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{override_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_][\w./-]*", value) and value.lower() not in (
            "true",
            "false",
            "null",
            "nan",
            "inf",
        )
        return value if plain else quoted(value)
    return repr(value)
