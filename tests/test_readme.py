"""The README's commands run as written, only shorter."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
SHORTER = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=2"]


def in_order() -> list[list[str]]:
    lines = [line.replace("make train", "python commands.py train") for line in COMMANDS]
    return [shlex.split(line) for line in lines if line.startswith("python ")]


def test_there_are_commands_of_every_verb() -> None:
    verbs = {line[2] for line in in_order()}
    assert verbs >= {"train", "test", "infer"}


@pytest.mark.slow
def test_every_command_runs_one_after_the_other(tmp_path: Path) -> None:
    for line in in_order():
        short = SHORTER if line[2] == "train" and "--cfg" not in line else []
        run([*line, *short], tmp_path)


def run(line: list[str], folder: Path) -> None:
    command = [sys.executable, str(ROOT / "commands.py"), *line[2:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{shlex.join(line)}\n{done.stderr}"


def test_the_make_targets_exist() -> None:
    targets = {line.split()[1] for line in COMMANDS if line.startswith("make ")}
    assert {"train", "test"} <= targets
    for target in targets | {"lint", "lock", "repro", "docs"}:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_tree_of_the_readme_is_there() -> None:
    rows = re.findall(r"^\| ((?:`[^`]+` ?)+)\|", README.partition("## The tree")[2], re.MULTILINE)
    paths = [path for row in rows for path in re.findall(r"`([^`]+)`", row) if path != "runs/"]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert {path.name for path in ROOT.glob("conf/*/") if path.name not in ("hydra",)} <= set(
        re.findall(r"`(\w+)`", README)
    )


@pytest.mark.parametrize(
    "group",
    sorted(
        path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name not in ("hydra", "experiment")
    ),
)
def test_the_choices_of_each_group_are_listed(group: str) -> None:
    (row,) = re.findall(rf"^\| `{group}` \| (.*?) \|", README.partition("## Config groups")[2], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} - {"base"}
