"""What `train FOLDER` does is decided by the images and the weights at hand, and what the user says wins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from image_classifier.cli.options import translate
from image_classifier.cli.positional import AUTO_VERBS, DATA_VERBS, model_choice
from image_classifier.cli.recipes import with_recipe
from image_classifier.cli.train_config import compose_train_config
from image_classifier.dataset.settings import DataSettings
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.manifest import Manifest
from image_classifier.training import settle
from image_classifier.training.builders import build_criteria
from image_classifier.training.config import TrainConfig
from image_classifier.training.run import check_config
from image_classifier.training.transfer import plan as tested
from image_classifier.training.transfer.plan import RECIPES, ImageFacts, Plan, find_pretrained, plan
from image_classifier.training.transfer.pretrained import Pretrained
from tests.training.transfer.small_inputs import small_inputs

FOUND = Pretrained(("model=torchvision", "model.backbone.name=mobilenet_v2", "model.weights='w.pth'"), "m", "w.pth")
PHOTOS, TINY = ImageFacts(900, 3, 640, 480), ImageFacts(20_000, 10, 28, 28)
AUTO = ("data=folder", "data.dir=photos", "model=auto")


def planned(facts: ImageFacts, found: Pretrained | str = FOUND, effort: str | None = None) -> Plan:
    return plan(facts, found, effort, "program train FOLDER model=timm")


def composed(made: Plan, *given: str) -> TrainConfig:
    """What the run is made from, with the user's line on top."""
    return compose_train_config([*AUTO, *given]).recompose(made.overrides)


def test_photographs_with_weights_are_fine_tuned_at_the_size_of_the_weights() -> None:
    made = planned(PHOTOS)
    config = composed(made)
    assert config.finetune.probe and config.run.effort == "normal" and config.data.image_size == "auto"
    assert config.model.weights == "w.pth" and (config.model.backbone or {})["name"] == "mobilenet_v2"
    assert made.lines[0] == "images   900 training images of 3 classes, median 640 x 480 px"
    assert "m, pretrained (w.pth) at the size it was trained with" in made.lines[1]


@pytest.mark.parametrize(("effort", "epochs"), [("quick", 0), ("normal", 12), ("thorough", 24), (None, 12)])
def test_an_effort_is_a_recipe(effort: str | None, epochs: int) -> None:
    made = planned(PHOTOS, effort=effort)
    config = composed(made)
    assert made.overrides[0] == f"experiment={RECIPES[effort or 'normal']}"
    assert config.trainer.max_epochs == epochs and config.run.effort == (effort or "normal")
    assert f"effort={effort or 'normal'}: logistic regression" in made.lines[2]


def test_many_tiny_pictures_are_learned_from_scratch_at_their_own_size() -> None:
    config = composed(planned(TINY))
    assert config.data.image_size == 28 and not config.finetune.probe and not config.model.weights
    assert (config.trainer.max_epochs or 0) >= 8 and "WhitenedNet" in str((config.model.backbone or {})["_target_"])


def test_a_file_that_the_user_offers_is_left_out_where_a_network_from_scratch_is_better() -> None:
    made = planned(TINY)
    config = composed(made, "model.weights=w.pth")
    assert not config.model.weights and "WhitenedNet" in str((config.model.backbone or {})["_target_"])
    assert "To use them: model=torchvision model.backbone.name=mobilenet_v2" in made.lines[1]


@pytest.mark.parametrize("origin", ["a bundle", "as configured"])
def test_a_network_that_the_user_names_is_used_whatever_the_images_are(origin: str) -> None:
    made = planned(TINY, Pretrained((), "mine", origin))
    assert made.overrides[0] == "experiment=finetune"
    assert not any(override.startswith("data.image_size") for override in made.overrides)


def test_few_tiny_pictures_are_enlarged_for_pretrained_weights() -> None:
    made = planned(ImageFacts(300, 10, 28, 28))
    config = composed(made)
    assert config.finetune.probe and config.data.image_size == 64 and "at 64 px" in made.lines[1]


def test_without_weights_it_is_from_scratch_and_one_line_says_why() -> None:
    made = planned(PHOTOS, "huggingface.co cannot be reached")
    config = composed(made)
    assert not config.finetune.probe and config.data.image_size == 64
    assert all("\n" not in line for line in made.lines)
    assert made.lines[1].startswith("network  from scratch: huggingface.co cannot be reached; ")
    assert made.lines[1].endswith("To fetch weights: program train FOLDER model=timm")


@pytest.mark.parametrize("count", [2, 30, 99, 100, 999, 20_001, 10**6])
@pytest.mark.parametrize("side", [1, 26, 64, 4000])
@pytest.mark.parametrize("effort", RECIPES)
def test_a_training_from_scratch_fits_any_images(count: int, side: int, effort: str) -> None:
    made = planned(ImageFacts(count, 2, side, side + 1), "none", effort)
    values = dict(word.split("=", 1) for word in made.overrides)
    size, batch, epochs = (int(values[key]) for key in ("data.image_size", "data.batch_size", "trainer.max_epochs"))
    assert 24 <= size <= 64 and size % 4 == 0 and 50 <= batch <= 500 and 5 <= epochs <= 60
    assert count < 100 or batch <= count  # an epoch has a step


@pytest.mark.parametrize("count", [2, 450, 6400, 10**6])
def test_more_effort_is_never_a_shorter_training_from_scratch(count: int) -> None:
    plans = [planned(ImageFacts(count, 2, 28, 28), "none", effort) for effort in ("quick", "normal", "thorough")]
    epochs = [int(dict(word.split("=", 1) for word in made.overrides)["trainer.max_epochs"]) for made in plans]
    assert epochs == sorted(epochs)


@pytest.mark.parametrize("made", [planned(PHOTOS), planned(TINY), planned(PHOTOS, effort="quick")])
def test_what_the_user_gives_wins(made: Plan) -> None:
    given = {
        "data.image_size": 96,
        "data.batch_size": 7,
        "data.interpolation": "bicubic",
        "data.crop_fraction": 0.8,
        "data.split.val": 0.33,
        "trainer.max_epochs": 5,
        "optimizer.lr": 0.5,
        "seed": 9,
    }
    found = composed(made, *(f"{key}={value}" for key, value in given.items())).flat()
    assert {key: found[key] for key in given} == given


@pytest.mark.parametrize(("effort", "fraction"), [("quick", "auto"), ("normal", 1.0), ("thorough", 1.0)])
def test_fine_tuning_keeps_the_whole_shorter_side(effort: str, fraction: object) -> None:
    made = planned(PHOTOS, effort=effort)
    assert composed(made).data.crop_fraction == fraction
    assert composed(made, "data.crop_fraction=auto").data.crop_fraction == "auto"


def test_what_the_user_gives_is_given_once() -> None:
    own = ["model=auto", "data.image_size=32", "+trainer.limit_train_batches=1", "~logger"]
    line = with_recipe(("experiment=finetune", "model=timm", "data.image_size=64"), own)
    assert "model=timm" in line and "model=auto" not in line and list(line[-3:]) == own[1:]
    assert [word for word in line if word.startswith("data.image_size")] == ["data.image_size=32"]


@pytest.mark.parametrize("made", [planned(PHOTOS), planned(TINY)])
@pytest.mark.parametrize("given", [("loss=focal", "scheduler=cosine"), ("optimizer=sgd", "augment=none")])
def test_a_choice_of_the_user_is_without_the_recipes_keys_of_that_group(made: Plan, given: tuple[str, ...]) -> None:
    """Label smoothing, for one, is nothing that every loss knows."""
    config = composed(made, *given)
    check_config(config)
    build_criteria(config.loss, np.array([0, 1]), 2)


@pytest.mark.parametrize("data", ["folder", "table", "hf", "kaggle"])
def test_the_network_is_chosen_for_images_of_ones_own(data: str) -> None:
    assert model_choice("train", [f"data={data}", "data.dir=x"]) == ["model=auto"]
    for given in ("model=resnet18", "experiment=fast", "model.backbone.channels=[4,8]", "resume=last"):
        assert model_choice("train", [f"data={data}", "data.dir=x", given]) == []
    for verb in DATA_VERBS - AUTO_VERBS:
        assert model_choice(verb, [f"data={data}", "data.dir=x"]) == []
    for given in ("model.weights=w.pth", "model.from=x", "effort=quick", "model.head_dropout=0.1", "seed=1"):
        assert model_choice("train", [f"data={data}", "data.dir=x", given]) == ["model=auto"]


@pytest.mark.parametrize("data", ["digits", "flowers", "cifar10"])
def test_the_data_sets_of_the_package_keep_their_network(data: str) -> None:
    assert model_choice("train", [f"data={data}"]) == [] == model_choice("train", [])


def test_the_line_of_a_folder_chooses_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "model=auto" in translate("train", ("photos",)).overrides
    assert "model=auto" not in translate("train", ("photos", "model=resnet18")).overrides
    assert "model=auto" not in translate("tune", ("photos",)).overrides
    assert "model=auto" in translate("train", ("data=folder", "data.dir=photos")).overrides


def test_what_a_run_is_planned_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "network_of_hub", lambda on_gpu: "no network")
    monkeypatch.setattr(tested, "network_of_file", lambda path: FOUND)
    assert find_pretrained(compose_train_config(AUTO)) == "no network"
    assert find_pretrained(compose_train_config([*AUTO, "model.weights=w.pth"])) is FOUND
    found = find_pretrained(compose_train_config([*AUTO, "model.from=models/mine"]))
    assert found == Pretrained((), "mine", "a bundle")
    assert find_pretrained(compose_train_config(["model=resnet18"])) is None
    configured = ("model=timm", "model.backbone.pretrained=true", "effort=quick")
    assert find_pretrained(compose_train_config(configured)) == Pretrained((), "resnet26d", "as configured")
    with pytest.raises(ConfigError, match="effort=quick is for pretrained weights, and resnet18 has none"):
        find_pretrained(compose_train_config(["model=resnet18", "effort=quick"]))


def test_a_file_that_is_missing_or_foreign_is_named_before_any_image_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.models.list_models", lambda module: ["resnet18"])  # all take seconds
    with pytest.raises(CheckpointError, match="there is no file"):
        find_pretrained(compose_train_config([*AUTO, f"model.weights={tmp_path / 'none.pth'}"]))
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="cannot tell which network"):
        find_pretrained(compose_train_config([*AUTO, f"model.weights={tmp_path / 'other.pth'}"]))


def test_the_facts_are_of_the_training_images(tmp_path: Path) -> None:
    manifest = small_inputs(tmp_path, num_train=7, num_val=5).manifest
    manifest.widths[:7], manifest.heights[:7] = [10, 20, 30, 40, 50, 60, 70], 8
    facts = ImageFacts.of(manifest)
    assert facts == ImageFacts(7, 3, 40, 8) and facts.side == 8
    assert str(facts) == "7 training images of 3 classes, median 40 x 8 px"


def test_the_split_stays_as_the_images_were_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The recipe from scratch is that of `fast`, which has a share of val of its own."""
    asked: list[float] = []

    def prepared(data: DataSettings, *_: object) -> tuple[Manifest, None]:
        asked.append(data.split.val)
        return manifest, None

    manifest = small_inputs(tmp_path).manifest
    monkeypatch.setattr(settle, "find_pretrained", lambda config: "none")
    monkeypatch.setattr(settle, "prepare_dataset", prepared)
    config, _ = settle.settled(compose_train_config(AUTO))
    assert asked == [config.data.split.val] == [0.2]
