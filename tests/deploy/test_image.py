"""The Dockerfile without a container engine: run its steps in a folder, start the ENTRYPOINT, run the HEALTHCHECK."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from image_classifier import __version__
from image_classifier.paths import CONF_DIR
from image_classifier.serving.worker.spec import version_of
from tests.conftest import ROOT
from tests.deploy.dockerfile import bare_environment, build, stages, the

pytestmark = [pytest.mark.network, pytest.mark.slow]

STAGES = stages(ROOT / "Dockerfile")
FINAL = STAGES[-1]
MAX_MB = 300
ENVIRONMENT = dict(word.split("=", 1) for word in the("ENV", FINAL).text.split() if not word.startswith("PATH="))


def python() -> Path:
    """The Python of the base image where it is installed, else this one."""
    named = STAGES[0][0].text
    assert named.startswith("${PYTHON_IMAGE}")
    version = (ROOT / "Dockerfile").read_text(encoding="utf-8").partition("PYTHON_IMAGE=python:")[2].partition("-")[0]
    found = shutil.which(f"python{version}")
    works = found and subprocess.run([found, "-c", "import ensurepip"], capture_output=True).returncode == 0
    return Path(found) if found and works else Path(sys.executable)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a file system in which the first stage has run."""
    folder = tmp_path_factory.mktemp("image")
    build(ROOT, STAGES[0], folder, python())
    return folder


def test_it_is_small_and_holds_no_torch_and_nothing_that_installs(image: Path) -> None:
    packages = {path.name for path in image.glob("opt/venv/lib/python3*/site-packages/*")}
    assert {"image_classifier", "fastapi", "onnxruntime"} <= packages
    assert not packages & {"torch", "mlflow", "pip", "setuptools", "hatchling", "pytest", "scipy"}
    size = sum(path.lstat().st_size for path in image.glob("opt/venv/**/*") if path.is_file())
    assert size / 1e6 < MAX_MB, f"{size / 1e6:.0f} MB"


def test_the_command_line_is_there(image: Path, tmp_path: Path) -> None:
    for words, said in (
        (["--help"], "serve" if (CONF_DIR / "serve.yaml").is_file() else "infer"),
        (["--version"], __version__),
    ):
        done = subprocess.run(
            [image / "opt/venv/bin/image-classifier", *words],
            cwd=tmp_path,
            env=bare_environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 and said in done.stdout, done.stderr


def test_drift_can_be_asked_there_and_an_alias_cannot(image: Path, digits_bundle: Path, tmp_path: Path) -> None:
    line = {"version": version_of(digits_bundle), "confidence": 0.5, "ood_score": None}
    log = tmp_path / f"runs/serve/{digits_bundle.name}.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text(60 * f"{json.dumps(line)}\n", encoding="utf-8")
    for name, code, said in (
        (digits_bundle.name, 0, "the last 60 answers"),
        ("models:/digits@champion", 2, "needs the package mlflow"),
    ):
        words = [image / "opt/venv/bin/image-classifier", "drift", name, "--models_dir", digits_bundle.parent]
        done = subprocess.run(
            words, cwd=tmp_path, env={**bare_environment(), **ENVIRONMENT}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code and said in done.stdout + done.stderr, done.stderr
        assert done.stderr.count("\n") == (code != 0)


@contextmanager
def started(image: Path, bundle: Path, home: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The ENTRYPOINT in a folder that nobody may write to, with a home of its own."""
    root = home.parent / "root"
    root.mkdir(mode=0o555)
    words = [
        {"8080": str(port), "/models": str(bundle.parent)}.get(word, word) for word in the("ENTRYPOINT", FINAL).words()
    ]
    settings = {
        **bare_environment(),
        "PATH": f"{image}/opt/venv/bin{os.pathsep}{os.environ['PATH']}",
        **ENVIRONMENT,
        "HOME": str(home),
        "TMPDIR": str(home),
    }
    with subprocess.Popen([*words, "--checkpoint_name", bundle.name], cwd=root, env=settings) as process:
        try:
            yield process
        finally:
            process.kill()
    assert list(root.iterdir()) == []


@pytest.mark.skipif(not (CONF_DIR / "serve.yaml").is_file(), reason="conf/serve.yaml is not here yet")
def test_it_becomes_healthy_and_ends_when_told(image: Path, digits_bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path / "home"
    home.mkdir()
    _, *check = the("HEALTHCHECK", FINAL).words()
    healthy = [str(image / "opt/venv/bin/python"), *(word.replace("8080", str(port)) for word in check)]
    with started(image, digits_bundle, home, port) as process:
        assert subprocess.run(healthy, capture_output=True).returncode != 0  # nobody listens yet
        deadline = time.monotonic() + 120
        while subprocess.run(healthy, capture_output=True).returncode != 0:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        process.send_signal(getattr(signal, the("STOPSIGNAL", FINAL).text))
        assert process.wait(60) == 0
    assert [path.name for path in home.rglob("*") if path.is_file()] == []
