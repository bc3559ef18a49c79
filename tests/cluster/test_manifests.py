"""The manifests say what Kubernetes, Ray and our security list want; the README's commands exist."""

import json
import re
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]
from ray.dashboard.modules.job.cli import submit

from iwm_ray.config import Config

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"

# From the reference of KubeRay 1.7's custom resources (ray.io/v1).
FIELDS = {
    "RayCluster": {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"}
    | {"headGroupSpec", "workerGroupSpecs"},
    "RayJob": {"clusterSelector", "entrypoint", "submitterPodTemplate"},
    "head": {"serviceType", "rayStartParams", "template", "labels"},
    "worker": {"groupName", "labels", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}


def documents(name: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((CLUSTER / name).read_text()) if document]


def one(name: str, kind: str) -> dict[str, Any]:
    (found,) = (document for document in documents(name) if document["kind"] == kind)
    return found


CLUSTER_SPEC = one("raycluster.yaml", "RayCluster")["spec"]
JOB_SPEC = one("rayjob.yaml", "RayJob")["spec"]
HEAD = CLUSTER_SPEC["headGroupSpec"]
WORKERS = CLUSTER_SPEC["workerGroupSpecs"]
POLICY = one("network_policy.yaml", "NetworkPolicy")["spec"]
TEMPLATES = {
    "head": HEAD["template"],
    "submitter": JOB_SPEC["submitterPodTemplate"],
    **{group["groupName"]: group["template"] for group in WORKERS},
}


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml", "network_policy.yaml"])
def test_documents_are_kubernetes_objects(name: str) -> None:
    versions = {
        "RayCluster": "ray.io/v1",
        "RayJob": "ray.io/v1",
        "NetworkPolicy": "networking.k8s.io/v1",
        "PersistentVolumeClaim": "v1",
    }
    for document in documents(name):
        assert document["apiVersion"] == versions[document["kind"]]
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?", document["metadata"]["name"])


def test_only_known_fields_are_used() -> None:
    assert set(CLUSTER_SPEC) <= FIELDS["RayCluster"]
    assert set(JOB_SPEC) <= FIELDS["RayJob"]
    assert set(HEAD) <= FIELDS["head"]
    for group in WORKERS:
        assert set(group) <= FIELDS["worker"]
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert "labels" not in group["rayStartParams"]


def test_the_token_is_on() -> None:
    """And KubeRay knows that this Ray version has it."""
    assert CLUSTER_SPEC["authOptions"] == {"mode": "token"}
    major, minor, _ = CLUSTER_SPEC["rayVersion"].split(".")
    assert (int(major), int(minor)) >= (2, 60)


def test_the_job_runs_on_the_cluster() -> None:
    assert JOB_SPEC["clusterSelector"] == {
        "ray.io/cluster": one("raycluster.yaml", "RayCluster")["metadata"]["name"]
    }


def test_data_and_train_nodes_are_apart() -> None:
    data, gpu = WORKERS
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in (data, gpu)]
    assert data["labels"] == {"pool": "data"}
    assert gpu["labels"] != data["labels"]
    assert "nvidia.com/gpu" not in limits[0]
    assert limits[1]["nvidia.com/gpu"] == 1
    assert HEAD["rayStartParams"]["num-cpus"] == "0"
    assert "--runtime.data-label pool=data" in JOB_SPEC["entrypoint"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_pods_can_do_no_more_than_they_must(name: str) -> None:
    spec = TEMPLATES[name]["spec"]
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["limits"])
    assert spec["restartPolicy"] == "Never"
    assert name == "head" or spec["automountServiceAccountToken"] is False
    assert name == "submitter" or spec["terminationGracePeriodSeconds"] >= 60
    assert {"name": "HOME", "value": "/tmp"} in container["env"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in spec["volumes"]}
    assert mounted["temporary"] == "/tmp"
    assert name == "submitter" or {"/runs", "/dev/shm"} <= set(mounted.values())


def test_nobody_else_reaches_the_pods() -> None:
    own = {"podSelector": {"matchLabels": POLICY["podSelector"]["matchLabels"]}}
    assert POLICY["policyTypes"] == ["Ingress", "Egress"]
    for template in TEMPLATES.values():
        assert template["metadata"]["labels"].items() >= POLICY["podSelector"]["matchLabels"].items()
    inside, *others = POLICY["ingress"]
    assert inside == {"from": [own]}
    for rule in others:
        assert rule["from"]
        assert [port["port"] for port in rule["ports"]] == [8265]
    assert all(rule.get("ports") or rule["to"] == [own] for rule in POLICY["egress"])


def test_ray_accepts_the_machines() -> None:
    config = yaml.safe_load((CLUSTER / "ray_up.yaml").read_text())
    schema = json.loads(files("ray.autoscaler").joinpath("ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    assert config["available_node_types"]["data"]["labels"] == {"pool": "data"}
    assert "~/.ray/auth_token" in config["file_mounts"]
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)


def test_no_dashboard_outside_pods_and_no_secret_in_any_file() -> None:
    for path in CLUSTER.iterdir():
        text = path.read_text()
        assert "0.0.0.0" not in text or path.name == "raycluster.yaml"
        assert not re.search(r"(?i)(password|secret_access_key|auth_token):\s*['\"]?\w{8,}", text)
    assert HEAD["serviceType"] == "ClusterIP"


def test_image_is_the_same_everywhere() -> None:
    images = {template["spec"]["containers"][0]["image"] for template in TEMPLATES.values()}
    images.add(yaml.safe_load((CLUSTER / "ray_up.yaml").read_text())["docker"]["image"])
    assert len(images) == 1
    assert f"-t {images.pop()} ." in (CLUSTER / "README.md").read_text()
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert "\nUSER 1000\n" in dockerfile
    for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE):
        assert all(name in ("README.md", "LICENSE") or (REPOSITORY / name).exists() for name in line.split())


def pretrain_options(command: list[str]) -> dict[str, str]:
    """What follows `python -m iwm_ray.pretrain`."""
    first = command.index("iwm_ray.pretrain")
    assert command[first - 2 : first] == ["python", "-m"]
    rest = command[first + 2 :]
    return dict(zip(rest[::2], rest[1::2], strict=True))


def readme_submission() -> list[str]:
    (line,) = re.findall(r"^ray job submit .*$", (CLUSTER / "README.md").read_text(), re.MULTILINE)
    return shlex.split(line)


def test_ray_accepts_the_submission_in_the_readme() -> None:
    context = submit.make_context("submit", readme_submission()[3:])
    assert context.params["working_dir"] == "."
    assert context.params["entrypoint"][:3] == ("python", "-m", "iwm_ray.pretrain")


@pytest.mark.parametrize("command", [shlex.split(JOB_SPEC["entrypoint"]), readme_submission()])
def test_options_of_the_commands_exist(command: list[str]) -> None:
    known = Config(recipe="vits16_in1k").flat()
    for option in pretrain_options(command):
        name = option.removeprefix("--").replace("-", "_")
        assert name == "output" or name in known
    runtime = {
        option.removeprefix("--runtime.").replace("-", "_"): value
        for option, value in pretrain_options(command).items()
        if option.startswith("--runtime.")
    }
    Config.model_validate({"recipe": "vits16_in1k", "runtime": runtime})
