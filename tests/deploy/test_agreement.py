"""The Dockerfile, docker-compose.yml, deploy/ and the program agree on ports, users, paths, versions and flags."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from image_classifier import __version__
from image_classifier.exporting.triton import TritonSettings
from image_classifier.inference.triton.server import FLAGS
from image_classifier.paths import CONF_DIR
from tests.conftest import ROOT
from tests.deploy.dockerfile import sent_to_the_builder, stages, the

IMAGE = f"image-classifier:{__version__}"
FINAL = stages(ROOT / "Dockerfile")[-1]
ENTRYPOINT = the("ENTRYPOINT", FINAL).words()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
KUBERNETES = ROOT / "deploy/kubernetes"
OBJECTS = {
    found["kind"]: found
    for path in sorted(KUBERNETES.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for found in yaml.safe_load_all(path.read_text(encoding="utf-8"))
}
KUSTOMIZATION = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text(encoding="utf-8"))
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
KEYS = yaml.safe_load((KUBERNETES / "keys/kustomization.yaml").read_text(encoding="utf-8"))
SERVE = (
    yaml.safe_load((CONF_DIR / "serve.yaml").read_text(encoding="utf-8"))
    if (CONF_DIR / "serve.yaml").is_file()
    else None
)
needs_serve = pytest.mark.skipif(SERVE is None, reason="conf/serve.yaml is not here yet")
SECRET = re.compile(r"passw|secret|token|api_?key", re.IGNORECASE)


def flag(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_one_version() -> None:
    assert the("LABEL", FINAL).text.count(f'org.opencontainers.image.version="{__version__}"') == 1
    assert {service["image"] for name, service in SERVICES.items() if name.startswith("serve")} == {IMAGE}
    assert KUSTOMIZATION["images"] == [{"name": CONTAINER["image"], "newTag": __version__}]
    for page in ("Dockerfile", "docs/deployment.md"):
        assert set(re.findall(r"image-classifier:(\d[\w.]*)", (ROOT / page).read_text(encoding="utf-8"))) == {
            __version__
        }, page


def test_one_port() -> None:
    port = flag(ENTRYPOINT, "--port")
    check = the("HEALTHCHECK", FINAL).words()[-1]
    assert the("EXPOSE", FINAL).text == port and f"'127.0.0.1', {port}," in check and "'/readyz'" in check
    assert SERVICES["serve"]["ports"] == [f"127.0.0.1:${{SERVE_PORT:-{port}}}:{port}"]
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": int(port)}]
    assert (
        OBJECTS["Service"]["spec"]["ports"][0]["targetPort"]
        == OBJECTS["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"]
        == "http"
    )
    assert OBJECTS["Deployment"]["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == port
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"][
        0
    ]
    assert scraped["static_configs"] == [{"targets": [f"serve:{port}"]}] and scraped["job_name"] == COMPOSE["name"]


def test_one_user_and_it_is_not_root() -> None:
    user = the("USER", FINAL).text
    uid, gid = map(int, user.split(":"))
    assert uid and SERVICES["serve"]["user"] == user
    assert (POD["securityContext"]["runAsUser"], POD["securityContext"]["runAsGroup"]) == (uid, gid)


def test_one_folder_of_models() -> None:
    folder = flag(ENTRYPOINT, "--models_dir")
    assert f"./models:{folder}:ro" in SERVICES["serve"]["volumes"]
    (mount,) = [mount for mount in CONTAINER["volumeMounts"] if mount["name"] == "models"]
    (volume,) = [volume for volume in POD["volumes"] if volume["name"] == "models"]
    assert mount["mountPath"] == folder and mount["readOnly"] and volume["persistentVolumeClaim"]["readOnly"]
    assert volume["persistentVolumeClaim"]["claimName"] == OBJECTS["PersistentVolumeClaim"]["metadata"]["name"]


@needs_serve
def test_every_flag_is_a_key_of_the_verb() -> None:
    assert ENTRYPOINT[:2] == ["image-classifier", "serve"]
    patched = [operation["value"] for patch in KEYS["patches"] for operation in yaml.safe_load(patch["patch"])]
    lines = [
        ENTRYPOINT,
        CONTAINER["args"],
        *(service["command"] for name, service in SERVICES.items() if name.startswith("serve")),
        patched,
    ]
    flags = {word.removeprefix("--").partition("=")[0] for line in lines for word in line if str(word).startswith("--")}
    assert {"host", "port", "checkpoint_name", "access.keys_file"} <= flags
    for name in flags:
        node: Any = SERVE
        for part in name.split("."):
            assert part in node, f"--{name} is no key of conf/serve.yaml"
            node = node[part]
    assert SERVE is not None and str(SERVE["port"]) == flag(ENTRYPOINT, "--port")


@needs_serve
def test_a_stop_leaves_time_to_drain() -> None:
    assert SERVE is not None
    pause = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] >= pause + SERVE["drain_s"] + 10
    assert int(SERVICES["serve"]["stop_grace_period"].removesuffix("s")) >= SERVE["drain_s"] + 10
    assert the("STOPSIGNAL", FINAL).text == "SIGTERM"


@needs_serve
def test_memory_is_enough_for_what_the_server_lets_in() -> None:
    assert SERVE is not None
    needed = SERVE["request"]["max_memory"] + 4 * 3 * SERVE["limits"]["max_pixels"]
    assert (
        CONTAINER["resources"]["limits"]["memory"] == "2Gi"
        and SERVICES["serve"]["deploy"]["resources"]["limits"]["memory"] == "2g"
    )
    assert needed < 2 << 30


@needs_serve
def test_the_figures_of_drift_can_be_kept_where_all_else_is_read_only() -> None:
    assert SERVE is not None
    place = Path(the("WORKDIR", FINAL).text, SERVE["drift"]["log_dir"]).as_posix()
    uid, gid = the("USER", FINAL).text.split(":")
    assert f"install -d -o {uid} -g {gid} {place}" in the("RUN", FINAL).text  # a new volume takes its owner from there
    assert f"traffic:{place}" in SERVICES["serve"]["volumes"] and "traffic" in COMPOSE["volumes"]
    (mount,) = [mount for mount in CONTAINER["volumeMounts"] if mount["mountPath"] == place]
    assert not mount.get("readOnly")
    sizes = {
        volume["name"]: int(volume["emptyDir"]["sizeLimit"].removesuffix("Mi")) << 20
        for volume in POD["volumes"]
        if "emptyDir" in volume
    }
    assert sizes[mount["name"]] > 2 * SERVE["drift"]["max_log_bytes"]  # NAME.jsonl and the older one beside it
    assert sum(sizes.values()) < int(CONTAINER["resources"]["limits"]["ephemeral-storage"].removesuffix("Mi")) << 20


def test_a_service_keeps_its_own_figures_of_drift() -> None:
    """Two servers that wrote to one file would be compared as one."""
    named = [
        volume.split(":")[0]
        for name, service in SERVICES.items()
        if name.startswith("serve")
        for volume in service["volumes"]
    ]
    assert named.count("traffic") == 1


def test_the_probes_ask_what_the_server_serves() -> None:
    paths = {name: CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in paths.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/healthz",
    }
    assert {probe["port"] for probe in paths.values()} == {"http"}
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "image_classifier").glob("serving/**/*.py"))
    if not source:
        pytest.skip("image_classifier/serving is not here yet")
    assert [path for path in ("/readyz", "/healthz", "/metrics") if f'"{path}"' not in source] == []


def test_the_recipe_finds_all_it_copies_and_nothing_more() -> None:
    sent = sent_to_the_builder(ROOT)
    copied = [
        name
        for stage in stages(ROOT / "Dockerfile")
        for step in stage
        if step.name == "COPY"
        for name in step.text.split()[:-1]
    ]
    named = [name for name in copied if not name.startswith(("--from", "/"))]
    assert [path for path in sent if not any(path == name or path.startswith(f"{name}/") for name in named)] == []
    included = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"][
        "targets"
    ]["wheel"]
    assert {*included["packages"], *included["force-include"]} <= set(named)
    assert not [path for path in sent if path.startswith(("data/", "models/", "tests/"))]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_of_compose_is_shut_in(name: str) -> None:
    service = SERVICES[name]
    assert (
        service["read_only"]
        and service["cap_drop"] == ["ALL"]
        and service["security_opt"] == ["no-new-privileges:true"]
    )
    assert "privileged" not in service and not {"network_mode", "pid", "ipc", "devices", "cap_add"} & set(service)
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert re.search(r":v?\d+\.\d+[\w.-]*$", service["image"]), f"{service['image']} is not pinned"
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert service["image"] == IMAGE or "healthcheck" in service
    assert all(volume.endswith(":ro") or volume.split(":")[0] in COMPOSE["volumes"] for volume in service["volumes"])
    assert name == "serve" or service["profiles"]


def test_the_images_are_those_that_the_program_knows() -> None:
    assert SERVICES["triton"]["image"] == TritonSettings().image
    assert set(FLAGS) <= set(SERVICES["triton"]["command"])
    (mlflow,) = re.findall(r"^mlflow==([\w.]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert SERVICES["mlflow"]["image"].endswith(f":v{mlflow}")


def test_there_is_no_password_anywhere() -> None:
    for path in (ROOT / "docker-compose.yml", *(ROOT / "deploy").rglob("*.y*ml")):
        for line in path.read_text(encoding="utf-8").splitlines():
            setting = line.partition("#")[0]
            assert not re.search(rf"({SECRET.pattern})\w*\s*[:=]\s*['\"]?[A-Za-z0-9+/]{{8,}}['\"]?\s*$", setting), (
                f"{path.name}: {line}"
            )
    assert "Secret" not in OBJECTS


def test_the_pod_keeps_the_restricted_profile() -> None:
    context, own = POD["securityContext"], CONTAINER["securityContext"]
    assert context["runAsNonRoot"] and context["seccompProfile"]["type"] == "RuntimeDefault"
    assert own == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(POD)
    assert {next(iter(set(volume) - {"name"})) for volume in POD["volumes"]} <= {"persistentVolumeClaim", "emptyDir"}
    assert POD["automountServiceAccountToken"] is OBJECTS["ServiceAccount"]["automountServiceAccountToken"] is False
    assert CONTAINER["resources"].keys() == {"requests", "limits"} and "/tmp" in [
        mount["mountPath"] for mount in CONTAINER["volumeMounts"]
    ]


def test_the_kustomization_holds_every_object_under_one_name() -> None:
    assert sorted(KUSTOMIZATION["resources"]) == sorted(
        path.name for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml"
    )
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"],
        OBJECTS["Service"]["spec"]["selector"],
        OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        OBJECTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in POD["topologySpreadConstraints"]),
    ]
    assert all(selector == labels for selector in selectors)
    scaled = OBJECTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", OBJECTS["Deployment"]["metadata"]["name"])
    assert (
        "replicas" not in OBJECTS["Deployment"]["spec"]
        and POD["serviceAccountName"] == OBJECTS["ServiceAccount"]["metadata"]["name"]
    )
    assert {patch["target"]["name"] for patch in KEYS["patches"]} == {OBJECTS["Deployment"]["metadata"]["name"]}


def test_what_deployment_md_lists_is_there() -> None:
    page = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert listed and [path for path in listed if not (ROOT / path).exists()] == []
    files = [path.relative_to(ROOT) for path in (ROOT / "deploy").rglob("*") if path.is_file()]
    missing = [
        str(path) for path in files if not any(Path(name) in (path, *path.parents) for name in map(Path, listed))
    ]
    assert missing == []
