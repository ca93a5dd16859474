"""The bundle as a model of MLflow: any way to give a picture, the same answers, no torch; promoted and served for
real.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from image_classifier.bundle import read_bundle
from image_classifier.exporting.mlflow_model import REQUIREMENTS
from image_classifier.images import decode
from image_classifier.inference.load import load_predictor
from tests.conftest import ROOT, Command, run_command

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
READY_S = 90


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle that holds a model of MLflow; written by the command in a process of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copytree(trained, folder / "here")
    line = [sys.executable, str(ROOT / "commands.py"), "export", "digits", "--to", "mlflow", "--images", "20"]
    done = subprocess.run(line, cwd=folder / "here", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mlflow    100.00% of 20 images")
    return folder / "here"


def test_every_way_to_give_a_picture_has_the_answer_of_infer(exported: Path) -> None:
    from image_classifier.mlflow_tracking import load_pyfunc

    model, predictor = load_pyfunc(exported / "models/digits/mlflow"), load_predictor(exported / "models/digits")
    file = sorted((exported / "data/digits/test/3").iterdir())[0]
    (expected,) = predictor.predict([file])
    text = base64.b64encode(file.read_bytes()).decode()
    array = decode(file)
    ways: list[Any] = [
        [file],
        [file.read_bytes()],
        [text],
        [f"data:image/png;base64,{text}"],
        [{"image": text}],
        array,
        array[None],
        np.stack([array]),
        array.astype(np.int64),  # what a server makes of an array in JSON
        np.array(text),
        {"image": np.array([text])},
        {"image": [text]},
    ]
    for way in ways:
        (answer,) = model.predict(way)
        assert answer["predicted_class"] == expected.label and answer["confidence"] == pytest.approx(
            expected.confidence, abs=1e-6
        )
        assert answer["prediction_set"] == list(expected.prediction_set or ()) and set(
            answer["all_predictions"]
        ) == set(predictor.classes)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([{"path": "/etc/passwd"}], "names a file, which is off"),
        ([np.zeros((8, 8, 3), np.float32)], "is an array float32"),
        ([np.full((8, 8, 3), 256)], "is an array int64"),
        ([np.zeros((8, 8), np.uint8)], "is an array uint8 of shape (8, 8)"),
        (["not base64!"], "is text but not base64"),
        ([b"half a picture"], "cannot be read"),
        ([0.5], "is of the type float"),
        ([None], "is of the type NoneType"),
    ],
)
def test_what_is_no_picture_is_refused_in_words(exported: Path, wrong: Any, says: str) -> None:
    from mlflow.exceptions import MlflowException

    from image_classifier.mlflow_tracking import load_pyfunc

    with pytest.raises(MlflowException) as caught:
        load_pyfunc(exported / "models/digits/mlflow").predict(wrong)
    assert says in str(caught.value)


def test_the_requirements_are_all_that_inference_imports(exported: Path) -> None:
    code = """
import sys
from pathlib import Path
before = {name.partition(".")[0] for name in sys.modules}
from image_classifier.inference.load import load_predictor
list(load_predictor(Path("models/digits")).predict([sorted(Path("data/digits/test/3").iterdir())[0]]))
print(*{name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=exported,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    found = {name for name in done.stdout.split() if not name.startswith("_")} - {
        "image_classifier",
        "markdown_it",
        "mdurl",
        "pygments",
    }
    assert {name.lower().replace("pil", "pillow") for name in found} <= set(REQUIREMENTS)
    pinned = (exported / "models/digits/mlflow/requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in pinned} == {"mlflow", *REQUIREMENTS} and not any(
        "torch" in line for line in pinned
    )
    assert str(exported) not in (exported / "models/digits/mlflow/MLmodel").read_text()


def test_promote_needs_a_whole_bundle_with_a_model(
    trained: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = command("promote", str(trained / "models/digits"))
    assert answer.code == 2 and "export" in answer.err and "--to mlflow" in answer.err
    shutil.copytree(exported / "models/digits", tmp_path / "models/damaged")
    with (tmp_path / "models/damaged/mlflow/MLmodel").open("a") as file:
        file.write("# more\n")
    answer = command("promote", "damaged")
    assert answer.code == 2 and "MLmodel" in answer.err and "damaged" in answer.err
    assert command("promote", "damaged", "--alias", "Not One").code == 2
    assert not Path("mlflow.db").exists()


def test_nothing_is_registered_but_what_was_exported(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    listed = read_bundle(exported / "models/digits").info.exports["mlflow"]["files"]
    assert not [file for file in listed if "__pycache__" in file]
    shutil.copytree(exported / "models/digits", tmp_path / "models/more")
    (tmp_path / "models/more/mlflow/code/numpy.py").write_text("print('run by a server')")
    answer = command("promote", "more")
    assert answer.code == 0 and "more version 1 is @champion" in answer.out, answer.err
    (place,) = (path.parent for path in tmp_path.glob("mlruns/**/MLmodel"))
    assert {f"mlflow/{path.relative_to(place).as_posix()}" for path in place.rglob("*") if path.is_file()} == set(
        listed
    )


@pytest.fixture
def served(exported: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[str]:
    """The address of `mlflow models serve` of the champion, a real process."""
    monkeypatch.chdir(exported)
    for version in ("1", "2"):
        answer = run_command(monkeypatch, capfd, ("promote", "digits", "--tracking_uri", "sqlite:///registry.db"))
        assert answer.code == 0, answer.err
        assert f"digits version {version} is @champion" in answer.out
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [
        str(BIN / "mlflow"),
        "models",
        "serve",
        "-m",
        "models:/digits@champion",
        "--env-manager",
        "local",
        "--port",
        str(port),
    ]
    places = {"MLFLOW_TRACKING_URI": "sqlite:///registry.db", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with (exported / "serve.log").open("w") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, env={**os.environ, **places}, start_new_session=True)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + READY_S
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=5)
                break
            except OSError:
                assert process.poll() is None, (exported / "serve.log").read_text()
                time.sleep(0.3)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_champion_is_served_and_answers_pictures(served: str, exported: Path) -> None:
    def asked(content: object) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"{served}/invocations", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    predictor = load_predictor(exported / "models/digits")
    files = sorted((exported / "data/digits/test/7").iterdir())[:3]
    texts, decoded = (
        [base64.b64encode(file.read_bytes()).decode() for file in files],
        [decode(file).tolist() for file in files],
    )
    for content in (
        {"inputs": [{"image": text} for text in texts]},
        {"inputs": texts},
        {"dataframe_records": [{"image": text} for text in texts]},
        {"inputs": {"image": texts}},
        {"inputs": decoded},
    ):
        status, answer = asked(content)
        assert status == 200, answer
        for found, expected in zip(answer["predictions"], predictor.predict(files), strict=True):
            assert found["predicted_class"] == expected.label and found["confidence"] == pytest.approx(
                expected.confidence, abs=1e-6
            )
    for wrong in ({"inputs": [0.5]}, {"inputs": [{"path": "/etc/passwd"}]}, {"inputs": ["AAAA"]}):
        status, answer = asked(wrong)
        assert status == 400 and "input 0" in answer
