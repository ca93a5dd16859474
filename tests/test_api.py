"""The Python API: the same answers as the command line, from every form of image, without torch where there is ONNX."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import image_classifier as ic
from image_classifier.errors import CheckpointError, ConfigError, DataError, UnreadableImage
from tests.conftest import ROOT, Command, MakeTree

TINY = {
    "model": "mlp",
    "data": {"image_size": 8, "split": {"test": 0.2}},
    "trainer": {"max_epochs": 1},
    "logger": "none",
    "diagnostics": "none",
    "plots": {"figures": False},
}


def pixels_of(path: Path) -> np.ndarray:
    """RGB, uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def images(digits_bundle: Path) -> Path:
    return digits_bundle.parents[1] / "data/digits/test"


@pytest.fixture
def model(digits_bundle: Path) -> ic.Model:
    return ic.load(digits_bundle)


def test_every_form_of_an_image_gets_the_same_prediction(model: ic.Model, images: Path) -> None:
    path = next((images / "3").iterdir())
    pixels = pixels_of(path)
    expected = model.predict(path)
    forms = (str(path), path.read_bytes(), bytearray(path.read_bytes()), Image.open(path), pixels, pixels[:, :, 0])
    for form in forms:
        answer = model.predict(form)
        assert answer.label == expected.label
        assert answer.probabilities == expected.probabilities
    assert 0 < expected.confidence <= 1 and expected.decision in ("label", "abstain")
    assert sum(expected.probabilities.values()) == pytest.approx(1)


def test_several_images_come_as_a_list_in_their_order(model: ic.Model, images: Path) -> None:
    paths = sorted((images / "3").iterdir())[:3]
    pixels = np.stack([pixels_of(path) for path in paths])
    by_path, by_pixels = model.predict(paths), model.predict(pixels)
    assert [one.path for one in by_path] == [str(path) for path in paths]
    assert [one.probabilities for one in by_path] == [one.probabilities for one in by_pixels]
    in_folder = model.predict(images / "3")
    assert isinstance(in_folder, list) and len(in_folder) == len(list((images / "3").iterdir()))
    assert model.predict(str(images / "3" / "*.png")) == in_folder
    assert model.predict([paths[0]]) == by_path[:1]
    assert [one.label for one in model.iter_predict(paths[0].read_bytes())] == [by_path[0].label]


def test_it_answers_as_the_command_line(model: ic.Model, images: Path, command: Command) -> None:
    answer = command("infer", str(model.path), str(images / "5"), "--format", "json")
    assert json.loads(answer.out) == json.loads(json.dumps(model.predict(images / "5").to_dicts()))


def test_a_picture_lying_on_its_side_is_turned_upright(model: ic.Model, images: Path) -> None:
    """A camera notes how it was held: the pixels of the PIL image are on their side, and a file of it is too."""
    upright = Image.fromarray(pixels_of(next((images / "7").iterdir())))
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    expected = model.predict(np.asarray(upright)).probabilities
    assert model.predict(buffer.getvalue()).probabilities == expected
    assert model.predict(Image.open(buffer)).probabilities == expected


def test_a_list_goes_on_after_an_unreadable_image_and_a_single_one_raises(
    model: ic.Model, images: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    good = next((images / "1").iterdir())
    first, second = model.predict([broken, good])
    assert "not a" in first.error and second.label and not second.error
    with pytest.raises(UnreadableImage, match=r"broken\.png"):
        model.predict(broken)
    with pytest.raises(UnreadableImage, match="no such file"):
        model.predict(tmp_path / "absent.png")


def test_what_is_not_an_image_is_refused_with_what_to_give(model: ic.Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"float32 \[4, 4, 3\] is not an image"):
        model.predict(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ConfigError, match="int is not an image"):
        model.predict([3])
    with pytest.raises(DataError, match="no image"):
        model.predict(tmp_path)
    with pytest.raises(CheckpointError):
        ic.load(tmp_path / "absent")


def test_a_prediction_shows_its_picture_and_bars(model: ic.Model, images: Path) -> None:
    answer = model.predict(next((images / "3").iterdir()))
    page = answer._repr_html_()
    assert "data:image/png;base64," in page and f"<b>{answer.label}</b>" in page and page.count("width:14em") == 5
    assert model.predict(images / "3")._repr_html_().count("data:image/png") == 24  # and how many more there are


def test_names_of_strangers_run_no_script_in_a_notebook(model: ic.Model, images: Path, tmp_path: Path) -> None:
    odd = tmp_path / "<script>alert(1)<script>.png"
    odd.write_bytes(b"no image")
    assert "<script>" not in model.predict([odd])[0]._repr_html_()


def test_a_heat_map_shows_evidence_for_any_class(model: ic.Model, images: Path, tmp_path: Path) -> None:
    path = next((images / "3").iterdir())
    own, other = model.explain(path), model.explain(path, label="8")
    assert own.label == model.predict(path).label and other.label == "8" and own.heat.shape == own.picture.shape[:2]
    assert own.probability >= other.probability
    assert "data:image/png" in own._repr_html_()
    assert own.save(tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="no class 'x'"):
        model.explain(path, label="x")


def test_from_a_folder_to_a_model_and_its_scores(
    make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = make_tree("photos", cat=12, dog=12)
    found = ic.audit(tree, verbose=False)
    assert found.page.is_file() and found.exclude_path.is_file() and "24 images" in str(found)
    assert found._repr_html_().count("\n") == len(str(found).splitlines()) - 1
    result = ic.train(tree, name="mine", verbose=False, **TINY)
    assert result.name == "mine" and result.bundle_dir.resolve() == (tmp_path / "models/mine").resolve()
    trained = ic.load("mine")
    assert trained.classes == ("cat", "dog")
    scores = trained.evaluate()
    assert repr(scores).splitlines()[0].startswith("class ") and "test accuracy" in repr(scores)
    assert scores.metrics.scalars()["accuracy"] == pytest.approx(result.metrics["test"]["accuracy"])
    with pytest.raises(ConfigError, match="decision.risk 2"):
        trained.evaluate(decision={"risk": 2})
    assert trained.evaluate(tree, decision={"risk": 0.3}).table.targets.tolist() == [0] * 12 + [1] * 12
    (export,) = trained.export("sealed")
    assert export.form == "sealed" and (result.bundle_dir / "sealed.onnx").is_file()


def test_settings_are_checked_as_on_the_command_line(make_tree: MakeTree, model: ic.Model) -> None:
    tree = make_tree(cat=2, dog=2)
    with pytest.raises(ConfigError, match="trainr"):
        ic.train(tree, trainr={"max_epochs": 1})
    with pytest.raises(ConfigError, match="did you mean"):
        ic.train(f"{tree}s")
    with pytest.raises(ConfigError, match="seed cannot hold a set"):
        ic.train(tree, seed={1})
    with pytest.raises(ConfigError, match="did you mean split"):
        model.evaluate(splt="val")
    with pytest.raises(ConfigError, match="there is no format 'onxx'"):
        model.export("onxx")


def test_importing_loads_nothing_heavy_and_an_onnx_bundle_needs_no_torch(digits_bundle: Path, images: Path) -> None:
    code = f"""
import sys
import image_classifier as ic
assert not {{"numpy", "PIL", "torch", "hydra"}} & set(sys.modules), "import"
assert {{"train", "load", "audit"}} <= set(dir(ic))
model = ic.load({str(digits_bundle)!r})
assert model.predict({str(next((images / "3").iterdir()))!r}).label in model.classes
assert not {{"torch", "hydra", "omegaconf"}} & set(sys.modules), "predict"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_training_without_its_packages_says_what_brings_them(make_tree: MakeTree) -> None:
    tree = make_tree(cat=2, dog=2)
    code = f"""
import sys
sys.modules["torch"] = None
import image_classifier as ic
try:
    ic.train({str(tree)!r})
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "ConfigError this needs the package torch" in done.stdout and "image-classifier[train]" in done.stdout
