"""The configuration: text to the letter, refusals in one line, typed settings and trusted targets."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from image_classifier.cli import completion, hydra_app
from image_classifier.cli.options import translate
from image_classifier.errors import ClassifierError, ConfigError, DataError
from image_classifier.override_grammar import literal, quoted, requoted
from image_classifier.text import nearest

HYDRA = "defaults: [override hydra_logging: none, override job_logging: none]\noutput_subdir: null\nrun: {dir: .}\n"
HYDRA += "sweep: {dir: sweep, subdir: .}\n"
DEFAULTS = "  - _self_\n  - data: digits\n  - model: small\n  - hydra: default\n  - optional experiment: null\n"
TREE = {
    "hydra/default.yaml": HYDRA,
    "train.yaml": "defaults:\n" + DEFAULTS + "name: null\nseed: 0\n",
    "infer.yaml": "defaults: [_self_, hydra: default]\ncheckpoint_name: ???\nimages: ???\ntop_k: null\n",
    "data/base.yaml": "batch_size: 64\nsplit: {val: 0.2}\n",
    "data/digits.yaml": "defaults: [base, _self_]\nimage_size: 28\n",
    "data/folder.yaml": "defaults: [base, _self_]\nimage_size: 64\ndir: ???\n",
    "model/small.yaml": "name: small\nwidth: ${data.image_size}\n",
    "model/large.yaml": "name: large\nwidth: 512\ndepth: 9\n",
    "experiment/quick.yaml": "# @package _global_\ndefaults: [override /model: large]\nseed: 7\n",
}
ODD = [
    " ",
    "a b",
    "it's",
    'say "x"',
    "a=b=c",
    "a,b",
    "$HOME",
    "${x}",
    "\\${x}",
    "\\\\${x}\\",
    "[a]",
    "{a: 1}",
    "(",
    "\\",
    "a\\'",
    "\\\\'",
    "😀",
]
ODD += [
    "-a",
    "null",
    "true",
    "1e3",
    "'",
    '"',
    "\udcff.png",
    "a\nb",
    "\t",
    "~",
    "${oc.env:HOME}",
    "${",
    "}",
    "???",
    "x???",
    "#",
    "a: b",
    "",
]


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conf")
    for name, text in TREE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def run(conf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run a verb on a small conf tree; what each job saw comes back."""
    monkeypatch.setattr(hydra_app, "CONF_DIR", conf)
    monkeypatch.chdir(tmp_path)

    def call(verb: str, *arguments: str, task: Any = None) -> list[DictConfig]:
        seen: list[DictConfig] = []
        monkeypatch.setattr(sys, "argv", ["commands.py", verb, *arguments])
        hydra_app.run_verb(verb, list(arguments), task or seen.append)
        return seen

    return call


def text() -> st.SearchStrategy[str]:
    special = st.sampled_from([*"\\'\"$={}[](),:~+- \t\n", "${", "}", "\udc80", "\udcff", "😀", "a", "null"])
    return st.lists(special | st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12).map(
        "".join
    )


def _composed(conf: Path, overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        return hydra.compose("infer", overrides)


@given(values=st.lists(text(), min_size=8, max_size=30))
@example(values=ODD)
@hypothesis_settings(max_examples=25, deadline=None)
def test_any_text_survives_hydra_to_the_letter(conf: Path, values: list[str]) -> None:
    words = [value for value in values if not value.startswith("-")]
    line = translate("infer", ["--images", "x", *words, f"--checkpoint_name={values[0]}"])
    config = _composed(conf, list(line.overrides))
    assert hydra_app.to_plain(config)["images"] == ["x", *words]
    assert hydra_app.to_plain(config)["checkpoint_name"] == values[0]


@given(value=text())
@hypothesis_settings(max_examples=200, deadline=None)
def test_literal_text_starts_no_interpolation(value: str) -> None:
    assert OmegaConf.create({"x": literal(value)}).x == value or value == "???"


@given(value=text())
@hypothesis_settings(max_examples=50, deadline=None)
def test_typed_and_saved_settings_keep_the_text(tmp_path_factory: pytest.TempPathFactory, value: str) -> None:
    node = OmegaConf.create({"name": literal(value)})
    assert hydra_app.typed(Named, node, "").name == value
    file = tmp_path_factory.getbasetemp() / "saved.yaml"
    if value.isprintable():
        hydra_app.save(node, file)
        assert OmegaConf.load(file).name == value


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        (["--data.batch_size", "64"], ["data.batch_size=64"]),
        (["--data.batch_size=64", "model=large"], ["data.batch_size=64", "model=large"]),
        (["--overwrite", "--seed", "-1"], ["overwrite=true", "seed=-1"]),
        (["--overwrite", "hydra.run.dir=x", "~logger"], ["overwrite=true", "hydra.run.dir=x", "~logger"]),
        (["--name", "a=b"], ["name='a=b'"]),
        (["--model", "a,b", "--optimizer.betas", "[0.9,0.99]"], ["model=a,b", "optimizer.betas=[0.9,0.99]"]),
    ],
)
def test_options_are_overrides(arguments: list[str], overrides: list[str]) -> None:
    assert list(translate("train", arguments).overrides) == overrides


def test_images_run_to_the_next_option_and_a_dash_is_standard_input() -> None:
    assert list(translate("infer", ["--images", "a", "k=v", "-", "--top_k", "3"]).overrides) == [
        "images=['a','k=v','-']",
        "top_k=3",
    ]
    assert list(translate("infer", ["images=a b.png"]).overrides) == ["images=['a b.png']"]
    assert list(translate("infer", ["images=[a,b]"]).overrides) == ["images=[a,b]"]


def test_hydra_flags_come_first_and_keep_their_values() -> None:
    line = translate("train", ["a=1", "-m", "--cfg", "job", "b=2", "--info", "defaults", "-cn=x"])
    assert line.argv() == ["--multirun", "--cfg", "job", "--info", "defaults", "--config-name", "x", "a=1", "b=2"]


@pytest.mark.parametrize("words", [["foo"], ["-"], ["-x"], ["--name"], ["--images"], ["--cfg"], ["--cfg", "jib"]])
def test_words_that_are_nothing_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        translate("infer" if "--images" in words else "train", words)


def test_nearest_weighs_the_last_part_most() -> None:
    assert nearest("data.batchsize", ["data.batch_size", "data.dir"]) == "data.batch_size"
    assert nearest("data.lr", ["optimizer.lr", "data.dir"]) == "optimizer.lr"
    assert nearest("zzz", ["data.dir"]) is None


def test_a_value_hydra_cannot_read_is_quoted_unless_it_is_grammar(run: Any) -> None:
    (config,) = run("infer", "checkpoint_name=model_val_loss=1.12.ckpt", "images=a.png")
    assert config.checkpoint_name == "model_val_loss=1.12.ckpt"
    assert config.images == ["a.png"]
    assert requoted("a=[b") is None
    assert requoted("a=b=c") == f"a={quoted('b=c')}"


def test_a_run_sees_the_config_and_the_whole_command_line(run: Any, tmp_path: Path) -> None:
    seen: list[Any] = []
    arguments = ["model=large", "--seed", "3", "+model.extra=1", "++new.key=b", "hydra.run.dir=."]
    run("train", *arguments, task=lambda config: seen.append((hydra_app.to_plain(config), list(sys.argv))))
    config, argv = seen[0]
    assert (config["model"], config["seed"], config["new"]) == (
        {"name": "large", "width": 512, "depth": 9, "extra": 1},
        3,
        {"key": "b"},
    )
    assert argv == ["commands.py", "train", *arguments]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_experiments_deletions_and_sweeps(run: Any) -> None:
    assert [(job.model.name, job.seed) for job in run("train", "experiment=quick")] == [("large", 7)]
    assert "model" not in run("train", "~model")[0]
    assert [(job.model.name, job.seed) for job in run("train", "-m", "model=small,large", "seed=1")] == [
        ("small", 1),
        ("large", 1),
    ]
    assert [job.model.name for job in run("train", "--multirun", "model=glob(*)")] == ["large", "small"]
    assert [job.seed for job in run("train", "-m", "seed=range(0,3)")] == [0, 1, 2]


def test_another_config_folder_and_root(run: Any, tmp_path: Path) -> None:
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/own.yaml").write_text("name: own\n")
    assert run("train", "--config-dir", "mine", "model=own")[0].model.name == "own"
    assert run("train", "--config-name", "infer", "checkpoint_name=a", "images=[b]")[0].images == ["b"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["data.batchsize=3"],
            ["data.batchsize is not a key: did you mean data.batch_size (", "/data/base.yaml)", "+data.batchsize="],
        ),
        (["--data.imagesize", "3"], ["data.image_size (", "/data/digits.yaml)"]),
        (["experiment=quick", "model.depht=3"], ["model.depth (", "/model/large.yaml)"]),
        (["sede=3"], ["seed (", "/train.yaml)"]),
        (["modl=large"], ["modl is not a key: did you mean model (", "/model/)"]),
        (["model=lage"], ["lage is not a choice of model: did you mean large?", "/model/ has large, small"]),
        (["-m", "model=small,lage"], ["lage is not a choice of model"]),
        (["-m", "sede=1,2"], ["did you mean seed"]),
        (["model=small,large"], ["several values", "-m"]),
        (["model=[a"], ["cannot read 'model=[a'"]),
        (["data=folder"], ["data.dir is missing: write data.dir=PATH"]),
        (["model.width=${nope}"], ["cannot resolve model.width", "'nope' not found"]),
        (["~mdel"], ["did you mean model"]),
        (["+model=large"], ["write model=large without +"]),
        (["+seed=1"], ["write seed=1 without +"]),
        (["hydra.run.dri=x"], ["'dri' not in 'RunDir'"]),
        (["--config-name", "nope"], ["Cannot find primary config 'nope'"]),
        (["--config-dir", "nope"], ["--config-dir 'nope' is not a folder"]),
        (["+x._target_=os.system"], ["x._target_ names os.system", "trusted_packages=[os]"]),
        (["--resolve"], ["--resolve goes with --cfg"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run: Any, arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        run("train", *arguments)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert "\n" not in str(refused.value)


def test_errors_of_the_worker_pass_hydra_unchanged(run: Any) -> None:
    for error in (DataError("empty"), KeyError("a bug"), KeyboardInterrupt(), BrokenPipeError()):

        def task(config: DictConfig, error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)) as raised:
            run("train", task=task)
        assert raised.value is error
    assert sys.argv[1] == "train"


@dataclass(frozen=True)
class Named:
    name: str


@dataclass(frozen=True)
class Inner:
    ratio: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise DataError("a ratio lies between 0 and 1")


@dataclass(frozen=True)
class Outer:
    batch_size: int
    names: list[str] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    limit: int | None = None


def _typed(**values: Any) -> Outer:
    return hydra_app.typed(Outer, OmegaConf.create({"data": values}).data, "data")


def test_typed_builds_nested_dataclasses() -> None:
    assert _typed(batch_size="64", names=["a"], inner={"ratio": 1}) == Outer(64, ["a"], Inner(1.0))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batch_size": "abc"}, "data.batch_size must be an int, got 'abc'"),
        ({"batch_size": 1, "inner": {"ratio": "x"}}, "data.inner.ratio must be a float, got 'x'"),
        ({"batch_size": 1, "inner": 3}, "data.inner must be a group of keys, got 3"),
        ({"batch_size": 1, "limit": "x"}, "data.limit must be an int | None, got 'x'"),
        ({"batch_size": None}, "data.batch_size must be an int, got None"),
        ({"batch_size": 1, "names": "a"}, "data.names must be a list[str], got 'a'"),
        ({"batch_size": 1, "inner": {"ration": 1}}, "data.inner.ration is not a key: did you mean data.inner.ratio?"),
        ({}, "data.batch_size is missing"),
        ({"batch_size": 1, "inner": {"ratio": 3}}, "a ratio lies between 0 and 1"),
        ({"batch_size": "${nope}"}, "cannot resolve data.batch_size"),
    ],
)
def test_typed_names_the_key(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ClassifierError) as refused:
        _typed(**values)
    assert words in str(refused.value)


def test_flatten_and_without() -> None:
    node = OmegaConf.create({"a": {"b": 1, "c": [1, "x"]}, "d": "${a.b}", "e": None})
    assert hydra_app.flatten(hydra_app.to_plain(node)) == {"a.b": 1, "a.c": '[1, "x"]', "d": 1, "e": None}
    assert hydra_app.without(node.a, "c") == {"b": 1}
    assert "c" in node.a


def test_completion_offers_verbs_groups_choices_and_keys(
    conf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hydra_app, "CONF_DIR", conf)
    monkeypatch.setattr(completion, "CONF_DIR", conf)
    monkeypatch.setattr(sys, "argv", ["commands.py", "-sc"])
    expected = {
        "": "train infer",
        "t": "train",
        "train model=l": "model=large",
        "train --see": "--seed=",
        "train --model l": "large",
    }
    expected |= {"train --model large model.d": "model.depth=", "infer --che": "--checkpoint_name=", "nope x": ""}
    for line, answer in expected.items():
        monkeypatch.setitem(os.environ, "COMP_LINE", f"python commands.py {line}")
        completion.complete(["query=bash"], ["train", "infer"])
        assert capsys.readouterr().out.strip() == answer, line
