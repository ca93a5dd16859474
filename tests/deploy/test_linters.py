"""The linters of CI are those of .pre-commit-config.yaml: they pass what is here, and see what is wrong."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import promql_parser
import pytest
import yaml

from image_classifier.evaluation.drift import FEWEST
from image_classifier.exporting.triton import TritonSettings, compose_of
from tests.conftest import ROOT

(REPO,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
HOOKS = {hook["id"]: hook for hook in REPO["hooks"]}
RULES = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text(encoding="utf-8"))
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}


def lint(hook: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """The very command of the hook, with the tools of this environment."""
    program, *rest = shlex.split(HOOKS[hook]["entry"])
    found = shutil.which(Path(program).name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{program} is not installed: run make setup"
    return subprocess.run([found, *rest, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, timeout=60)


WRONG = {
    "hadolint": ("Dockerfile", "USER 10001:10001", "USER root"),
    "compose": ("docker-compose.yml", "read_only: true", "read_only: [maybe]"),
    "kubernetes": ("deploy/kubernetes/deployment.yaml", "readinessProbe:", "readynessProbe:"),
    "yamllint": ("deploy/prometheus/rules.yml", "groups:", "groups :"),
}


@pytest.mark.parametrize("hook", sorted(WRONG))
def test_a_linter_passes_what_is_here_and_sees_what_is_wrong(hook: str, tmp_path: Path) -> None:
    name, right, wrong = WRONG[hook]
    assert re.search(HOOKS[hook]["files"], name)
    passed = lint(hook, ROOT / name)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    text = (ROOT / name).read_text(encoding="utf-8")
    assert right in text
    bad = tmp_path / Path(name).name
    bad.write_text(text.replace(right, wrong), encoding="utf-8")
    assert lint(hook, bad).returncode != 0


def test_every_manifest_is_linted() -> None:
    hook = HOOKS["kubernetes"]
    names = [str(path.relative_to(ROOT)) for path in (ROOT / "deploy/kubernetes").rglob("*.yaml")]
    left = [name for name in names if not re.search(hook["files"], name) or re.search(hook["exclude"], name)]
    assert sorted(left) == ["deploy/kubernetes/keys/kustomization.yaml", "deploy/kubernetes/kustomization.yaml"]


@pytest.mark.skipif(
    not shutil.which("kubectl"), reason="kubectl, which puts a kustomization together, is not installed"
)
@pytest.mark.parametrize("keys", [False, True])
def test_the_whole_kustomization_is_valid(keys: bool, tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "deploy/kubernetes", tmp_path / "kubernetes")
    if keys:
        path = folder / "kustomization.yaml"
        path.write_text(
            path.read_text(encoding="utf-8").replace("# components:", "components:").replace("#   - keys", "  - keys"),
            encoding="utf-8",
        )
    made = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    whole = tmp_path / "whole.yaml"
    whole.write_text(made.stdout, encoding="utf-8")
    assert lint("kubernetes", whole).returncode == 0
    assert ("--access.keys_file=/keys/keys.txt" in made.stdout) is keys


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_compose_file_of_a_triton_export_is_valid(device: str, tmp_path: Path) -> None:
    path = tmp_path / "docker-compose.yml"
    path.write_text(compose_of(TritonSettings(device=device)), encoding="utf-8")
    found = lint("compose", path)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_an_alert_can_be_read_and_asks_for_figures_that_there_are(alert: str) -> None:
    rule = ALERTS[alert]
    promql_parser.parse(rule["expr"])
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"} and set(rule["annotations"]) == {
        "summary",
        "description",
    }
    assert rule["labels"]["severity"] in ("page", "ticket")
    source = ROOT / "image_classifier/serving/metrics.py"
    if not source.is_file():
        pytest.skip("image_classifier/serving/metrics.py is not here yet")
    text = source.read_text(encoding="utf-8")
    asked = {re.sub(r"_(total|bucket)$", "", name) for name in re.findall(r"\bimage_classifier_(\w+)", rule["expr"])}
    assert [name for name in asked if f'"{name}"' not in text] == []


def test_prometheus_reads_rules_that_there_are() -> None:
    settings = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    assert [name for name in settings["rule_files"] if not (ROOT / "deploy/prometheus" / name).is_file()] == []
    with pytest.raises(ValueError, match="."):
        promql_parser.parse("sum by (job) (rate(up[5m])")


def test_drift_wakes_somebody_only_where_the_program_would_speak_of_it() -> None:
    expression = ALERTS["ImageClassifierDrifted"]["expr"]
    assert "drift_distance > image_classifier_drift_limit" in expression and f"drift_images >= {FEWEST}" in expression


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool, which counts as Prometheus does, is not installed")
@pytest.mark.parametrize(
    ("distance", "images", "minutes", "woken"),
    [(0.3, 50, 62, True), (0.3, 49, 62, False), (0.1, 50, 62, False), (0.3, 50, 30, False)],
)
def test_prometheus_itself_sees_the_drift(
    distance: float, images: int, minutes: int, woken: bool, tmp_path: Path
) -> None:
    labels = {"model": "digits", "figure": "confidence", "instance": "serve:8080"}
    shown = ",".join(f'{name}="{value}"' for name, value in labels.items())
    values = {"drift_distance": distance, "drift_limit": 0.1, "drift_images": images}
    series = [
        {"series": f"image_classifier_{name}{{{shown}}}", "values": f"{value}x90"} for name, value in values.items()
    ]
    rule = ALERTS["ImageClassifierDrifted"]
    words = {
        "summary": "digits: the traffic's confidence lies 0.30 from val's",
        "description": rule["annotations"]["description"],
    }
    expected = [{"exp_labels": {**labels, **rule["labels"]}, "exp_annotations": words}] if woken else []
    asked = {"eval_time": f"{minutes}m", "alertname": rule["alert"], "exp_alerts": expected}
    case = {
        "rule_files": [str(ROOT / "deploy/prometheus/rules.yml")],
        "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": [asked]}],
    }
    (tmp_path / "case.yml").write_text(yaml.safe_dump(case), encoding="utf-8")
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "case.yml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
