"""Plain words on the command line, the data set that a folder implies, and a folder `conf` of one's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from image_classifier.cli.conf_files import own_conf
from image_classifier.cli.options import translate
from image_classifier.cli.positional import DATA_VERBS
from image_classifier.errors import ConfigError
from image_classifier.paths import CONF_DIR
from tests.conftest import Command, MakeTree


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with images, an archive and a table in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/image-classifier"])
    (tmp_path / "photos/cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("photos/cat/1.jpg")
    for name in ("a.zip", "b.tar.gz", "labels.csv"):
        (tmp_path / name).touch()
    return tmp_path


def overrides(verb: str, *words: str) -> list[str]:
    return list(translate(verb, words).overrides)


@pytest.mark.parametrize("verb", sorted(DATA_VERBS))
def test_a_folder_is_the_images(verb: str) -> None:
    auto = ["model=auto"] if verb == "train" else []
    assert overrides(verb, "photos/") == [*auto, "data=folder", "data.dir='photos/'"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["photos", "seed=1"], ["model=auto", "data=folder", "data.dir='photos'", "seed=1"]),
        (["--seed", "1", "photos"], ["model=auto", "data=folder", "data.dir='photos'", "seed=1"]),
        (["a.zip"], ["model=auto", "data=folder", "data.archive='a.zip'"]),
        (["a.zip", "b.tar.gz"], ["model=auto", "data=folder", "data.archive=['a.zip','b.tar.gz']"]),
        (["photos", "a.zip"], ["model=auto", "data=folder", "data.dir=['photos','a.zip']"]),
        (["labels.csv"], ["model=auto", "data=folder", "data.dir='labels.csv'"]),
        (["https://host/a.zip"], ["model=auto", "data=folder", "data.archive='https://host/a.zip'"]),
        (["hf:owner/name"], ["model=auto", "data=hf", "data.dir='hf:owner/name'"]),
        (["photos", "data=flowers"], ["data.dir='photos'", "data=flowers"]),
        (["photos", "experiment=fast"], ["data.dir='photos'", "experiment=fast"]),
        (["photos", "experiment=flowers_rexnet"], ["data.dir='photos'", "experiment=flowers_rexnet"]),
        (["photos", "resume=last"], ["data.dir='photos'", "resume=last"]),
        (["photos", "-m", "seed=1,2"], ["model=auto", "data=folder", "data.dir='photos'", "seed=1,2"]),
        (["data.dir=photos"], ["model=auto", "data=folder", "data.dir=photos"]),
        (["--data.dir", "photos"], ["model=auto", "data=folder", "data.dir='photos'"]),
        (["data.archive=a.zip"], ["model=auto", "data=folder", "data.archive=a.zip"]),
        (["data=digits", "data.dir=photos"], ["data=digits", "data.dir=photos"]),
        (["data.dir=photos", "--config-name", "mine"], ["data.dir=photos"]),
        (["data.dir=null"], ["data.dir=null"]),
        (["data.image_size=32"], ["data.image_size=32"]),
        ([], []),
    ],
)
def test_images_of_ones_own_choose_the_data_set_folder(words: list[str], line: list[str]) -> None:
    assert overrides("train", *words) == line


@pytest.mark.parametrize(
    ("verb", "words", "line"),
    [
        ("infer", ["birds", "photos/"], ["checkpoint_name='birds'", "images=['photos/']"]),
        ("infer", ["birds", "a.jpg", "b c.jpg", "-"], ["checkpoint_name='birds'", "images=['a.jpg','b c.jpg','-']"]),
        ("infer", ["--checkpoint_name", "birds", "a.jpg"], ["images=['a.jpg']", "checkpoint_name='birds'"]),
        ("infer", ["birds", "--images", "a.jpg", "b.jpg"], ["checkpoint_name='birds'", "images=['a.jpg','b.jpg']"]),
        ("infer", ["birds", "a.jpg", "top_k=3"], ["checkpoint_name='birds'", "images=['a.jpg']", "top_k=3"]),
        ("test", ["birds"], ["checkpoint_name='birds'"]),
        ("test", ["birds", "photos/"], ["checkpoint_name='birds'", "test_dir='photos/'"]),
        ("report", ["one", "two"], ["name='one'", "other='two'"]),
        ("triton", ["start", "birds"], ["action='start'", "checkpoint_name='birds'"]),
        ("serve", ["birds"], ["checkpoint_name='birds'"]),
    ],
)
def test_the_words_of_the_other_verbs(verb: str, words: list[str], line: list[str]) -> None:
    assert overrides(verb, *words) == line


def test_a_path_with_an_equals_sign_is_a_path(folder: Path) -> None:
    Path("photos/cat/a=b.jpg").touch()
    assert overrides("infer", "birds", "photos/cat/a=b.jpg")[1] == "images=['photos/cat/a=b.jpg']"


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("train", ["phtos/"], "did you mean 'photos'? image-classifier train photos"),
        ("audit", ["phtos", "seed=1"], "image-classifier audit photos seed=1"),
        ("train", ["resnet18"], "it is a choice of model: image-classifier train model=resnet18"),
        ("train", ["cifar10"], "image-classifier train data=cifar10"),
        ("train", ["nothing"], "an archive or a table: image-classifier train FOLDER"),
        ("train", ["photos/cat/1.jpg"], "is neither a folder nor an archive nor a table"),
        ("train", ["photos", "data.dir=x"], "the images are given already: data.dir"),
        ("infer", ["photos"], "infer needs the name of a model: image-classifier infer NAME photos"),
        ("clean", ["cache"], "unexpected word 'cache': write image-classifier clean KEY=VALUE"),
        ("report", ["a", "b", "c"], "write image-classifier report NAME [OTHER] KEY=VALUE"),
    ],
)
def test_unclear_words_are_refused_with_the_corrected_line(verb: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        translate(verb, words)
    assert message in str(refused.value)


def test_another_name_of_a_verb(command: Command) -> None:
    assert "did you mean infer?" in command("predict", "photos").err
    assert "did you mean test?" in command("evaluate", "birds").err


def test_a_misspelt_folder_writes_nothing(command: Command, make_tree: MakeTree) -> None:
    """Once, the digits were written into a folder of that name."""
    make_tree("pictures", cat=6, dog=6)
    answer = command("prepare", "data.dir=picturse")
    assert answer.code == 2 and "does not exist" in answer.err, answer.err
    assert not Path("picturse").exists()


def test_a_folder_by_position_is_prepared(command: Command, make_tree: MakeTree) -> None:
    make_tree("pictures", cat=6, dog=6)
    answer = command("prepare", "pictures")
    assert (answer.code, "12 images, 2 classes" in answer.out + answer.err) == (0, True), answer.err


def _write_own(folder: Path) -> None:
    (folder / "conf/experiment").mkdir(parents=True)
    (folder / "conf/experiment/mine.yaml").write_text("# @package _global_\nseed: 7\n")


@pytest.mark.slow
def test_a_conf_folder_of_ones_own_adds_choices(command: Command, folder: Path) -> None:
    _write_own(folder)
    assert "\nseed: 7\n" in command("train", "experiment=mine", "--cfg", "job").out
    assert (
        "_target_: image_classifier.dataset.sources.Folder"
        in command("train", "photos", "experiment=mine", "--cfg", "job").out
    )
    assert "did you mean mine?" in command("train", "experiment=mien").err
    assert ", mine, " in next(line for line in command("train", "--help").out.split("\n") if "experiment (" in line)


@pytest.mark.slow
def test_a_run_sees_a_conf_folder_of_ones_own_in_any_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_tree: MakeTree, command: Command
) -> None:
    folder = tmp_path / "it's, [mine] (1)"
    (folder / "conf/data").mkdir(parents=True)
    (folder / "conf/data/own.yaml").write_text("defaults: [folder, _self_]\nsplit: {val: 0.5}\n")
    make_tree(cat=6, dog=6)
    monkeypatch.chdir(folder)
    answer = command("prepare", "data=own", f"data.dir={tmp_path / 'tree'}")
    assert "train 6, val 6" in answer.out + answer.err
    answer = command("prepare", "-m", "data=own", f"data.dir={tmp_path / 'tree'}", "seed=1,2")
    assert answer.code == 0 and "train 6, val 6" in answer.out + answer.err


def test_the_files_of_this_program_come_first(command: Command, folder: Path) -> None:
    (folder / "conf/model").mkdir(parents=True)
    (folder / "conf/model/resnet18.yaml").write_text("shadow: true\n")
    assert "shadow" not in command("train", "model=resnet18", "--cfg", "job").out


def test_other_conf_folders_are_not_ours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_conf() is None
    (folder / "conf/nginx").mkdir(parents=True)
    (folder / "conf/nginx/site.yaml").touch()
    assert own_conf() is None
    _write_own(folder)
    assert own_conf() == folder / "conf"
    monkeypatch.chdir(CONF_DIR.parent)
    assert own_conf() is None


@pytest.mark.slow
def test_a_config_dir_that_is_named_wins(command: Command, folder: Path) -> None:
    _write_own(folder)
    (folder / "other/experiment").mkdir(parents=True)
    (folder / "other/experiment/theirs.yaml").write_text("# @package _global_\nseed: 9\n")
    assert "\nseed: 9\n" in command("train", "--config-dir", "other", "experiment=theirs", "--cfg", "job").out
    assert command("train", "--config-dir", "other", "experiment=mine", "--cfg", "job").code == 2


def _script(folder: Path) -> Path:
    """The installed command, as pip writes it."""
    script = folder / "bin/image-classifier"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nfrom image_classifier.cli.main import run\nrun()\n")
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(
    "name", ["image-classifier", pytest.param("python -m image_classifier", marks=pytest.mark.slow)]
)
def test_the_installed_command_works_from_any_folder_and_names_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(CONF_DIR.parent))
    words = [str(_script(folder))] if name == "image-classifier" else [sys.executable, "-m", "image_classifier"]

    def run(*line: str) -> Any:
        return subprocess.run([*words, *line], capture_output=True, text=True, timeout=120)

    pages = [run("--help").stdout, run("train", "--help").stdout, run("infer", "--help").stdout]
    for page in pages:
        assert page.startswith(f"usage: {name} ")
        assert "commands.py" not in page
        assert page.count(f"{name} ") >= 3
    assert f"{name} train photos" in run("train", "phtos").stderr
    assert "commands.py" not in run("infer", "nothing", "photos").stderr
    assert f"train one first: {name} train" in run("infer", "nothing", "photos").stderr
