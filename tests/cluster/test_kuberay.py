"""The KubeRay manifests: fields that ray.io/v1 has, pods that are whole, versions that agree.

The operator's own schema is in no registry we can use, so its fields are listed here (KubeRay 1.5,
`docs/reference/api.md`), and a pod is checked for what Kubernetes would refuse.
"""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import moe_dist
from cluster.lasting import lasting_faults
from moe_dist.config import load_config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster" / "kuberay"

CLUSTER_FIELDS = frozenset(
    "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec "
    "headServiceAnnotations managedBy rayVersion suspend workerGroupSpecs".split()
)
HEAD_FIELDS = frozenset("enableIngress headService rayStartParams serviceType template".split())
WORKER_FIELDS = frozenset(
    "groupName idleTimeoutSeconds maxReplicas minReplicas numOfHosts rayStartParams replicas "
    "scaleStrategy suspend template".split()
)
AUTOSCALER_FIELDS = frozenset(
    "env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext upscalingMode "
    "version volumeMounts".split()
)
JOB_FIELDS = frozenset(
    "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint "
    "entrypointNumCpus entrypointNumGpus entrypointResources jobId managedBy metadata "
    "rayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig "
    "submitterPodTemplate suspend ttlSecondsAfterFinished".split()
)
SERVICE_FIELDS = frozenset(
    "deploymentUnhealthySecondThreshold excludeHeadPodFromServeSvc managedBy "
    "rayClusterConfig rayClusterDeletionDelaySeconds serveConfigV2 serveService "
    "serviceUnhealthySecondThreshold suspend upgradeStrategy".split()
)
POD_FIELDS = frozenset(
    "automountServiceAccountToken containers securityContext volumes nodeSelector tolerations "
    "serviceAccountName imagePullSecrets".split()
)
CONTAINER_FIELDS = frozenset(
    "name image workingDir env securityContext resources volumeMounts imagePullPolicy".split()
)
QUANTITY = re.compile(r"\d+(m|Mi|Gi)?")


def load(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def cluster_specs() -> Iterator[dict[str, Any]]:
    yield load("ray_cluster.yaml")[0]["spec"]
    yield load("ray_job.yaml")[0]["spec"]["rayClusterSpec"]
    yield load("ray_service.yaml")[0]["spec"]["rayClusterConfig"]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for spec in cluster_specs():
        yield "head", spec["headGroupSpec"]["template"]["spec"]
        for group in spec["workerGroupSpecs"]:
            yield group["groupName"], group["template"]["spec"]


def pinned_ray() -> str:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(pin.partition("==")[2] for pin in pins if pin.startswith("ray=="))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ray_cluster.yaml", "RayCluster"),
        ("ray_job.yaml", "RayJob"),
        ("ray_service.yaml", "RayService"),
    ],
)
def test_each_file_begins_with_its_resource(name: str, kind: str) -> None:
    manifest = load(name)[0]
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])


def test_the_fields_are_those_of_the_operator() -> None:
    assert load("ray_job.yaml")[0]["spec"].keys() <= JOB_FIELDS
    assert load("ray_service.yaml")[0]["spec"].keys() <= SERVICE_FIELDS
    for spec in cluster_specs():
        assert spec.keys() <= CLUSTER_FIELDS
        assert spec["headGroupSpec"].keys() <= HEAD_FIELDS
        assert spec.get("autoscalerOptions", {}).keys() <= AUTOSCALER_FIELDS
        for group in spec["workerGroupSpecs"]:
            assert group.keys() <= WORKER_FIELDS
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for start in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            # The operator takes texts only.
            assert all(isinstance(value, str) for value in start["rayStartParams"].values())


def test_versions_and_images_agree() -> None:
    assert {spec["rayVersion"] for spec in cluster_specs()} == {pinned_ray()}
    images = {container["image"] for _, pod in pods() for container in pod["containers"]}
    assert images == {f"moe-dist:{moe_dist.__version__}"}


@pytest.mark.parametrize("pod", [pod for _, pod in pods()])
def test_a_pod_is_whole(pod: dict[str, Any]) -> None:
    assert pod.keys() <= POD_FIELDS
    (container,) = pod["containers"]
    assert container.keys() <= CONTAINER_FIELDS
    for amounts in container["resources"].values():
        assert all(QUANTITY.fullmatch(amount) for amount in amounts.values())
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert requests["memory"] == limits["memory"]
    assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
    volumes = [volume["name"] for volume in pod["volumes"]]
    mounted = [mount["name"] for mount in container["volumeMounts"]]
    assert sorted(volumes) == sorted(set(mounted))
    assert {"/shared", "/dev/shm"} == {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("pod", [pod for _, pod in pods()])
def test_a_pod_has_no_more_rights_than_it_needs(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not any(word in str(pod) for word in ("hostPath", "hostNetwork", "privileged:"))


def test_tokens_are_on_and_nothing_is_reached_from_outside() -> None:
    for spec in cluster_specs():
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert not spec["headGroupSpec"].get("enableIngress")
    for name, key in (("ray_cluster.yaml", None), ("ray_service.yaml", "rayClusterConfig")):
        manifest, policy = load(name)
        assert policy["kind"] == "NetworkPolicy"
        label = policy["spec"]["podSelector"]["matchLabels"]
        spec = manifest["spec"] if key is None else manifest["spec"][key]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert label.items() <= group["template"]["metadata"]["labels"].items()


def test_only_answers_and_metrics_are_for_everybody() -> None:
    service, policy = load("ray_service.yaml")
    others, everybody = policy["spec"]["ingress"]
    assert "ports" not in others and "from" not in everybody
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    spec = service["spec"]["rayClusterConfig"]
    shown = {
        int(group["rayStartParams"]["metrics-export-port"])
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    }
    open_ports = {port["port"] for port in everybody["ports"]}
    assert open_ports == {config["http_options"]["port"], *shown}


def test_the_job_runs_a_recipe_whose_results_last() -> None:
    job = load("ray_job.yaml")[0]["spec"]
    words = shlex.split(job["entrypoint"])
    assert words[:4] == ["python", "-m", "pipelines", "compress"]
    overrides = [text for flag, text in itertools.pairwise(words) if flag == "--set"]
    config = load_config(ROOT / words[4], overrides)
    faults = lasting_faults(
        str(config.output_dir),
        config.tracking.uri,
        temporary=(Path("/home/ray/moe-dist"), Path("/tmp/ray")),
        count_nodes=lambda: 3,
    )
    assert faults == []
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    assert config.parallel.num_workers == group["maxReplicas"]
    assert "env_vars" in yaml.safe_load(job["runtimeEnvYAML"])


def test_the_service_is_one_that_serve_takes() -> None:
    """Serve's own schema, and ours of the application's arguments."""
    from moe_dist.serving.settings import ServingSettings

    schema = pytest.importorskip("ray.serve.schema")
    service = load("ray_service.yaml")[0]["spec"]
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    settings = ServingSettings.of(**application.args)
    assert settings.directory.startswith("/shared/")
    # A second set of replicas has room while a model is loaded anew.
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    cpus = int(container["resources"]["requests"]["cpu"]) * group["replicas"]
    assert cpus >= 2 * settings.threads * settings.replicas
    assert int(container["resources"]["requests"]["cpu"]) >= settings.threads
