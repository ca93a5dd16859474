"""Paths that the system will not look at are rows like any other."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from image_classifier.errors import UnreadableImage
from image_classifier.images import DecodeLimits, load_bytes
from image_classifier.inference.sort_into import Sorter
from image_classifier.sources.dvc import pull_missing
from image_classifier.sources.image_source import ImageSource
from tests.conftest import Command
from tests.sources.test_inputs import found

LONG = "x" * 5000


def refusal(item: ImageSource) -> str:
    with pytest.raises(UnreadableImage) as caught:
        load_bytes(Path(item.name))
    return caught.value.reason


@pytest.mark.parametrize("name", [LONG, f"{LONG}.zip", f"{LONG}.csv", f"folder/{LONG}.png", "zero\0.png"])
def test_a_name_that_no_system_takes_is_a_row(name: str) -> None:
    pull_missing(Path(name), None)
    Sorter(Path("out"), DecodeLimits()).check([name])
    (item,) = found([name])
    assert item.name == name and refusal(item)


def test_such_a_name_is_one_row_and_exit_code_2(
    command: Command, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    answer = command("infer", "--checkpoint_name", "digits", "--format", "json", "--images", LONG)
    reason = "no such file" if sys.version_info >= (3, 14) else "File name too long"
    assert answer.code == 2 and json.loads(answer.out) == [{"path": LONG, "error": reason}]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look anywhere")
def test_a_folder_that_may_not_be_looked_into_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    pull_missing(tmp_path / "closed" / "1.png", None)
    (item,) = found([str(tmp_path / "closed" / "1.png")])
    assert refusal(item) == "Permission denied"
