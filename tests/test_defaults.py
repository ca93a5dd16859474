"""Each key has its default twice, in conf/ and in a dataclass: the two agree, for all verbs and groups."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from image_classifier.cli.main import VERBS
from image_classifier.paths import CONF_DIR, PACKAGE_DIR


class Call(NamedTuple):
    """Where settings are built: the module, the class, the key, and the name of what fills values that are null."""

    module: str
    cls: str
    key: str
    fallback: str

    def __str__(self) -> str:
        return f"{self.cls} in {self.module.rpartition('.')[2]}"


def _calls() -> Iterator[Call]:
    """Yield each `typed(CLASS, node, "key")` and `selected(CLASS, node)` of the package, also with `.or_else(NAME)`."""
    for path in sorted(PACKAGE_DIR.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        module = ".".join(path.relative_to(PACKAGE_DIR.parent).with_suffix("").parts)
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        fallbacks = {
            call.func.value: getattr(call.args[0], "id", "")
            for call in calls
            if isinstance(call.func, ast.Attribute) and call.func.attr == "or_else"
        }
        for call in calls:
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if name in ("typed", "selected") and len(call.args) >= 2:
                cls, key = call.args[0], [*call.args[2:], ast.Constant("")][0]
                if isinstance(cls, ast.Name) and isinstance(key, ast.Constant):
                    yield Call(module, cls.id, str(key.value), fallbacks.get(call, ""))


CALLS = sorted(set(_calls()))


@cache
def _composed(root: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(root)


def _nodes(call: Call, cls: type) -> dict[str, Any]:
    """Return the nodes of conf/ that the dataclass must agree with, each under the name of its file."""
    for name in ("base", "default"):
        file = CONF_DIR / call.key / f"{name}.yaml"
        if call.key and file.is_file():
            return {f"conf/{call.key}/{name}.yaml": OmegaConf.load(file)}
    nodes = {}
    verb = call.module.rpartition(".")[2]
    fields = {field.name for field in dataclasses.fields(cls)}
    for root in [verb] if verb in VERBS else VERBS:
        config = _composed(root)
        node = OmegaConf.select(config, call.key) if call.key else config
        # A class that several verbs share is for those that have all its keys.
        has_all = verb in VERBS or bool(call.key) or fields <= set(config)
        if isinstance(node, DictConfig) and has_all:
            nodes[f"conf/{root}.yaml"] = node
    return nodes


def _differences(cls: type, node: Mapping[str, Any], path: str, fallback: Any) -> Iterator[str]:
    """Yield each key whose two defaults differ, and each field that is no key."""
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = f"{path}{field.name}"
        kind = types[field.name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = node.get(field.name)
        if default is None and value is not None:
            default = getattr(fallback, field.name, None)
        if field.name not in node:
            if kind is not Any:  # a node with a _target_, which each choice of the group brings
                yield f"{name} is a field of {cls.__name__} and no key"
        elif dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            yield from _differences(typing.cast(type, kind), value, f"{name}.", None)
        elif isinstance(value, str) and ("${" in value or value == "???"):
            continue
        elif default is not dataclasses.MISSING and _plain(default) != _plain(value):
            yield f"{name}: {value!r} in conf/, {default!r} in {cls.__name__}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_defaults_of_conf_are_those_of_the_dataclass(call: Call) -> None:
    module = importlib.import_module(call.module)
    cls = getattr(module, call.cls, None)
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        pytest.skip("the class is a variable here")
    nodes = _nodes(call, cls)
    assert nodes, f"conf/ has no {call.key!r}"
    for file, node in nodes.items():
        plain = OmegaConf.to_container(node, resolve=False)
        assert isinstance(plain, dict)
        fallback = getattr(module, call.fallback, None) if call.fallback else None
        assert [f"{file}: {line}" for line in _differences(cls, plain, "", fallback)] == []


def test_the_settings_of_all_verbs_are_found() -> None:
    keys = {call.key for call in CALLS}
    assert len(CALLS) >= 20 and {"", "data", "audit", "decision", "diagnostics", "suspects", "tune"} <= keys
