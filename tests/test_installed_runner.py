"""`pip install 'image-classifier[infer]'` from a wheel: answers without torch, in less than 400 MB."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.network

MAX_MB = 400


def ran(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment in which nothing but the runner is installed, from a wheel of this tree."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env")
    pip = (sys.executable, "-m", "pip") if _has_pip() else ("python3", "-m", "pip")
    wheel = ran(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, folder=folder)
    assert wheel.returncode == 0, wheel.stderr
    (made,) = folder.glob("image_classifier-*.whl")
    done = ran(*pip, "--python", folder / "env/bin/python", "install", "--quiet", f"{made}[infer]", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder / "env"


def _has_pip() -> bool:
    return subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0


def test_it_is_small_and_without_torch(runner: Path) -> None:
    packages = {path.name for path in runner.glob("lib/python3*/site-packages/*")}
    assert "image_classifier" in packages and not packages & {"torch", "mlflow", "pandas", "scipy", "sklearn"}
    size = sum(path.lstat().st_size for path in runner.rglob("*") if path.is_file())
    assert size / 1e6 < MAX_MB, f"{size / 1e6:.0f} MB"


def test_it_answers_and_verifies_as_the_whole_program(runner: Path, digits_bundle: Path, tmp_path: Path) -> None:
    program, images = runner / "bin/image-classifier", digits_bundle.parents[1] / "data/digits/test/3"
    line = ("infer", "--checkpoint_name", digits_bundle, "--images", images, "--format", "json")
    alone, whole = (
        ran(program, *line, folder=tmp_path),
        ran(sys.executable, ROOT / "commands.py", *line, folder=tmp_path),
    )
    assert alone.returncode == whole.returncode == 0, alone.stderr + whole.stderr
    assert json.loads(alone.stdout) == json.loads(whole.stdout)
    verified = ran(program, "verify", digits_bundle, folder=tmp_path)
    assert verified.returncode == 0 and "golden images" in verified.stdout, verified.stdout + verified.stderr
    refused = ran(program, "train", folder=tmp_path)
    assert refused.returncode == 2 and "image-classifier[train]" in refused.stderr
