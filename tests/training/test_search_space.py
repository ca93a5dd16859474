"""Search spaces and settings of `tune` that cannot be are refused in one line before the first trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.cli.hydra_app import parse
from image_classifier.errors import ConfigError
from image_classifier.training.tuning.space import SearchDimension, override_value, parse_space
from image_classifier.training.tuning.study import TuneSettings
from tests.conftest import Command, MakeTree

RANGE = {"kind": "float", "low": 0.0, "high": 1.0}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


numbers = st.floats(min_value=1e-6, max_value=1e6)


@given(numbers, numbers, st.booleans())
def test_a_range_suggests_only_what_lies_in_it(first: float, second: float, log: bool) -> None:
    low, high = sorted((first, second))
    if low == high:
        with pytest.raises(ConfigError, match="must be below high"):
            SearchDimension("optimizer.lr", "float", low, high, log)
        return
    entry = SearchDimension("optimizer.lr", "float", low, high, log)
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(0)).ask({entry.key: entry.distribution})
    key, _, text = entry.override(trial.params[entry.key]).partition("=")
    assert key == "optimizer.lr"
    assert low * (1 - 1e-9) <= float(text) <= high * (1 + 1e-9)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b_c"]), inner, max_size=2),
    max_leaves=5,
)


@given(plain)
def test_a_choice_comes_out_of_the_command_line_as_it_went_in(value: Any) -> None:
    from omegaconf import OmegaConf

    override = parse(f"key={override_value(value)}")
    config = OmegaConf.create({"key": override.value()})
    assert OmegaConf.to_container(config, resolve=True)["key"] == value  # type: ignore[index, call-overload]


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({}, "search is empty"),
        ({"optimizer": {"lr": 0.1}}, "search.optimizer.lr=0.1 is not a range or a list of choices"),
        ({"optimizer": {"lr": {"low": 1, "high": 2}}}, "search.optimizer.lr.kind is missing: use one of float"),
        ({"optimizer": {"lr": {"kind": "floats", "low": 1, "high": 2}}}, "did you mean float"),
        (
            {"optimizer": {"lr": {**RANGE, "hihg": 3}}},
            "search.optimizer.lr.hihg is not a key of kind float: did you mean high",
        ),
        ({"optimizer": {"lr": {**RANGE, "choices": [1]}}}, "choices is not a key of kind float"),
        ({"optimizer": {"lr": {**RANGE, "log": True}}}, "above 0 where log"),
        ({"optimizer": {"lr": {**RANGE, "log": 1}}}, "log must be true or false"),
        ({"optimizer": {"lr": {**RANGE, "low": 2}}}, "must be below high"),
        ({"optimizer": {"lr": {**RANGE, "low": "a"}}}, "low must be a number, not 'a'"),
        ({"optimizer": {"lr": {**RANGE, "high": float("inf")}}}, "high must be a number"),
        ({"optimizer": {"lr": {**RANGE, "step": -0.1}}}, "step must be above 0"),
        ({"trainer": {"max_epochs": {"kind": "int", "low": 1.5, "high": 3}}}, "low must be a whole number"),
        ({"model": {"kind": "categorical", "choices": []}}, "a list of different values"),
        ({"model": {"kind": "categorical", "choices": ["a", "a"]}}, "a list of different values"),
        ({"model": {"kind": "categorical", "choices": "a"}}, "a list of different values"),
        ({"name": {"kind": "categorical", "choices": ["a", "b"]}}, "search.name is not searchable"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_space_that_cannot_be_is_one_line(node: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_space(node)
    assert says in str(refused.value)


def test_entries_may_stand_below_a_group_and_be_left_out() -> None:
    model = {
        "kind": "categorical",
        "choices": ["mlp", [1, 2]],
        "head_dropout": {"kind": "float", "low": 0.0, "high": 0.5, "step": 0.1},
    }
    space = parse_space({"model": model, "optimizer": {"lr": None}})
    assert [entry.key for entry in space] == ["model", "model.head_dropout"]
    assert space[0].extremes == ("model=mlp", "model=[1,2]")
    assert space[1].override(0.30000000000000004) == "model.head_dropout=0.3"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("search.optimizer.lrr={kind: float, low: 0.1, high: 1}",), "did you mean optimizer.lr"),
        (("search.augment.choices=[light,defaults]",), "did you mean default"),
        (
            (
                "search=none",
                "search.data.image_size={kind: int, low: 0, high: 8}",
            ),
            "data.image_size",
        ),
        (("optimizer.lr=0.1",), "optimizer.lr is both given and searched"),
        (("tune.num_trials=null",), "never ends"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_study_that_cannot_be_is_refused_before_its_first_trial(
    command: Command, line: tuple[str, ...], says: str, make_tree: MakeTree
) -> None:
    make_tree(cat=10, dog=10)
    answer = command("tune", "data=folder", "data.dir=tree", *line)
    assert answer.code == 2, answer.err
    last = answer.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and says in last
    assert not Path("tune.db").exists() and not Path("runs").exists()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"metric": "test/f1_macro"}, "not a validation metric"),
        ({"max_time": "1h"}, "invalid tune.max_time=1h"),
        ({"workers": 0}, "at least 1"),
        ({"pruner": "median2"}, "did you mean median"),
        ({"sampler": "tep"}, "did you mean tpe"),
    ],
)
def test_settings_that_cannot_be_are_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TuneSettings(**asked)


@pytest.mark.parametrize(("text", "seconds"), [("00:01:30:05", 5405.0), ("90", 5400.0), ("1.5", 90.0), (None, None)])
def test_times_are_the_trainers_or_minutes(text: str | None, seconds: float | None) -> None:
    assert TuneSettings(max_time=text).max_seconds == seconds
