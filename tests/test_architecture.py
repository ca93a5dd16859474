"""The promises of docs/architecture.md: what a verb loads, who prints, unique names, and that every config composes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import image_classifier

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ROOT / "commands.py"
CONF = ROOT / "conf"
SOURCES = sorted(
    [
        COMMANDS,
        *(ROOT / "image_classifier").rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]
)
TORCH_ZONE = ("torch", "torchvision", "lightning", "pytorch_lightning", "timm", "torchmetrics")

# Runs commands.py as a shell would and then says, on the last line of stderr, what of the torch zone it loaded.
PROBE = """
import os, runpy, sys
commands, zone, sys.argv = sys.argv[1], sys.argv[2].split(","), sys.argv[1:2] + sys.argv[3:]
sys.path[0] = os.path.dirname(commands)
code = 0
try:
    runpy.run_path(commands, run_name="__main__")
except SystemExit as stop:
    code = stop.code
print("loaded:", *(name for name in zone if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""

LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def assert_torch_free(cwd: Path, *line: str, timeout_s: float = 120) -> str:
    """Run `commands.py *line` in `cwd`, without a torch import; returns what it printed."""
    command = [sys.executable, "-c", PROBE, str(COMMANDS), ",".join(TORCH_ZONE), *line]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].split() == ["loaded:"], f"{line} {done.stderr.splitlines()[-1]}"
    return done.stdout


@pytest.mark.parametrize(
    "line",
    [(), ("--help",), ("train", "--help"), ("train", "--cfg", "job"), ("infer", "--help"), ("serve", "--help")],
    ids=" ".join,
)
def test_help_loads_no_torch(line: tuple[str, ...], tmp_path: Path) -> None:
    assert_torch_free(tmp_path, *line)


def test_prepare_audit_and_clean_load_no_torch(tmp_path: Path) -> None:
    manifest_path = tmp_path / "manifest.csv"
    assert_torch_free(
        tmp_path, "prepare", "data=digits", f"data.dir={tmp_path / 'digits'}", f"data.manifest_path={manifest_path}"
    )
    assert manifest_path.read_text(encoding="utf-8").startswith("path,label,split,group,sha256,width,height")
    assert "no issues" in assert_torch_free(tmp_path, "audit", "data=digits", f"data.dir={tmp_path / 'digits'}")
    assert "removed" in assert_torch_free(tmp_path, "clean")


def test_infer_with_an_onnx_bundle_loads_no_torch(digits_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    image_path = tmp_path / "seven.png"
    Image.new("RGB", (8, 8), "white").save(image_path)
    printed = assert_torch_free(
        tmp_path, "infer", "--checkpoint_name", str(digits_bundle), "--images", str(image_path), "--format", "jsonl"
    )
    assert '"predicted_class"' in printed


@pytest.mark.slow
def test_testing_an_onnx_bundle_loads_no_torch(digits_bundle: Path, tmp_path: Path) -> None:
    data = digits_bundle.parents[1] / "data/digits/test"
    line = ["--test_dir", str(data), "--plots_dir", str(tmp_path), "--robustness", "--robustness_images", "20"]
    assert "test accuracy" in assert_torch_free(tmp_path, "test", "--checkpoint_name", str(digits_bundle), *line)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_source_file_is_short_and_named_after_what_it_holds(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}


PACKAGE = sorted((ROOT / "image_classifier").rglob("*.py"))
# Their standard output is read by the process that started them.
READ_BY_A_PROGRAM = {"training/callbacks/optuna_pruning.py", "inference/latency.py"}


def _prints(tree: ast.AST) -> Iterator[int]:
    """Yield the lines that write to standard output or standard error by hand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno
        elif isinstance(node, ast.Attribute) and node.attr in ("write", "buffer"):
            value = node.value
            if isinstance(value, ast.Attribute) and value.attr in ("stdout", "stderr"):
                yield node.lineno


def test_only_the_command_line_prints() -> None:
    found = []
    for path in PACKAGE:
        name = path.relative_to(ROOT / "image_classifier").as_posix()
        if not name.startswith("cli/") and name not in READ_BY_A_PROGRAM:
            found += [f"{name}:{line}" for line in _prints(ast.parse(path.read_text(encoding="utf-8")))]
    assert found == []


def test_public_class_names_are_unique() -> None:
    places: dict[str, list[str]] = {}
    for path in PACKAGE:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_import_contracts() -> None:
    done = subprocess.run([sys.executable, "-c", LINT_IMPORTS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_the_changelog_knows_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{image_classifier.__version__}] - " in changelog
    assert f'\nversion = "{image_classifier.__version__}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def overrides_for(path: Path) -> list[list[str]]:
    """Ways to choose a group's option on the command line: replacing a default, or added to them."""
    group = path.parent.relative_to(CONF).as_posix()
    return [[f"{group}={path.stem}"], [f"+{group}={path.stem}"]]


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.relative_to(CONF).as_posix())
def test_every_config_composes(path: Path) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.errors import ConfigCompositionException
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationToMissingValueError

    import image_classifier.cli.hydra_app  # noqa: F401  (registers what the files may refer to)

    with initialize_config_dir(str(CONF), version_base="1.3"):
        if path.parent == CONF:
            config = compose(path.stem)
        else:
            replace, add = overrides_for(path)
            try:
                config = compose("train", replace)
            except ConfigCompositionException as error:
                if "Could not override" not in str(error):
                    raise
                config = compose("train", add)
    with suppress(InterpolationToMissingValueError):  # a value only the user can give, such as data.dir of data=folder
        OmegaConf.to_container(config, resolve=True)


def test_the_runner_needs_no_package_beyond_the_extra_infer(digits_bundle: Path, tmp_path: Path) -> None:
    """`pip install image-classifier[infer]` gives infer and verify; any other verb says in one line what it lacks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        Requirement(line).name for line in (*project["dependencies"], *project["optional-dependencies"]["infer"])
    }
    others = {
        Requirement(line).name for lines in project["optional-dependencies"].values() for line in lines
    } - declared
    missing = {name.replace("-", "_") for name in others} | {"sklearn"}
    code = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {missing!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import commands
commands.run()
"""
    image = next((digits_bundle.parents[1] / "data/digits/test/3").iterdir())
    for line, status, says in (
        (["infer", "--checkpoint_name", str(digits_bundle), "--images", str(image)], 0, str(image)[:40]),
        (["verify", str(digits_bundle), "--backend", "onnx"], 0, "golden images"),
        (["train"], 2, "pip install 'image-classifier[train]'"),
    ):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code, *line],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
        )
        assert done.returncode == status and says in done.stdout + done.stderr, done.stderr
