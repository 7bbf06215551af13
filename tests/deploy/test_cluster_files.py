"""The shipped files for clusters, checked offline: Ray's schema, and KubeRay's fields by name."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import deploy
from deploy.flags import Flags, Parser
from deploy.running import PLUGINS
from deploy.train import TrainFlags

FOLDER = Path(deploy.__file__).parent
PROJECT = FOLDER.parent
CLUSTERS = ("cluster.yaml", "cluster-aws.yaml")
MANIFESTS = ("raycluster.yaml", "rayjob.yaml")

# Of ray-project/kuberay, ray-operator/apis/ray/v1, and of Kubernetes' pods what is used here.
FIELDS: dict[str, dict[str, str]] = {
    "RayCluster": {"apiVersion": "", "kind": "", "metadata": "Metadata", "spec": "RayClusterSpec"},
    "RayJob": {"apiVersion": "", "kind": "", "metadata": "Metadata", "spec": "RayJobSpec"},
    "Metadata": {"name": "", "labels": "*"},
    "RayJobSpec": {
        "submissionMode": "", "entrypoint": "", "shutdownAfterJobFinishes": "",
        "backoffLimit": "", "activeDeadlineSeconds": "", "ttlSecondsAfterFinished": "",
        "rayClusterSpec": "RayClusterSpec",
    },
    "RayClusterSpec": {
        "rayVersion": "", "authOptions": "AuthOptions", "headGroupSpec": "HeadGroupSpec",
        "workerGroupSpecs": "WorkerGroupSpec",
    },
    "AuthOptions": {"mode": ""},
    "HeadGroupSpec": {"rayStartParams": "*", "template": "PodTemplate"},
    "WorkerGroupSpec": {
        "groupName": "", "replicas": "", "minReplicas": "", "maxReplicas": "",
        "rayStartParams": "*", "template": "PodTemplate",
    },
    "PodTemplate": {"metadata": "Metadata", "spec": "PodSpec"},
    "PodSpec": {"containers": "Container", "volumes": "Volume"},
    "Container": {
        "name": "", "image": "", "ports": "Port", "resources": "Resources",
        "volumeMounts": "VolumeMount",
    },
    "Port": {"containerPort": "", "name": ""},
    "Resources": {"requests": "*", "limits": "*"},
    "VolumeMount": {"name": "", "mountPath": ""},
    "Volume": {"name": "", "emptyDir": "EmptyDir", "persistentVolumeClaim": "Claim"},
    "EmptyDir": {"medium": "", "sizeLimit": ""},
    "Claim": {"claimName": ""},
}  # fmt: skip


def read(*path: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(FOLDER.joinpath(*path).read_text())
    return found


def unknown_fields(value: Any, kind: str, where: str) -> Iterator[str]:
    """Name what ``value`` has and a ``kind`` has not."""
    if isinstance(value, list):
        for index, one in enumerate(value):
            yield from unknown_fields(one, kind, f"{where}[{index}]")
    elif kind and kind != "*":
        if not isinstance(value, dict):
            yield f"{where} is no {kind}"
            return
        for name, inner in value.items():
            if name not in FIELDS[kind]:
                yield f"{where}.{name}"
            else:
                yield from unknown_fields(inner, FIELDS[kind][name], f"{where}.{name}")


def cluster_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = read("kubernetes", name)["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> list[dict[str, Any]]:
    spec = cluster_spec(name)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_accepts_the_cluster_file(name: str) -> None:
    config = prepare_config(read(name))

    validate_config(config)


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_whole_project_is_copied_to_every_host(name: str) -> None:
    mounts = read(name)["file_mounts"]
    build = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    packages = build["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    wanted = {*packages, "pyproject.toml", "README.md", "LICENSE"}

    copied = {source for source in mounts.values() if not source.startswith("~")}

    assert copied == wanted
    assert all((PROJECT / source).exists() for source in copied)
    assert all(mounts[f"~/.paramserver/source/{source}"] == source for source in copied)


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_node_asks_for_the_token(name: str, commands: str) -> None:
    cluster = read(name)

    (start,) = [command for command in cluster[commands] if "ray start" in command]

    assert "RAY_AUTH_MODE=token ray start" in re.sub(r" RAY_enable_autoscaler_v2=0", "", start)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_hosts_of_ones_own_are_started_by_the_autoscaler_that_can() -> None:
    head = " ".join(read("cluster.yaml")["head_start_ray_commands"])

    assert "RAY_enable_autoscaler_v2=0 ray start" in head  # ray-project/ray#57153


def test_the_cloud_has_the_setup_of_hosts_of_ones_own() -> None:
    own, cloud = copy.deepcopy(read("cluster.yaml")), read("cluster-aws.yaml")

    assert cloud["file_mounts"] == own["file_mounts"]
    assert [c for c in own["setup_commands"] if ".bashrc" in c] == [
        c for c in cloud["setup_commands"] if ".bashrc" in c
    ]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_have_no_field_that_kuberay_does_not_know(name: str) -> None:
    manifest = read("kubernetes", name)

    assert list(unknown_fields(manifest, manifest["kind"], name)) == []
    assert manifest["apiVersion"] == "ray.io/v1"
    assert cluster_spec(name)["authOptions"] == {"mode": "token"}


def test_a_misspelt_field_is_found() -> None:
    manifest = read("kubernetes", "rayjob.yaml")
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1

    found = list(unknown_fields(manifest, "RayJob", "job"))

    assert found == ["job.spec.rayClusterSpec.workerGroupSpecs[0].minReplica"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_parameters_of_ray_start_are_strings(name: str) -> None:
    spec = cluster_spec(name)

    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_pod_has_shared_memory_and_what_it_mounts(name: str) -> None:
    for pod in pods(name):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}

        assert set(mounts.values()) == set(volumes)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_image_has_the_manifests_ray(name: str) -> None:
    (version,) = re.findall(r"ray\[default\]==([\d.]+)", (FOLDER / "Containerfile").read_text())

    assert cluster_spec(name)["rayVersion"] == version


def test_the_image_copies_what_there_is() -> None:
    lines = (FOLDER / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]

    assert all((PROJECT / name).exists() for name in copied)
    assert {"paramserver", "workers", "async_sgd", "sync", "deploy"} <= set(copied)


def test_the_jobs_command_is_one_of_ours_and_fits_its_cluster() -> None:
    job = read("kubernetes", "rayjob.yaml")["spec"]
    words = shlex.split(job["entrypoint"])
    given = {"address": "auto"}  # what a job finds in its environment

    flags = Flags(TrainFlags, PLUGINS).parse(words[4:], Parser("", ""), lambda _: given)

    assert words[:4] == ["python", "-m", "deploy", "train"]
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert flags.workers <= group["replicas"] * int(container["resources"]["limits"]["cpu"])
    assert flags.worker_labels == group["rayStartParams"]["labels"]
