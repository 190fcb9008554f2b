"""k8s/prepare-rayjob.yaml: KubeRay's schema accepts it, and it agrees with the image, the settings and the Job."""

import copy
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import rayjob_schema
import yaml
from deployment import ROOT, Resource, only, rendered, written
from rayjob_schema import EXTRACT, rayjob

from babybert.config import PrepareConfig

CRD = "BABYBERT_RAYJOB_CRD"
RESOURCES = written("prepare-rayjob.yaml")
CLUSTER = rayjob()["spec"]["rayClusterSpec"]
PODS: dict[str, Resource] = {
    "head": CLUSTER["headGroupSpec"]["template"],
    "worker": CLUSTER["workerGroupSpecs"][0]["template"],
}


def errors(schema: Resource, resource: Resource) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema", reason="comes with Ray")
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(resource)]


def test_kuberay_accepts_the_manifest() -> None:
    schema = json.loads(EXTRACT.read_text())
    assert errors(schema, rayjob()) == []
    for path, value, message in (
        ("spec.rayClusterSpec.rayVersoin", "2.60.0", "Additional properties are not allowed"),
        ("spec.rayClusterSpec.autoscalerOptions.upscalingMode", "Quick", "is not one of"),
        ("spec.backoffLimit", "two", "is not of type 'integer'"),
        ("spec.rayClusterSpec.autoscalerOptions.securityContext.runAsRoot", False, "Additional properties"),
    ):
        wrong = copy.deepcopy(rayjob())
        *parents, name = path.split(".")
        part = wrong
        for parent in parents:
            part = part[parent]
        part[name] = value
        found = errors(schema, wrong)  # several, where parts of the manifest are one in YAML
        assert found
        assert all(message in error for error in found)


def test_the_extract_is_that_of_the_whole_schema() -> None:
    if CRD not in os.environ:
        pytest.skip(f"{CRD} does not name KubeRay's ray.io_rayjobs.yaml")
    crd = Path(os.environ[CRD])
    assert rayjob_schema.extract_of(crd) == json.loads(EXTRACT.read_text()), "run tests/rayjob_schema.py"
    schema = rayjob_schema.read_crd(crd)
    assert errors(rayjob_schema.closed(schema), rayjob()) == []
    assert rayjob_schema.unwritten_defaults(schema, rayjob()) == []


@pytest.mark.parametrize("name", ["head", "worker"])
def test_pods_are_locked_down_as_those_of_the_job(name: str) -> None:
    pod = PODS[name]["spec"]
    job = only(written("pretrain-job.yaml"), "Job")["spec"]["template"]["spec"]
    of_job = {key: value for key, value in job["securityContext"].items() if key != "fsGroupChangePolicy"}
    assert pod["securityContext"] == of_job
    assert pod["enableServiceLinks"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == job["containers"][0]["securityContext"]
    assert container["envFrom"] == job["containers"][0]["envFrom"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert {"/tmp", "/dev/shm"} < {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "memory" in container["resources"]["limits"]
    # Only the head pod may use the Kubernetes API: the autoscaler runs there.
    assert pod.get("automountServiceAccountToken", True) == (name == "head")
    assert CLUSTER["autoscalerOptions"]["securityContext"] == container["securityContext"]


def test_versions_and_images_are_those_of_the_project() -> None:
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    locked = re.search(r"^ray==([^ ]*)", (ROOT / "docker/requirements-ray.txt").read_text(), re.M)
    assert pinned
    assert locked
    assert CLUSTER["rayVersion"] == pinned[1] == locked[1]
    job = only(written("pretrain-job.yaml"), "Job")["spec"]["template"]["spec"]
    version = job["containers"][0]["image"].partition(":")[2]
    for pod in PODS.values():
        assert pod["spec"]["containers"][0]["image"] == f"babybert-ray:{version}"
    assert "ray) file=Dockerfile" in (ROOT / "docker/build-images.sh").read_text()


def test_the_command_asks_for_as_many_tasks_as_all_workers_run() -> None:
    """The autoscaler starts workers for tasks that wait."""
    (group,) = CLUSTER["workerGroupSpecs"]
    cpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    settings = yaml.safe_load(only(RESOURCES, "ConfigMap")["data"]["run.yaml"])
    assert settings["prepare"]["workers"] == cpus * group["maxReplicas"]


@pytest.mark.parametrize("overlay", ["base", "overlays/aws", "overlays/multinode", "overlays/kueue"])
def test_data_from_s3_is_kept_in_the_volume(overlay: str) -> None:
    settings = yaml.safe_load(only(rendered(overlay), "ConfigMap", "babybert-pretrain")["data"]["run.yaml"])
    assert settings["pretrain"]["cache"] == "data/cache"
    assert settings["pretrain"]["cache_gb"] < 50  # the size of the volume


def test_the_object_store_fits_into_shared_memory() -> None:
    """Otherwise Ray would use a slow file below /tmp."""
    groups = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
    for group in groups:
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        gibibytes = int(volumes["shm"]["emptyDir"]["sizeLimit"].removesuffix("Gi"))
        memory = group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
        assert int(group["rayStartParams"]["object-store-memory"]) < gibibytes * 2**30
        assert gibibytes < int(memory.removesuffix("Gi"))  # it counts for the limit of the pod


def command_of(entrypoint: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the entrypoint with a `babybert` that prints its arguments."""
    (folder / "babybert").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "babybert").chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", **variables}
    return subprocess.run(entrypoint, shell=True, env=environment, capture_output=True, text=True, timeout=60)


def test_the_command_has_settings_that_exist(tmp_path: Path) -> None:
    done = command_of(rayjob()["spec"]["entrypoint"], tmp_path, BABYBERT_PRETRAIN_DATA="s3://bucket/data")
    assert done.returncode == 0, done.stderr
    command, *flags = done.stdout.split()
    assert command == "prepare"
    names = dict(flag.removeprefix("--").split("=") for flag in flags)
    assert names.pop("config") == "/config/run.yaml"
    values: dict[str, Any] = {name.replace("-", "_"): value for name, value in names.items()}
    config = tmp_path / "run.yaml"
    config.write_text(only(RESOURCES, "ConfigMap")["data"]["run.yaml"])
    settings = yaml.safe_load(config.read_text())["prepare"]
    assert PrepareConfig(**settings, **values).ray_address == "auto"


def test_without_the_secret_the_command_says_what_is_missing(tmp_path: Path) -> None:
    done = command_of(rayjob()["spec"]["entrypoint"], tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith('error: BABYBERT_PRETRAIN_DATA is not set; run the command "kubectl create secret')
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["base/pretrain-job.yaml", "overlays/multinode/jobset.yaml"])
def test_pods_prepare_nothing_if_the_data_is_in_s3(name: str, tmp_path: Path) -> None:
    text = (ROOT / "k8s" / name).read_text()
    specs = [resource["spec"] for resource in yaml.safe_load_all(text) if resource["kind"] in ("Job", "JobSet")]
    template = (specs[0].get("template") or specs[0]["replicatedJobs"][0]["template"]["spec"]["template"])["spec"]
    (container,) = [each for each in template["initContainers"] if each["name"] == "prepare"]
    script = container["args"][0].replace("/usr/bin/tini", shlex.quote(str(tmp_path / "tini")))
    (tmp_path / "tini").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (tmp_path / "tini").chmod(0o755)
    command = shlex.join([*container["command"], script])
    assert command_of(command, tmp_path, BABYBERT_PRETRAIN_DATA="s3://bucket/data").stdout == ""
    assert command_of(command, tmp_path).stdout == "prepare\n--config=/config/run.yaml\n"
    assert container["envFrom"] == template["containers"][0]["envFrom"]
