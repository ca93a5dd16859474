"""Dynamic batching: every request gets its own rows, and no batch takes longer than its limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.errors import ConfigError
from image_classifier.serving.worker.batching import BatchRequest, BatchResult, BatchSettings, DynamicBatcher


def rows(value: int, count: int = 1) -> np.ndarray:
    return np.full((count, 3, 2, 2), value, np.uint8)


class Model:
    """Answers the value of each row, as slowly as it is told, and remembers how many rows came at once."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.row_s = 0.0
        self.running = self.most_running = 0

    def run(self, pixels: np.ndarray, embeddings: bool) -> tuple[np.ndarray, np.ndarray | None]:
        self.sizes.append(len(pixels))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.open.wait()
        time.sleep(self.row_s * len(pixels))
        self.running -= 1
        if pixels.max() == 255:
            raise ValueError("an invalid row")
        found = pixels[:, 0, 0, 0].astype(np.float32)[:, None]
        return found, 2 * found if embeddings else None


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def make(model: Model) -> Iterator[Callable[..., DynamicBatcher]]:
    made: list[DynamicBatcher] = []

    def start(runners: int = 1, **asked: float) -> DynamicBatcher:
        made.append(DynamicBatcher(model.run, BatchSettings(**asked), runners=runners))  # type: ignore[arg-type]
        return made[-1]

    yield start
    model.open.set()
    for batches in made:
        batches.stop()


class Answers(list):  # type: ignore[type-arg]
    """Outcomes, in the order in which they came."""

    def of(self, count: int) -> Answers:
        end = time.monotonic() + 30
        while len(self) < count:
            assert time.monotonic() < end, "no answer"
            time.sleep(0.001)
        return self


@given(st.lists(st.integers(1, 7), min_size=1, max_size=40), st.integers(1, 16), st.integers(1, 3))
def test_each_gets_its_own_rows(counts: list[int], most: int, runners: int) -> None:
    model, answers = Model(), Answers()
    batches = DynamicBatcher(model.run, BatchSettings(max_images=most), runners=runners)
    try:
        for value, count in enumerate(counts):
            batches.put(
                BatchRequest(
                    rows(value, count), lambda found, value=value: answers.append((value, found)), value % 2 == 0
                )
            )
        for value, found in answers.of(len(counts)):
            np.testing.assert_array_equal(found.logits, np.full((counts[value], 1), value))
            assert value % 2 or (found.embeddings == 2 * value).all()
        assert runners > 1 or [value for value, _ in answers] == list(range(len(counts)))
        assert sum(model.sizes) == sum(counts) and all(size <= max(most, max(counts)) for size in model.sizes)
    finally:
        batches.stop()


def held(model: Model, batches: DynamicBatcher, answers: Answers) -> None:
    """Let the model be busy with one row, so that what comes next waits."""
    before = len(model.sizes)
    model.open.clear()
    batches.put(BatchRequest(rows(100), answers.append))
    while len(model.sizes) == before:
        time.sleep(0.001)


def test_what_waits_is_run_together(model: Model, make: Callable[..., DynamicBatcher]) -> None:
    batches, answers = make(max_images=8, max_ms=60_000), Answers()  # time is no limit
    held(model, batches, answers)
    for value in range(11):
        batches.put(BatchRequest(rows(value), answers.append))
    model.open.set()
    assert [found.batch for found in answers.of(12)] == [1] + [8] * 8 + [3] * 3
    assert model.sizes == [1, 8, 3]


def test_a_batch_is_no_longer_than_its_time(model: Model, make: Callable[..., DynamicBatcher]) -> None:
    model.row_s = 0.02
    batches, answers = make(max_images=32, max_ms=90), Answers()
    for value in range(60):
        batches.put(BatchRequest(rows(value), answers.append))
    answers.of(60)
    assert max(model.sizes[1:]) <= 5  # the first one was run before anything was known


def test_urgent_comes_first_and_idle_last(model: Model, make: Callable[..., DynamicBatcher]) -> None:
    batches, answers = make(max_images=1), Answers()
    held(model, batches, answers)
    for value, when in ((1, "idle"), (2, "next"), (3, "urgent"), (4, "next"), (5, "urgent")):
        batches.put(BatchRequest(rows(value), answers.append), when)
    model.open.set()
    assert [int(found.logits[0, 0]) for found in answers.of(6)] == [100, 3, 5, 2, 4, 1]


def test_what_nobody_waits_for_is_not_run(model: Model, make: Callable[..., DynamicBatcher]) -> None:
    batches, answers = make(), Answers()
    held(model, batches, answers)
    batches.put(BatchRequest(rows(1), answers.append, wanted=lambda: False))
    batches.put(BatchRequest(rows(2), answers.append))
    model.open.set()
    assert [int(found.logits[0, 0]) for found in answers.of(2)] == [100, 2] and model.sizes == [1, 1]


def test_an_error_reaches_all_of_its_batch_and_no_other(model: Model, make: Callable[..., DynamicBatcher]) -> None:
    batches, answers = make(max_images=2), Answers()
    held(model, batches, answers)
    for value in (255, 1, 2, 3):
        batches.put(BatchRequest(rows(value), answers.append))
    model.open.set()
    found: list[BatchResult] = answers.of(5)
    assert [str(one.error or "") for one in found] == ["", *["an invalid row"] * 2, "", ""]


def test_two_run_batches_beside_each_other_where_rows_take_long(
    model: Model, make: Callable[..., DynamicBatcher]
) -> None:
    model.row_s = 0.03
    batches, answers = make(runners=2), Answers()
    batches.put(BatchRequest(rows(1), answers.append))
    answers.of(1)  # how long a row takes is known
    assert model.most_running == 1
    for value in range(4):
        batches.put(BatchRequest(rows(value), answers.append))
    answers.of(5)
    assert model.most_running == 2


def test_a_few_rows_that_take_no_time_get_no_batch_beside_another(
    model: Model, make: Callable[..., DynamicBatcher]
) -> None:
    batches, answers = make(runners=2), Answers()
    batches.put(BatchRequest(rows(1), answers.append))
    answers.of(1)
    held(model, batches, answers)
    for value in range(9):
        batches.put(BatchRequest(rows(value), answers.append))
    time.sleep(0.05)
    assert model.sizes == [1, 1]  # the other one begins no batch of its own
    model.open.set()
    answers.of(11)


def test_what_has_waited_long_waits_for_no_runner_that_hangs(model: Model, make: Callable[..., DynamicBatcher]) -> None:
    batches, answers, others = make(runners=2, max_ms=50), Answers(), Answers()
    batches.put(BatchRequest(rows(1), answers.append))
    answers.of(1)
    held(model, batches, answers)
    batches.put(BatchRequest(rows(2), others.append))
    while len(model.sizes) < 3:
        time.sleep(0.001)
    model.open.set()
    assert int(others.of(1)[0].logits[0, 0]) == 2


def test_urgent_work_waits_for_no_batch_where_another_runner_is_free(
    model: Model, make: Callable[..., DynamicBatcher]
) -> None:
    batches, answers, urgent = make(runners=2), Answers(), Answers()
    held(model, batches, answers)
    batches.put(BatchRequest(rows(7), urgent.append), "urgent")
    while len(model.sizes) < 2:
        time.sleep(0.001)
    assert not answers
    model.open.set()
    assert int(urgent.of(1)[0].logits[0, 0]) == 7


def test_it_waits_a_little_for_images_that_are_being_decoded(model: Model, make: Callable[..., DynamicBatcher]) -> None:
    batches, answers = make(wait_ms=1000), Answers()
    batches.expect(2)
    batches.put(BatchRequest(rows(1), answers.append))
    batches.expect(-1)
    time.sleep(0.05)
    assert model.sizes == []
    batches.put(BatchRequest(rows(2), answers.append))
    batches.expect(-1)
    answers.of(2)
    assert model.sizes == [2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_images": 0},
        {"max_ms": 0},
        {"at_once": 0},
        {"wait_ms": -1},
        {"max_images": 10**6},
        {"wait_ms": float("nan")},
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        BatchSettings(**wrong)  # type: ignore[arg-type]
