from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from image_classifier.dataset.audit.issues import AuditSettings
from image_classifier.dataset.prepare import manifest_path
from image_classifier.dataset.prepare import prepare as prepare_paths
from image_classifier.dataset.select import ClassSettings
from image_classifier.dataset.settings import DataSettings
from image_classifier.dataset.split import SplitSettings
from image_classifier.errors import ConfigError, DataError
from image_classifier.manifest import Manifest
from tests.conftest import ROOT, write_image

CONF = ROOT / "conf" / "data"


def prepare(root: Path | list[Path], settings: DataSettings, **asked) -> Manifest:
    return prepare_paths(root if isinstance(root, list) else [root], settings, AuditSettings(**asked))[0]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_manifest_is_written_and_said(tree, caplog):
    settings = DataSettings(name="pets")
    with caplog.at_level(logging.INFO):
        manifest = prepare(tree, settings)
    path = manifest_path(tree, [tree], settings)
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
    date = manifest_path(tree, [tree], settings).stat().st_mtime_ns
    prepare(tree, settings)
    assert manifest_path(tree, [tree], settings).stat().st_mtime_ns == date


def test_each_split_setting_has_its_own_manifest(tree):
    paths = {
        manifest_path(tree, [tree], DataSettings(split=SplitSettings(val, seed=seed)))
        for val in (0.1, 0.2)
        for seed in (0, 1)
    }
    assert len(paths) == 4
    assert manifest_path(tree, [tree], DataSettings(manifest_path="m.csv")) == Path("m.csv")


def test_test_images_that_were_trained_on_are_said(tmp_path, caplog):
    for seed, path in enumerate(
        ("train/cat/a.png", "train/cat/b.png", "train/dog/a.png", "train/dog/b.png", "test/dog/a.png", "val/cat/c.png")
    ):
        write_image(tmp_path / "pets" / path, seed)
    shutil.copy("pets/train/cat/a.png", "pets/test/dog/b.png")
    prepare(Path("pets"), DataSettings())
    assert "1 of 2 test images have a copy, a near-duplicate or an image of their group in train" in caplog.text


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def test_unreadable_images_are_left_out_with_a_reason_until_the_row_is_gone(tree, caplog):
    spoil(tree / "cat" / "003.png")
    settings = DataSettings(exclude_path="exclude.csv")
    manifest = prepare(tree, settings)
    assert len(manifest) == 19
    assert "cat/003.png" not in list(manifest.paths)
    assert Path("exclude.csv").read_text().splitlines()[1].startswith("cat/003.png,audit: truncated")
    assert "1 image excluded by exclude.csv" in caplog.text
    write_image(tree / "cat" / "003.png", 3)  # mended
    assert len(prepare(tree, settings)) == 20
    assert Path("exclude.csv").read_text() == "path,reason\n"


def test_an_unreadable_image_that_is_to_be_kept_is_an_error(tree):
    spoil(tree / "cat" / "003.png")
    with pytest.raises(DataError, match=r"cat/003\.png"):
        prepare(tree, DataSettings(), exclude=[])
    Path("exclude.csv").write_text("path,reason\ncat/003.png,keep\n")
    with pytest.raises(DataError, match=r"cat/003\.png"):
        prepare(tree, DataSettings(exclude_path="exclude.csv"))


def test_rows_written_by_hand_are_honoured_and_reversed_by_hand(tree):
    settings = DataSettings(exclude_path="exclude.csv")
    Path("exclude.csv").write_text("path,reason\ndog/00[0-6].png,blurred\ndog/005.png,keep\n")
    assert [path for path in prepare(tree, settings).paths if path.startswith("dog")] == [
        f"dog/{number:03d}.png" for number in (5, 7, 8, 9)
    ]
    Path("exclude.csv").unlink()
    assert len(prepare(tree, settings)) == 20


def test_twins_and_copies_stay_in_one_split(tree):
    for number in range(6):  # half of the cats get a mirrored, slightly brighter copy, all dogs a copy to the byte
        with Image.open(tree / "cat" / f"{number:03d}.png") as image:
            twin = np.clip(np.asarray(image)[:, ::-1].astype(int) + 4, 0, 255).astype(np.uint8)
        Image.fromarray(twin).save(tree / "cat" / f"twin{number}.png")
    for number in range(10):
        shutil.copy(tree / "dog" / f"{number:03d}.png", tree / "dog" / f"copy{number}.png")
    for seed in range(5):
        manifest = prepare(tree, DataSettings(split=SplitSettings(0.3, 0.2, seed)))
        part = {record.path: record.split for record in manifest}
        assert all(part[f"cat/{number:03d}.png"] == part[f"cat/twin{number}.png"] for number in range(6))
        assert all(part[f"dog/{number:03d}.png"] == part[f"dog/copy{number}.png"] for number in range(10))
        assert not any(manifest.leaked(split).any() for split in ("val", "test"))


def test_images_with_one_key_stay_in_one_split(make_tree):
    root = make_tree(**{f"{label}/video{number}": 3 for label in ("cat", "dog") for number in range(6)})
    manifest = prepare(root, DataSettings(split=SplitSettings(0.34, 0.17, group=r"(video\d+)/")))
    parts = {}
    for record in manifest:
        parts.setdefault(record.path.split("/")[1], set()).add(record.split)
    assert all(len(splits) == 1 for splits in parts.values())
    assert {next(iter(splits)) for splits in parts.values()} == {"train", "val", "test"}


def test_folders_are_merged_by_class_name(make_tree):
    first, second = make_tree("first", cat=5, dog=5), make_tree("second", kitty=4, bird=6)
    for path in second.rglob("*.png"):
        write_image(path, hash(path.as_posix()) % 2**31)
    manifest = prepare([first, second], DataSettings(rename={"kitty": "cat"}))
    assert manifest.classes == ("bird", "cat", "dog")
    assert sum(record.label == "cat" for record in manifest) == 9
    assert manifest.file(manifest[0]).is_file()


def test_selection_is_honoured(make_tree):
    root = make_tree(cat=9, dog=6, bird=3)
    manifest = prepare(root, DataSettings(classes=ClassSettings(top=2, max_images=5)))
    assert manifest.classes == ("cat", "dog")
    assert len(manifest) == 10


def test_a_cluster_stays_whole_though_the_image_that_links_it_is_left_out(tree):
    for number in range(10):  # three pictures a cluster, alike to the pixel and different to the byte
        with Image.open(tree / "cat" / f"{number:03d}.png") as image:
            image.save(tree / "cat" / f"{number:03d}.bmp")
            image.save(tree / "cat" / f"{number:03d}.tiff")
            image.save(tree / "cat" / f"{number:03d}.webp", lossless=True)
    for kept in (["png"], ["bmp"], ["tiff"]):
        Path("exclude.csv").write_text("path,reason\n" + "".join(f"cat/*.{suffix},no\n" for suffix in kept))
        for seed in range(4):
            manifest = prepare(tree, DataSettings(exclude_path="exclude.csv", split=SplitSettings(0.3, 0.2, seed)))
            parts = {}
            for record in manifest:
                parts.setdefault(Path(record.path).stem + record.label, set()).add(record.split)
            assert all(len(splits) == 1 for splits in parts.values())
    capped = prepare(tree, DataSettings(classes=ClassSettings(max_images=17)))
    parts = {}
    for record in capped:
        parts.setdefault(Path(record.path).stem + record.label, set()).add(record.split)
    assert all(len(splits) == 1 for splits in parts.values())


def test_a_data_set_is_known_however_its_path_is_written(tree):
    settings = DataSettings(name="pets")
    prepare(tree, settings)
    prepare(Path(os.path.relpath(tree)), settings)
    assert len(list(Path("data/manifests").iterdir())) == len(list(Path("data/audit").iterdir())) == 1


def test_other_folders_other_classes_other_files(make_tree):
    first, second, third = (make_tree(name, cat=4, dog=4) for name in ("a", "b", "c"))
    for number, folder in enumerate((second, third)):
        for row, path in enumerate(sorted(folder.rglob("*.png"))):
            write_image(path, 1000 * number + row + 500)
    prepare([first, second], DataSettings())
    prepare([first, third], DataSettings())
    prepare([first, third], DataSettings(classes=ClassSettings(max_images=6)))
    assert len(list(Path("data/manifests").iterdir())) == 3
    assert len(list(Path("data/audit").iterdir())) == 2


def test_twins_are_looked_for_again_where_another_background_changes_what_is_seen(tree):
    for row, path in enumerate(sorted(tree.rglob("*.png"))):
        alpha = np.zeros((12, 12, 4), np.uint8)
        alpha[..., :3] = np.random.default_rng(row).integers(0, 256, (12, 12, 3))
        Image.fromarray(alpha).save(path)
    for background in ((255, 255, 255), (0, 0, 0)):
        prepare(tree, DataSettings(background=background))
    assert len(list(Path("data/cache/twins").iterdir())) == 2


def test_folds_partition_the_images(tree):
    seen = [path for fold in range(5) for path in prepare(tree, DataSettings(folds=5, fold=fold)).part("val").paths]
    assert sorted(seen) == sorted(prepare(tree, DataSettings()).paths)


def test_an_empty_class_folder_is_refused_or_left_out(tree):
    (tree / "bird").mkdir()
    with pytest.raises(DataError, match=r"'.*bird' holds no images.*data\.classes\.exclude=\[bird\]"):
        prepare(tree, DataSettings())
    assert prepare(tree, DataSettings(classes=ClassSettings(exclude=["bird"]))).classes == ("cat", "dog")


def test_one_class_is_no_data_set(make_tree):
    with pytest.raises(DataError, match="one class only, 'cat'"):
        prepare(make_tree(cat=4), DataSettings())


def test_a_class_that_only_the_test_part_knows_is_refused(make_tree):
    root = make_tree(**{"train/cat": 3, "train/dog": 3, "test/cat": 1, "test/bird": 1})
    with pytest.raises(DataError, match=r"the test split .* has the class 'bird', which the train split lacks"):
        prepare(root, DataSettings())


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
        ({"balance": "smote"}, "data.balance"),
        ({"background": (1, 2)}, "data.background"),
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
    groups = ("split", "cache", "classes", "limits", "duplicates", "unpack", "download")
    for part in (schema[name] for name in groups):
        OmegaConf.set_readonly(part, None)
    root = OmegaConf.merge({"seed": 3, "data": schema}, {"data": config})
    OmegaConf.resolve(root)
    settings = OmegaConf.to_object(root.data)
    assert isinstance(settings, DataSettings)
    assert settings.name in (None, name)


def test_a_misspelt_key_is_refused():
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.merge(OmegaConf.structured(DataSettings), {"batchsize": 3})
