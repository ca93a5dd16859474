"""A training that cannot be: one line, exit code 2, nothing half-written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from image_classifier.atomic_io import file_lock
from tests.conftest import QUICK, Command, MakeTree, write_image

SMALL = (
    "data=folder",
    "data.dir=tree",
    "data.image_size=16",
    "data.batch_size=4",
    "trainer.max_epochs=1",
    *QUICK,
    "model.backbone.channels=[4,8]",
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def assert_refused(command: Command, folder: Path, line: tuple[str, ...], says: str) -> None:
    answer = command("train", *SMALL, *line)
    assert answer.code == 2, answer.err
    errors = [text for text in answer.err.splitlines() if text.startswith("error: ")]
    assert errors == answer.err.splitlines()[-1:] and says in errors[0], answer.err
    assert "Traceback" not in answer.err
    left = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix == ".part" or path.parent.name in ("models", "runs")
    ]
    assert left == []


def empty_class(root: Path) -> None:
    (root / "tree" / "bird").mkdir()


def one_class(root: Path) -> None:
    for path in (root / "tree" / "dog").iterdir():
        path.unlink()
    (root / "tree" / "dog").rmdir()


def one_image(root: Path) -> None:
    write_image(root / "tree" / "bird" / "only.png", 99)


def half_an_image(root: Path) -> None:
    path = next((root / "tree" / "dog").iterdir())
    path.write_bytes(path.read_bytes()[:-100])


def not_an_image(root: Path) -> None:
    (root / "tree" / "dog" / "text.png").write_text("hello")


def no_class_folders(root: Path) -> None:
    for number, path in enumerate(sorted((root / "tree").rglob("*.png"))):
        path.rename(root / "tree" / f"{number}.png")
    for label in ("cat", "dog"):
        (root / "tree" / label).rmdir()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (empty_class, "bird"),
        (one_class, "class"),
        (one_image, "bird"),
        (no_class_folders, "sub-folder"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_cannot_be_trained_on(
    command: Command, tree: Path, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(tmp_path)
    assert_refused(command, tmp_path, (), says)


@pytest.mark.parametrize(("damage", "says"), [(half_an_image, "dog/"), (not_an_image, "text.png")])
def test_a_broken_image_is_left_out_unless_it_is_to_be_an_error(
    command: Command, tree: Path, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(tmp_path)
    assert_refused(command, tmp_path, ("audit.exclude=[]",), says)
    assert_refused(command, tmp_path, ("audit.fail_on=error",), "audit.json")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("data.dir=nowhere",), "nowhere"),
        (("data.batchsize=3",), "data.batch_size"),
        (("model=convnett",), "convnet"),
        (("data.batch_size=many",), "data.batch_size"),
        (("data.batch_size=0",), "data.batch_size"),
        (("data.split.val=1.5",), "data.split.val"),
        (("model.backbone.channels=[4,4,4,4,4,4]",), "data.image_size"),
        (("+trainer.x=1",), "takes no argument 'x'"),
        (("optimizer._target_=os.system",), "os.system"),
        (("name=a/b",), "invalid name="),
        (("logger=mlflow", "logger.tracking_uri=./mlruns"), "sqlite:///mlflow.db"),
        (("trainer.precision=7",), "precision"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_setting_that_cannot_be(
    command: Command, tree: Path, tmp_path: Path, line: tuple[str, ...], says: str
) -> None:
    assert_refused(command, tmp_path, line, says)


def test_a_metric_nobody_logs_is_named(command: Command, tree: Path) -> None:
    answer = command("train", *SMALL, "callbacks.early_stopping.monitor=val/nothing")
    assert answer.code == 2
    assert "val/nothing" in answer.err.splitlines()[-1] and "Traceback" not in answer.err
    assert Path("runs/tree-convnet").exists() and not Path("models/tree-convnet").exists()


def test_a_loss_that_is_not_a_number_stops_the_run(command: Command, tree: Path, tmp_path: Path) -> None:
    answer = command("train", *SMALL, "optimizer=sgd", "optimizer.lr=1e30", "trainer.max_epochs=5", "name=hot")
    assert answer.code == 2
    assert "the loss became" in answer.err.splitlines()[-1] and "optimizer.lr" in answer.err
    assert not Path("models/hot").exists()


@pytest.mark.slow
def test_a_name_that_exists_is_refused_then_replaced_when_asked(command: Command, make_tree: MakeTree) -> None:
    make_tree(cat=10, dog=10)
    assert command("train", *SMALL, "name=mine").code == 0
    before = Path("models/mine/bundle.json").read_bytes()
    answer = command("train", *SMALL, "name=mine")
    assert answer.code == 2 and "overwrite=true" in answer.err
    assert Path("models/mine/bundle.json").read_bytes() == before
    assert command("train", *SMALL, "name=mine", "overwrite=true", "seed=1").code == 0
    assert Path("models/mine/bundle.json").read_bytes() != before
    assert sorted(path.name for path in Path("models").iterdir()) == ["mine"]


@pytest.mark.parametrize("taken", ["runs/mine", "models/mine"])
def test_a_name_that_is_taken_is_refused_before_the_data_is_read(tree: Path, command: Command, taken: str) -> None:
    Path(taken).mkdir(parents=True)
    answer = command("train", *SMALL, "name=mine")
    assert answer.code == 2 and answer.out == "" and not Path("data").exists()
    (line,) = answer.err.splitlines()
    assert line.startswith(f"error: the name 'mine' is taken: '{taken}' exists: ") and "overwrite=true" in line


@pytest.mark.parametrize("line", [(), ("overwrite=true",)], ids=" ".join)
def test_a_run_in_progress_is_not_resumed_or_replaced(tree: Path, command: Command, line: tuple[str, ...]) -> None:
    Path("runs/mine").mkdir(parents=True)
    with file_lock(Path("runs/.mine.lock")):
        answer = command("train", *SMALL, "name=mine", *line)
    assert answer.code == 2 and not Path("data").exists()
    assert answer.err == "error: a run named 'mine' is in progress: wait for it, or choose another name=\n"
