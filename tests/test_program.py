"""How hints name the command, and how child processes are started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from image_classifier import program as module
from image_classifier.paths import PACKAGE_DIR
from image_classifier.program import child_command, inherited, program, torchrun_target


@pytest.mark.parametrize(
    ("argv0", "name", "target"),
    [
        ("commands.py", "python commands.py", "commands.py"),
        ("../my clone/commands.py", "python '../my clone/commands.py'", "'../my clone/commands.py'"),
        ("/usr/local/bin/image-classifier", "image-classifier", "-m image_classifier"),
        ("image-classifier.exe", "image-classifier", "-m image_classifier"),
        (str(PACKAGE_DIR / "__main__.py"), "python -m image_classifier", "-m image_classifier"),
        ("/usr/lib/ipykernel_launcher.py", "python commands.py", "commands.py"),
    ],
)
def test_the_command_is_named_as_it_was_called(
    monkeypatch: pytest.MonkeyPatch, argv0: str, name: str, target: str
) -> None:
    monkeypatch.setattr(sys, "argv", [argv0, "train"])
    assert (program(), torchrun_target()) == (name, target)
    monkeypatch.setattr(module, "_IS_CHECKOUT", False)
    assert program() == (name if "ipykernel" not in argv0 else "image-classifier")


def test_child_processes_import_the_package_and_name_the_command_of_their_parent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/image-classifier", "tune"])
    before = dict(os.environ)
    code = "from image_classifier.program import program; print(program())"
    with inherited():
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "image-classifier\n", done.stderr
    assert dict(os.environ) == before


@pytest.mark.parametrize("is_checkout", [True, False])
def test_a_child_runs_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_checkout: bool) -> None:
    """Also where a folder of the package is named like a module of Python's: html, for one."""
    monkeypatch.setattr(module, "_IS_CHECKOUT", is_checkout)
    with inherited():
        done = subprocess.run([*child_command(), "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("image_classifier "), done.stderr
