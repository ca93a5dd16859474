"""The program as people start it: help, exit codes, quiet pipes, shell completion; fast, and without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import commands
from image_classifier.cli.conf_files import choices, root_groups
from image_classifier.cli.exit_codes import exit_code
from image_classifier.cli.main import VERBS
from image_classifier.errors import ConfigError, DataError
from image_classifier.paths import CONF_DIR

ROOT = CONF_DIR.parent
PROBE = "import sys, runpy; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
PROBE += "finally: print([m for m in ('torch', 'pytorch_lightning', 'mlflow') if m in sys.modules], file=sys.stderr)\n"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The program in its own process; the last line of stderr lists the heavy packages it loaded."""
    return subprocess.run(
        [sys.executable, "-c", PROBE, "commands.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_the_first_page_lists_the_verbs_and_is_quick() -> None:
    start = time.perf_counter()
    pages = [_run(), _run("--help")]
    assert time.perf_counter() - start < 4  # two starts on a busy machine; about 0.1 s each on an idle one
    for page in pages:
        assert page.returncode == 0
        assert all(f"\n  {verb} " in page.stdout for verb in VERBS)
        assert page.stdout.count("python commands.py ") >= 3
        assert page.stderr.strip() == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_a_root_file_and_a_help_page(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["commands.py", verb, "--help"])
    commands.main()
    page = capsys.readouterr().out
    assert VERBS[verb] in page
    assert "python commands.py " + verb in page
    for group, chosen in root_groups(CONF_DIR, verb).items():
        assert f"{group} ({chosen})" in page
        assert all(choice in page for choice in choices(CONF_DIR, group))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["infer", "--checkpoint_nam", "x"],
            "checkpoint_nam is not a key: did you mean checkpoint_name (conf/infer.yaml)?",
        ),
        (["infer"], "checkpoint_name and images are missing: write checkpoint_name=NAME images=PATH"),
        (["trainn"], "did you mean train?"),
        (["data=folder"], "write the verb first"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2_before_anything_is_loaded(arguments: list[str], words: str) -> None:
    done = _run(*arguments)
    assert done.returncode == 2
    message, heavy = done.stderr.strip().split("\n")
    assert message.startswith("error: ")
    assert words in message
    assert (heavy, done.stdout) == ("[]", "")


def test_show_the_configuration_without_loading_anything() -> None:
    done = _run("infer", "--cfg", "job", "--top_k", "3")
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert "top_k: 3" in done.stdout


def test_versions() -> None:
    assert _run("--version").stdout.startswith("image_classifier ")
    assert _run("train", "--version").stdout.startswith("Hydra ")


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        raise error

    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: fail(ConfigError("wrong", "mend it"))) == 2
    assert exit_code(lambda: fail(DataError("two\nlines"))) == 2
    assert exit_code(lambda: fail(DataError("\x1b[2J"))) == 2
    assert exit_code(lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: wrong: mend it\nerror: two lines\nerror: \\x1b[2J\nstopped by Ctrl-C\n"
    half_imported = ImportError("initialization failed")
    half_imported.__cause__ = KeyboardInterrupt()
    assert exit_code(lambda: fail(half_imported)) == 130
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: fail(ZeroDivisionError()))
    with pytest.raises(BrokenPipeError):  # not standard output's
        exit_code(lambda: fail(BrokenPipeError()))


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "import sys; from image_classifier.cli.exit_codes import exit_code\n"
    code += "def main():\n for i in range(99999): print(i)\nsys.exit(exit_code(main))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141
    process.stderr.close()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    "program",
    ["python commands.py", "image-classifier", pytest.param("python -m image_classifier", marks=pytest.mark.slow)],
)
def test_completion_in_a_real_bash(tmp_path: Path, program: str) -> None:
    script = f"""
    eval "$({program} -sc install=bash)"
    tab() {{ COMP_LINE="$1"; COMP_POINT=${{#1}}; image_classifier_completion; echo "${{COMPREPLY[*]}}"; }}
    tab "{program} inf"
    tab "{program} infer --form"
    tab "{program} train experiment=fas"
    tab "{program} train ./pho"
    complete -p {program.split()[0]}
    eval "$({program} -sc uninstall=bash)"
    complete -p {program.split()[0]} || echo none
    """
    (tmp_path / "python").symlink_to(sys.executable)
    installed = tmp_path / "image-classifier"
    installed.write_text(f"#!{sys.executable}\nfrom image_classifier.cli.main import run\nrun()\n")
    installed.chmod(0o755)
    path = os.pathsep.join([os.path.dirname(sys.executable), str(tmp_path), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    folder = ROOT if program.endswith(".py") else tmp_path
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60, env=environment
    )
    lines = done.stdout.splitlines()
    assert lines[:4] == ["infer", "--format=", "experiment=fast", ""], done.stderr
    assert "-o default" in lines[4]  # where nothing fits, bash itself offers files
    assert lines[5:] == ["none"]


def test_completion_offers_the_bundles_and_the_choices_of_ones_own(tmp_path: Path) -> None:
    for name in ("models/birds/bundle.json", "models/bees/bundle.json", "conf/experiment/mine.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("# @package _global_\nseed: 7\n")

    def tab(line: str) -> str:
        environment = {**os.environ, "COMP_LINE": line, "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-m", "image_classifier", "-sc", "query=bash"]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment).stdout

    assert tab("image-classifier infer b").split()[:2] == ["bees", "birds"]
    assert "birds" in tab("image-classifier serve ").split()
    assert tab("image-classifier train experiment=mi").split() == ["experiment=mine"]
    assert "model=base" not in tab("image-classifier train model=").split()
