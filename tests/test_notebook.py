"""The notebook of the documentation runs in an empty folder, only shorter, and shows what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs/python.ipynb"

# Runs each cell as a notebook does: its last expression is shown, as HTML where it can be.
RUNNER = """
import ast, json, sys
shown, names = [], {}
for source in json.load(sys.stdin):
    *steps, last = ast.parse(source).body
    value = None
    if isinstance(last, ast.Expr):
        exec(compile(ast.Module(steps, []), "cell", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    else:
        exec(compile(ast.Module([*steps, last], []), "cell", "exec"), names)
    shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
print(json.dumps(shown))
"""


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_it_was_saved_with_its_outputs_and_names_no_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert sum(bool(cell["outputs"]) for cell in cells) > len(cells) / 2
    assert "data:image/png;base64" in text and str(Path.home()) not in text and "Traceback" not in text


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path) -> None:
    sources = [source.replace('"max_epochs": 6', '"max_epochs": 1') for source in code_cells()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(sources),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    assert sum("data:image/png;base64" in value for value in shown) == 3  # an answer, several, a heat map
