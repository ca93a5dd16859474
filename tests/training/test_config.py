"""The typed configuration: built once, never changed, and enough to train from Python."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import yaml

from image_classifier.bundle import read_bundle
from image_classifier.cli.train_config import compose_train_config
from image_classifier.errors import ConfigError
from image_classifier.override_grammar import quoted
from image_classifier.training.run import train
from tests.conftest import QUICK, MakeTree


def test_new_values_give_a_new_configuration_and_references_follow() -> None:
    before = compose_train_config(["optimizer.lr=auto", "seed=3"])
    after = before.with_values({"optimizer.lr": 0.25, "name": "mine", "run_dir": "runs/mine"})
    assert after.optimizer.lr == 0.25 == after.optimizer.node["lr"]
    assert after.scheduler.build and after.scheduler.build["max_lr"] == 0.25  # refers to optimizer.lr
    assert after.callbacks["last_checkpoint"]["dirpath"] == "runs/mine/checkpoints"
    assert after.loggers["logger"]["run_name"] == "mine" == after.run.name
    assert before.optimizer.lr == "auto" and before.run.name is None and after.data == before.data
    with pytest.raises(FrozenInstanceError):
        after.run = before.run  # type: ignore[misc]


def test_a_rate_that_is_found_reaches_the_schedule_of_a_saved_configuration_too() -> None:
    """A saved configuration has values where the first one had references: a run killed before has auto twice."""
    saved = compose_train_config(["optimizer.lr=auto", "scheduler=one_cycle", "scheduler.build.max_lr=auto"])
    found = saved.with_values({"optimizer.lr": 0.25})
    assert found.scheduler.build["max_lr"] == 0.25
    fixed = compose_train_config(["scheduler=one_cycle", "scheduler.build.max_lr=0.5"])
    assert fixed.with_values({"optimizer.lr": 0.25}).scheduler.build["max_lr"] == 0.5


def test_what_is_saved_is_every_key_with_its_value() -> None:
    config = compose_train_config(
        ["logger.tracking_uri=https://me:secret@host/", f"data.name={quoted('${x}')}", "+model.mine=1"]
    )
    saved = yaml.safe_load(config.yaml)
    assert saved["logger"]["tracking_uri"] == "https://***@host/" == config.flat()["logger.tracking_uri"]
    assert config.to_dict()["logger"]["tracking_uri"] == "https://me:secret@host/"
    assert saved.keys() == config.to_dict().keys() and saved["model"]["mine"] == 1
    assert saved["data"]["name"] == r"\${x}" and config.data.name == "${x}"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.max_epochs=many", "trainer.max_epochs must be an int or null"),
        ("data.image_size=large", "data.image_size must be an int"),
        ("decision.risk=2", "decision.risk"),
        ("model_=mlp", "did you mean model"),
    ],
)
def test_a_wrong_value_is_refused_from_python_as_on_the_command_line(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose_train_config([override])


@pytest.mark.slow
def test_a_training_from_python_returns_its_result_and_prints_nothing(
    tmp_path: Path, make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tree(cat=10, dog=10)
    monkeypatch.chdir(tmp_path)
    small = ["data=folder", "data.dir=tree", "data.image_size=16", "data.batch_size=4", "model.backbone.channels=[4,8]"]
    config = compose_train_config([*small, *QUICK, "trainer.max_epochs=1", "trainer.accelerator=cpu", "name=mine"])
    result = train(config)
    assert capsys.readouterr().out == ""
    assert (result.name, result.split) == ("mine", "val") and result.metrics["val"]["f1_macro"] == result.score
    assert read_bundle(result.bundle_dir).info.name == "mine" and (result.plots_dir / "metrics.json").is_file()
    assert (result.run_dir / "metrics.csv").is_file() and result.images_per_second > 0
    assert any(line.startswith("val accuracy") for line in result.summary)
    assert any("validation images, which also picked the best epoch" in line for line in result.summary)
