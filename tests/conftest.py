"""Shared fixtures: tiny folder-per-class trees and the real images beside the repository."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from image_classifier.atomic_io import file_lock
from image_classifier.dataset.discovery import discover
from image_classifier.dataset.prepare import manifest_of
from image_classifier.dataset.scan import scan_files
from image_classifier.images import DecodeLimits
from image_classifier.manifest import Manifest

if "PYTEST_XDIST_WORKER" in os.environ:
    # The processes of a test run share the cores; torch's threads would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline: how long an example takes says more about the machine's other work.
settings.register_profile("project", deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=1000)  # make test ARGS=--hypothesis-profile=thorough
settings.load_profile("project")

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = shlex.join(["python", str(ROOT / "commands.py")])  # as hints name it in the tests
QUICK = ("logger=none", "plots.figures=false", "diagnostics=none")  # a training without what is told to people
MakeTree = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def one_table_of_operators() -> Iterator[None]:
    """Build the exporter's table of ONNX operators once per process: it takes longer than a small training."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images, `../shared/data` from the repository's root."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("../shared/data is not here: no real images to test on")
    return path


def write_image(path: Path, seed: int, size: int = 12) -> Path:
    """A small PNG whose content is decided by `seed`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """`make_tree(cat=5, dog=5)` writes different images, so many per class, and returns the root."""

    def make(name: str = "tree", /, **counts: int) -> Path:
        root = tmp_path / name
        seed = 0
        for label, count in counts.items():
            for number in range(count):
                seed += 1
                write_image(root / label / f"{number:03d}.png", seed)
        return root

    return make


@pytest.fixture
def tree(make_tree: MakeTree) -> Path:
    """Two classes of ten images."""
    return make_tree(cat=10, dog=10)


def listed(root: Path) -> Manifest:
    """The images of a tree as a table, in the splits that it gives; nothing is left in the current folder."""
    tree = discover([root])
    with tempfile.TemporaryDirectory() as store:
        facts = scan_files(tree, Path(store), DecodeLimits(), (255, 255, 255))
        assert not facts.errors
        return manifest_of(tree, facts, np.arange(len(tree.images)))


@dataclass(frozen=True)
class Answer:
    """What a command did: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`command("train", "data.dir=x")` runs commands.py in this process, as a shell would in the current folder."""
    return lambda *line: run_command(monkeypatch, capfd, line)


def run_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], line: tuple[str, ...]) -> Answer:
    import commands
    from image_classifier.cli.exit_codes import exit_code

    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", [str(ROOT / "commands.py"), *map(str, line)])
    try:
        code = exit_code(commands.main)
    except SystemExit as end:  # findings of an audit, a run that was stopped
        code = int(end.code or 0)
    out, err = capfd.readouterr()
    return Answer(code, out, err)


def run_apart(*line: str, folder: Path | None = None) -> Answer:
    """The same in a process of its own: one of pytest in which OpenVINO has answered ends at the next signal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(ROOT / "commands.py"), *map(str, line)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this process in which `train` ran on a few batches of digits, with MLflow in a local file."""
    shared = _shared(tmp_path_factory)
    _train_once(shared)
    folder = tmp_path_factory.mktemp("own") / "trained"
    shutil.copytree(shared / "trained", folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def training_beside_the_first_tests(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[None]:
    """Make the folder `trained` in one process while all run other tests, so that none waits for it."""
    if os.environ.get("PYTEST_XDIST_WORKER") != "gw0" or not any(
        _on_the_trained_folder(item) for item in request.session.items
    ):
        yield
        return
    thread = Thread(target=_train_once, args=(_shared(tmp_path_factory),))
    thread.start()
    yield
    thread.join()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests on the trained folder come last."""
    late = {item.path for item in items if _on_the_trained_folder(item)}
    items.sort(key=lambda item: item.path in late)


def _on_the_trained_folder(item: pytest.Item) -> bool:
    return "trained" in getattr(item, "fixturenames", ())


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of all processes of one test run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def _train_once(shared: Path) -> None:
    with file_lock(shared / "trained.lock"):
        if not (shared / "trained" / "stdout.txt").exists():
            _train(shared / "trained")


def _train(folder: Path) -> None:
    folder.mkdir()
    line = ["train", "name=digits", "trainer.max_epochs=2", "+trainer.limit_train_batches=6"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "commands.py"), *line],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    (folder / "stderr.txt").write_text(done.stderr)
    (folder / "stdout.txt").write_text(done.stdout)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The Chromium that is installed, with a camera that is not real; none is downloaded."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=binary, args=["--no-sandbox", "--use-fake-device-for-media-stream"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def digits_bundle(trained: Path) -> Path:
    """A trained bundle."""
    return trained / "models" / "digits"
