"""The seam: with a three-line backend, everything around it can be checked."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_classifier.errors import UnreadableImage
from image_classifier.images import Preprocess
from image_classifier.inference import predictor as predictor_module
from image_classifier.inference.predictor import Predictor
from image_classifier.sources.image_source import ImageSource


class Brightness:
    """Says "bright" in proportion to the mean of the pixels."""

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        assert pixels.dtype == np.uint8 and pixels.shape[1:] == (3, 8, 8)
        mean = pixels.mean(axis=(1, 2, 3)) / 255
        return np.stack([-4 * mean, 4 * mean], axis=1).astype(np.float32)


def predictor(batch_size: int = 4, temperature: float = 1.0) -> Predictor:
    return Predictor(Brightness(), ("dark", "bright"), Preprocess(8), temperature, batch_size)


@pytest.fixture
def greys(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"grey {level}.png" for level in range(0, 250, 25)]
    for level, path in zip(range(0, 250, 25), paths, strict=True):
        Image.new("L", (10 + level, 20), level).save(path)
    return paths


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_keep_the_order_and_do_not_depend_on_the_batch(greys: list[Path], batch_size: int) -> None:
    answers = list(predictor(batch_size).predict(greys))
    assert [answer.path for answer in answers] == [str(path) for path in greys]
    brightness = [answer.probabilities["bright"] for answer in answers]
    assert brightness == sorted(brightness)
    assert all(sum(answer.probabilities.values()) == pytest.approx(1) for answer in answers)
    assert all(
        answer.confidence == max(answer.probabilities.values()) == answer.probabilities[answer.label]
        for answer in answers
    )


def test_an_unreadable_image_is_a_row_with_its_reason(greys: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    answers = list(predictor().predict([greys[0], bad, greys[1], tmp_path / "missing.png"]))
    assert [bool(answer.error) for answer in answers] == [False, True, False, True]
    assert set(answers[1].answer()) == {"path", "error"}
    only_bad = list(predictor().predict([bad]))
    assert only_bad[0].error


def test_a_labelled_table_refuses_what_it_cannot_read(greys: list[Path], tmp_path: Path) -> None:
    table = predictor(temperature=2.0).table(greys, [path.name for path in greys], np.zeros(len(greys), np.int64))
    assert table.logits.shape == (len(greys), 2)
    direct = predictor(temperature=2.0).predict(greys)
    np.testing.assert_allclose(
        table.probabilities[:, 1], [answer.probabilities["bright"] for answer in direct], rtol=1e-6
    )
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"bad\.png"):
        predictor().table([*greys, tmp_path / "bad.png"], [""] * 11, np.zeros(11, np.int64))


def test_a_high_temperature_is_less_sure(greys: list[Path]) -> None:
    sure, unsure = (next(predictor(temperature=value).predict(greys[-1:])) for value in (1.0, 5.0))
    assert sure.label == unsure.label and sure.confidence > unsure.confidence > 0.5


def test_no_more_bytes_of_archives_are_read_ahead_than_may_lie_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_module, "_MAX_UNDECODED_BYTES", 2500)
    read, most = [0], [0]
    own = predictor(batch_size=8)

    def decode(content: bytes, limits: object) -> np.ndarray:
        time.sleep(0.01)
        read[0] -= len(content)
        return np.zeros((8, 8, 3), np.uint8)

    def items() -> Iterator[ImageSource]:
        for number in range(30):
            read[0] += 1000
            most[0] = max(most[0], read[0])
            yield ImageSource(f"{number}", bytes(1000))

    monkeypatch.setattr(Preprocess, "read", lambda _, content, limits: decode(content, limits))
    assert [prediction.path for prediction, _ in own.answers(items())] == [f"{number}" for number in range(30)]
    assert most[0] <= 4000  # and one that is on its way
