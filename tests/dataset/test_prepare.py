from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from image_classifier.dataset.prepare import DataSettings, manifest_path, prepare
from image_classifier.dataset.split import SplitSettings
from image_classifier.errors import ConfigError, DataError
from image_classifier.records import Manifest
from tests.conftest import ROOT, write_image

CONF = ROOT / "conf" / "data"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_manifest_is_written_and_said(tree, caplog):
    settings = DataSettings(name="pets")
    with caplog.at_level(logging.INFO):
        manifest = prepare(tree, settings)
    path = manifest_path(tree, settings)
    assert path.parent == Path("data/manifests")
    assert path.name.startswith("pets-")
    assert Manifest.read(path, tree) == manifest
    assert "20 images, 2 classes: train 16, val 4, test 0" in caplog.text


def test_added_files_move_nothing_on_disk(tree):
    settings = DataSettings()
    before = {record.path: record.split for record in prepare(tree, settings)}
    for number in range(30):
        write_image(tree / "cat" / f"a{number}.png", 1000 + number)
    after = {record.path: record.split for record in prepare(tree, settings)}
    assert {path: after[path] for path in before} == before
    assert sum(split == "val" for split in after.values()) == 10


def test_an_untouched_folder_keeps_its_manifest(tree):
    settings = DataSettings()
    prepare(tree, settings)
    date = manifest_path(tree, settings).stat().st_mtime_ns
    prepare(tree, settings)
    assert manifest_path(tree, settings).stat().st_mtime_ns == date


def test_each_split_setting_has_its_own_manifest(tree):
    paths = {manifest_path(tree, DataSettings(split=SplitSettings(val, seed=seed))) for val in (0.1, 0.2) for seed in (0, 1)}
    assert len(paths) == 4
    assert manifest_path(tree, DataSettings(manifest_path="m.csv")) == Path("m.csv")


def test_test_images_that_were_trained_on_are_said(tmp_path, caplog):
    for seed, path in enumerate(("train/cat/a.png", "train/cat/b.png", "train/dog/a.png", "train/dog/b.png", "test/dog/a.png", "val/cat/c.png")):
        write_image(tmp_path / "pets" / path, seed)
    shutil.copy("pets/train/cat/a.png", "pets/test/dog/b.png")
    prepare(Path("pets"), DataSettings())
    assert "1 images of the test and val parts" in caplog.text


def test_a_damaged_manifest_is_not_overwritten(tree):
    Path("m.csv").write_text("nonsense")
    with pytest.raises(DataError, match=r"m\.csv"):
        prepare(tree, DataSettings(manifest_path="m.csv"))
    assert Path("m.csv").read_text() == "nonsense"


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"batch_size": 0}, "data.batch_size"),
        ({"image_size": 0}, "data.image_size"),
        ({"resize": "stretch"}, "data.resize"),
        ({"interpolation": "nearest"}, "data.interpolation"),
    ],
)
def test_a_value_that_cannot_be_names_its_key(values, key):
    with pytest.raises(ConfigError, match=key):
        DataSettings(**values)


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONF.glob("*.yaml"))])
def test_each_config_becomes_settings(name):
    text = (CONF / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert "python commands.py" in text.splitlines()[0]
    config = OmegaConf.merge(OmegaConf.load(CONF / "base.yaml"), OmegaConf.create(text))
    config.pop("defaults", None)
    schema = OmegaConf.structured(DataSettings)
    OmegaConf.set_readonly(schema, False)
    for part in (schema.split, schema.cache):
        OmegaConf.set_readonly(part, None)
    root = OmegaConf.merge({"seed": 3, "data": schema}, {"data": config})
    OmegaConf.resolve(root)
    settings = OmegaConf.to_object(root.data)
    assert isinstance(settings, DataSettings)
    assert settings.split == SplitSettings(seed=3)
    assert settings.name == (None if name in ("base", "folder") else name)


def test_a_misspelt_key_is_refused():
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.merge(OmegaConf.structured(DataSettings), {"batchsize": 3})
