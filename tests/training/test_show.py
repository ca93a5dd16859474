"""The verb `show`, and each recipe through a real training: what a person sees is what a training sees."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from image_classifier.errors import ConfigError
from image_classifier.manifest import Manifest, Record
from image_classifier.training.show import ShowSettings, choose_rows, draw_sheet, labels
from tests.conftest import QUICK, Command

CONF = Path(__file__).resolve().parents[2] / "conf"
RECIPES = sorted(path.stem for path in (CONF / "augment").glob("*.yaml"))
DATA = ("data=folder", "data.dir=tree", "data.image_size=16")


def manifest(counts: list[int]) -> Manifest:
    """Classes a, b, ... of so many rows, every fourth row in val."""
    labelled = [chr(97 + code) for code, count in enumerate(counts) for _ in range(count)]
    splits = ["val" if row % 4 == 3 else "train" for row in range(len(labelled))]
    rows = enumerate(zip(labelled, splits, strict=True))
    return Manifest.of(
        Path("x"),
        [Record(f"{row}.png", label, split, f"{row:016x}", f"{row:064x}", 8, 8) for row, (label, split) in rows],
    )


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=6), count=st.integers(1, 20), seed=st.integers(0, 9))
def test_the_chosen_rows_are_training_rows_of_as_many_classes_as_there_are(
    counts: list[int], count: int, seed: int
) -> None:
    table = manifest(counts)
    train = table.indices("train")
    rows = choose_rows(table, count, seed)
    assert len(rows) == len(set(rows.tolist())) == min(count, len(train)) and set(rows) <= set(train)
    assert len(set(table.targets[rows])) == min(count, len(set(table.targets[train])))
    assert np.array_equal(rows, choose_rows(table, count, seed))


def test_labels_are_names_or_the_two_greatest_shares() -> None:
    assert labels(torch.tensor(1), ("cat", "dog")) == ["dog"]
    assert labels(torch.tensor([0.25, 0.0, 0.75]), ("cat", "dog", "eel")) == ["75% eel", "25% cat"]
    assert labels(torch.tensor([0.001, 0.999]), ("cat", "dog")) == ["dog"]


@pytest.mark.parametrize("size", [1, 16, 200])
def test_a_sheet_shows_every_pixel_unchanged(size: int) -> None:
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    batch = (pixels, torch.tensor([0, 1]))
    names = ("a\nclass of many lines " * 9, "\udcff 猫")  # any folder's name is drawn somehow
    sheet = Image.open(io.BytesIO(draw_sheet([batch, (255 - pixels, batch[1])], names)))
    side = max(size, -(-128 // size) * size)
    first = np.asarray(sheet.crop((12, 12, 12 + side, 12 + side)).resize((size, size), Image.Resampling.NEAREST))
    assert np.array_equal(first, pixels[0].permute(1, 2, 0).numpy())
    assert sheet.size[0] == 2 * (side + 12) + 24


@pytest.mark.parametrize("key", ["count", "versions"])
def test_a_sheet_of_nothing_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be at least 1"):
        ShowSettings(**{key: 0})
    with pytest.raises(ConfigError, match="does not end with .png: write output=NAME.png"):
        ShowSettings(output="sheet.jpg")


def test_the_verb_writes_a_sheet_and_says_where(command: Command, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.parent)
    answer = command("show", *DATA, "augment=strong", "versions=2", "count=3")
    assert answer.code == 0, answer.err
    assert answer.out == "sheet    plots/show/tree-strong.png\n"
    first = Path("plots/show/tree-strong.png").read_bytes()
    assert Image.open(io.BytesIO(first)).size == (3 * (128 + 12) + 24, 12 + 3 * (128 + 3 * 15 + 12))
    assert (
        command("show", *DATA, "augment=strong", "versions=2", "count=3", "--output", "my sheet.png").out
        == "sheet    my sheet.png\n"
    )
    assert Path("my sheet.png").read_bytes() == first  # the seed decides it
    assert command("show", *DATA, "augment=none", "versions=1").code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[] if name == "strong" else pytest.mark.slow) for name in RECIPES]
)
def test_each_recipe_trains(recipe: str, command: Command, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.parent)
    balance = {"strong": "weights", "simpsons": "sampler"}.get(recipe, "none")
    line = (
        f"augment={recipe}",
        f"data.balance={balance}",
        "data.batch_size=4",
        "trainer.max_epochs=2",
        "model.backbone.channels=[4,8]",
    )
    answer = command("train", *DATA, *line, *QUICK, "name=x")
    assert answer.code == 0, answer.err
    assert f"balance: {balance} (every class has 8 training images)" in answer.err
    assert re.search(r"epoch 2/2  train/loss \d.*train/accuracy [01]\.\d+", answer.err)


def test_a_loss_that_takes_no_mixed_labels_is_one_line(
    command: Command, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree.parent)
    loss = ("loss._target_=torch.nn.MultiMarginLoss", "~loss.label_smoothing")
    answer = command("train", *DATA, *loss, "augment=mix", *QUICK, "name=x")
    assert answer.code == 2 and answer.err.splitlines()[-1].startswith(
        "error: loss: torch.nn.MultiMarginLoss takes one class per image"
    )
