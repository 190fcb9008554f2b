"""The container images run as a user would run them: any numeric user, a read-only root, no capabilities.

`make test-images` builds the images and runs these tests. A plain `pytest` does not collect this file, because it needs
docker or podman and the images. The Job's pod is run by `podman kube play`. Podman 4 supports no Job and mishandles
Secrets and HTTP probes. The Job's template is therefore wrapped in a Pod, the keys are environment variables, and
probes and ports are left out (the pod uses the host's network). Everything else is as rendered.
"""

import copy
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from conftest import S3, aws_variables
from deployment import ROOT, only, rendered, written

from babybert.checkpoint.format import newest_valid
from babybert.serving.torchserve import free_ports

TRAIN, SERVE, RAY = "babybert-train:dev", "babybert-serve:dev", "babybert-ray:dev"
SMALL = {
    "BABYBERT_PREPARE_DEMO_DOCUMENTS": "80",
    "BABYBERT_PRETRAIN_WIDTH": "8",
    "BABYBERT_PRETRAIN_HEADS": "2",
    "OMP_NUM_THREADS": "1",
}
LOCKED = ["--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--tmpfs=/tmp:rw,mode=1777"]


class Engine:
    """docker or podman, as docker/engine.sh selects it."""

    def __init__(self) -> None:
        script = '. docker/engine.sh && echo "$ENGINE" && echo "${CONTAINERS_CONF:-}"'
        done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
        if done.returncode:
            pytest.skip(done.stderr.strip())
        self.name, configuration = done.stdout.splitlines()
        self.environment = {**os.environ, **({"CONTAINERS_CONF": configuration} if configuration else {})}

    def __call__(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run one command of the engine."""
        return subprocess.run(
            [self.name, *arguments], env=self.environment, capture_output=True, text=True, timeout=timeout
        )

    def run(
        self,
        image: str,
        *arguments: str,
        flags: Sequence[str] = (),
        network: str = "none",
        variables: dict[str, Any] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a container to its end."""
        given = [f"--env={name}={value}" for name, value in {**SMALL, **(variables or {})}.items()]
        return self(
            "run", "--rm", f"--network={network}", *LOCKED, *no_healthcheck(image), *given, *flags, image, *arguments
        )

    def start(
        self,
        name: str,
        image: str,
        *arguments: str,
        flags: Sequence[str] = (),
        variables: dict[str, Any] | None = None,
    ) -> None:
        """Start a container in the background, on the host's network."""
        given = [f"--env={key}={value}" for key, value in {**SMALL, **(variables or {})}.items()]
        done = self(
            "run",
            "-d",
            f"--name={name}",
            "--network=host",
            *LOCKED,
            *no_healthcheck(image),
            *given,
            *flags,
            image,
            *arguments,
        )
        assert done.returncode == 0, done.stderr

    def exit_code(self, name: str) -> int:
        """Wait until a container has ended and return its exit code."""
        return int(self("wait", name).stdout.split()[-1])


def no_healthcheck(image: str) -> list[str]:
    """The flag that turns the health check off: podman needs systemd for it. A test runs the check by hand."""
    return ["--no-healthcheck"] if image == SERVE else []


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The container engine; the tests are skipped if it lacks an image."""
    selected = Engine()
    for image in (TRAIN, SERVE):
        if selected("image", "inspect", image).returncode:
            pytest.skip(f"{image} is not built; run `make images`")
    return selected


@pytest.fixture
def named(engine: Engine, request: pytest.FixtureRequest) -> Iterator[str]:
    """A name for a container. The container and its volumes are removed at the end."""
    name = f"test-{os.getpid()}-{time.time_ns()}"
    yield name
    if request.session.testsfailed:
        print(engine("logs", name).stdout[-3000:])
    engine("rm", "-f", "-v", "-t", "0", name)


def writable(folder: Path) -> Path:
    """Create a folder that any container user may write to."""
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    return folder


@pytest.fixture(scope="session")
def data(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that the training image prepared."""
    folder = writable(tmp_path_factory.mktemp("images") / "data")
    done = engine.run(TRAIN, "prepare", flags=[f"-v={folder}:/babybert/data"])
    assert done.returncode == 0, done.stderr
    return folder


def get(url: str) -> str:
    """The body of a response; empty if there is none."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return str(response.read().decode())
    except OSError:
        return ""


def post(url: str, body: Any) -> Any:
    """The parsed response to a JSON request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def wait_for(check: Callable[[], Any], seconds: float = 120) -> Any:
    """Call `check` until its result is true, and return that."""
    deadline = time.monotonic() + seconds
    while not (result := check()):
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.3)
    return result


def container_variables() -> dict[str, str]:
    """The variables that give a container access to the S3 server of the tests."""
    variables = aws_variables(os.environ["AWS_ENDPOINT_URL"])
    del variables["AWS_CONFIG_FILE"]  # a path on the host
    return variables


@pytest.mark.parametrize("image", [TRAIN, SERVE])
def test_image_metadata(engine: Engine, image: str) -> None:
    (details,) = json.loads(engine("image", "inspect", image).stdout)
    settings = details["Config"]
    assert settings["User"] == "10001:10001"
    assert settings["Entrypoint"][:2] == [
        "/usr/bin/tini",
        "--",
    ]  # a list: no shell stands between a signal and the command
    labels = {name.rpartition(".")[2] for name in settings["Labels"] if name.startswith("org.opencontainers.image.")}
    assert {"title", "description", "licenses", "version", "revision"} <= labels
    assert set(settings["ExposedPorts"]) == ({"9109/tcp"} if image == TRAIN else {"8080/tcp", "8082/tcp"})
    assert not [variable for variable in settings["Env"] if re.search("AWS|SECRET|TOKEN|PASSWORD", variable)]
    # docker keeps it in the first place, podman in one of the others.
    check = settings.get("Healthcheck") or details.get("Healthcheck") or details.get("HealthCheck")
    assert (check or {}).get("Test") == (["CMD", "/usr/local/bin/ready"] if image == SERVE else None)


@pytest.mark.parametrize("image", [TRAIN, SERVE])
def test_the_build_leaves_no_files_behind(engine: Engine, image: str) -> None:
    done = engine(
        "run",
        "--rm",
        "--network=none",
        *no_healthcheck(image),
        "--entrypoint=sh",
        image,
        "-c",
        "ls -d /source /locks /root/.cache /opt/build; cat /etc/pip.conf; which pip",
    )
    assert done.stdout == ""


@pytest.mark.parametrize("user", ["10001:10001", "1234:1234"])
def test_the_default_command_trains_on_the_demo(engine: Engine, user: str) -> None:
    done = engine.run(TRAIN, flags=[f"--user={user}"], variables={"BABYBERT_PRETRAIN_EPOCHS": "1"})
    assert done.returncode == 0, done.stderr
    assert "its checkpoints go to /babybert/runs/demo" in done.stderr
    assert "checkpoint: runs/demo/step-" in done.stdout
    assert "warning" not in done.stderr.lower()


def test_sigterm_during_training_saves_a_checkpoint_and_exits_143(
    engine: Engine, named: str, data: Path, tmp_path: Path
) -> None:
    runs, (port,) = writable(tmp_path / "runs"), free_ports(1)
    flags = [f"-v={data}:/babybert/data", f"-v={runs}:/babybert/runs"]
    engine.start(named, TRAIN, "pretrain", "--epochs=100000", f"--metrics-port={port}", flags=flags)
    wait_for(lambda: re.search(r"^babybert_pretrain_steps_total [1-9]", get(f"http://127.0.0.1:{port}/metrics"), re.M))
    assert engine("stop", "--time=120", named, timeout=150).returncode == 0
    assert engine.exit_code(named) == 143
    saved = newest_valid(runs / "demo")
    assert saved
    again = engine.run(TRAIN, "pretrain", "--max-minutes=0.0001", "--epochs=100000", "--no-metrics", flags=flags)
    assert again.returncode == 0, again.stderr
    assert f"resuming from runs/demo/{saved.name}" in again.stderr


def test_sigterm_during_preparation_exits_at_once(engine: Engine, named: str) -> None:
    """`prepare` has no handler for SIGTERM, and as process 1 Python would ignore the signal without tini."""
    engine.start(named, TRAIN, "prepare", "--demo-documents=1000000")
    time.sleep(3)
    start = time.monotonic()
    engine("stop", "--time=60", named, timeout=90)
    assert time.monotonic() - start < 30
    assert engine.exit_code(named) == 143


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_a_trained_model_is_served_from_s3(engine: Engine, named: str, data: Path, s3: S3, weights: str) -> None:
    """The training container uploads to S3 and the serving one downloads from there; both publish metrics."""
    server, store = f"{named}-serve", f"s3://{s3.bucket}/run"
    training, inference, management, serving = free_ports(4)
    variables = container_variables()
    job = ["pretrain", "--epochs=100000", "--checkpoint-every=10", f"--store={store}", f"--metrics-port={training}"]
    engine.start(named, TRAIN, *job, flags=[f"-v={data}:/babybert/data"], variables=variables)
    uploaded = re.compile(r"^babybert_checkpoint_uploads_total [1-9]", re.M)
    wait_for(lambda: uploaded.search(get(f"http://127.0.0.1:{training}/metrics")))
    engine("stop", "--time=120", named, timeout=150)
    assert engine.exit_code(named) == 143

    ports = {"INFERENCE": inference, "MANAGEMENT": management, "METRICS": serving}
    variables |= {f"BABYBERT_SERVE_{name}_PORT": str(port) for name, port in ports.items()}
    variables |= {"BABYBERT_MODEL_URI": store, "BABYBERT_SERVE_INT8": "true" if weights == "int8" else "false"}
    try:
        engine.start(server, SERVE, variables=variables)
        assert engine("exec", server, "ready").returncode != 0
        wait_for(lambda: engine("exec", server, "ready").returncode == 0)
        url = f"http://127.0.0.1:{inference}/predictions/babybert"
        (mask,) = post(url, {"text": "The sheriff rides with a [MASK].", "top_k": 2})["masks"]
        assert len(mask["candidates"]) == 2
        assert set(post(url, {"sentence_a": "Mary is superb.", "sentence_b": "She rides."})) == {
            "is_next",
            "probability",
        }
        metrics = wait_for(lambda: get(f"http://127.0.0.1:{serving}/metrics"))
        assert re.search(r'^babybert_inference_requests_total\{task="fill-mask",outcome="ok".*\} 1', metrics, re.M)
        (version,) = re.findall(r'^babybert_model_info\{version="([^"]*)"', metrics, re.M)
        assert version.endswith("-int8") == (weights == "int8")
        engine("stop", "--time=60", server, timeout=90)
        assert engine.exit_code(server) in (0, 143)
    finally:
        engine("rm", "-f", "-v", "-t", "0", server)


MISSING = {"AWS_ACCESS_KEY_ID": "no", "AWS_SECRET_ACCESS_KEY": "no"}


@pytest.mark.parametrize(
    ("image", "command", "code", "says"),
    [
        (TRAIN, ["pretrain", "--store=s3://no-such-bucket/run"], 3, "no such object or bucket"),
        (TRAIN, ["pretrain", "--store=s3://{bucket}/run", MISSING], 2, "access denied"),
        (TRAIN, ["pretrain", "--device=cuda"], 2, "no GPU"),
        (TRAIN, ["pretrain", "--batchsize=3"], 2, "unrecognized arguments"),
        (TRAIN, ["pretrain", "--data=data/none"], 3, "no dataset.json"),
        (TRAIN, ["prepare", "--corpus=text", "--source=s3://{bucket}/none.txt", "--out=data/other"], 3, "s3://"),
        (SERVE, [], 2, "BABYBERT_MODEL_URI"),
        (SERVE, [{"BABYBERT_MODEL_URI": "/models/none"}], 3, "/models/none"),
        (SERVE, [{"BABYBERT_MODEL_URI": "s3://no-such-bucket/run"}], 3, "no such object or bucket"),
        (SERVE, [{"BABYBERT_MODEL_URI": "s3://{bucket}/none"}], 3, "no valid checkpoint there"),
        (SERVE, [{"BABYBERT_MODEL_URI": "s3://{bucket}/run", **MISSING}], 2, "access denied"),
    ],
    ids=lambda value: "-".join(str(part) for part in value)[:60] if isinstance(value, list) else None,
)
def test_bad_input_exits_at_once_with_one_line(
    engine: Engine, data: Path, s3: S3, image: str, command: list[Any], code: int, says: str
) -> None:
    variables = container_variables()
    arguments = []
    for argument in command:
        if isinstance(argument, dict):
            variables |= {name: value.replace("{bucket}", s3.bucket) for name, value in argument.items()}
        else:
            arguments.append(argument.replace("{bucket}", s3.bucket))
    done = engine.run(
        image,
        *arguments,
        flags=[f"-v={data}:/babybert/data"],
        network="host",
        variables={**variables, "BABYBERT_PRETRAIN_METRICS_PORT": "0"},
    )
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1, done.stderr
    assert says in errors[0]
    assert "Traceback" not in done.stderr


def test_a_read_only_volume_is_named(engine: Engine, data: Path, tmp_path: Path) -> None:
    read_only = tmp_path / "read-only"
    read_only.mkdir(mode=0o755)
    done = engine.run(
        TRAIN, "pretrain", "--no-metrics", flags=[f"-v={data}:/babybert/data", f"-v={read_only}:/babybert/runs"]
    )
    assert done.returncode == 2
    assert "runs/demo: cannot be written: Permission denied" in done.stderr
    assert "Traceback" not in done.stderr


PlayPod = Callable[..., tuple[dict[str, int], str]]


@pytest.fixture
def pod(engine: Engine, s3: S3) -> Iterator[PlayPod]:
    """A function that runs the Job template of the local overlay as a Pod. It returns exit codes and logs."""
    if engine.name != "podman":
        pytest.skip("`podman kube play` needs podman")
    resources = rendered("overlays/local")
    played: list[Path] = []

    def remove_leftovers() -> None:
        """What an earlier test or a killed test run has left under the same names."""
        engine("pod", "rm", "-f", "pod")
        for volume in ("babybert-runs", "babybert-pretrain"):
            engine("volume", "rm", "-f", volume)

    def play(folder: Path, **changes: Any) -> tuple[dict[str, int], str]:
        config = copy.deepcopy(only(resources, "ConfigMap", "babybert-pretrain"))
        settings = yaml.safe_load(config["data"]["run.yaml"])
        settings["prepare"]["demo_documents"] = 80
        store = changes.pop("store", f"s3://{s3.bucket}/run")
        settings["pretrain"] |= {"width": 8, "heads": 2, "epochs": 1, **changes}
        config["data"]["run.yaml"] = yaml.safe_dump(settings)
        template = copy.deepcopy(only(resources, "Job")["spec"]["template"])
        spec = template["spec"] | {"hostNetwork": True}
        variables = {
            **container_variables(),
            "OMP_NUM_THREADS": "1",
            "BABYBERT_PRETRAIN_STORE": store,
            "BABYBERT_PRETRAIN_METRICS_PORT": str(free_ports(1)[0]),
        }
        for container in spec["initContainers"] + spec["containers"]:
            container["imagePullPolicy"] = "Never"
            container.pop("envFrom")
            container.pop("ports", None)  # the pod uses the host's network
            container["env"] = [{"name": name, "value": value} for name, value in variables.items()]
            for probe in ("startupProbe", "livenessProbe"):
                container.pop(probe, None)
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], "name": "pod"}, "spec": spec}
        path = folder / f"pod-{len(played)}.yaml"
        # podman refuses a claim that is bound already.
        claim = [] if played else [only(resources, "PersistentVolumeClaim")]
        path.write_text(yaml.safe_dump_all([config, *claim, body]))
        played.append(path)
        done = engine("kube", "play", "--network=host", str(path))
        assert done.returncode == 0 or "init container" in done.stderr, done.stderr
        names = [name for name in engine("ps", "-a", "--format={{.Names}}").stdout.split() if name.startswith("pod-")]
        codes = {name: engine.exit_code(name) for name in names if name.endswith("-pretrain")}
        logs = "".join(engine("logs", name).stderr + engine("logs", name).stdout for name in names)
        engine("kube", "down", str(path))
        return codes, logs

    remove_leftovers()
    yield play
    for path in played:
        engine("kube", "down", str(path))
    remove_leftovers()


def test_the_pod_of_the_job_runs(pod: PlayPod, s3: S3, tmp_path: Path) -> None:
    """Init container, ConfigMap, volumes and security context are as rendered; a second pod resumes from the volume."""
    codes, logs = pod(tmp_path)
    assert codes == {"pod-pretrain": 0}, logs
    assert [
        item["Key"]
        for item in s3.client.list_objects_v2(Bucket=s3.bucket, Prefix="run/")["Contents"]
        if item["Key"].endswith("manifest.json")
    ]
    codes, logs = pod(tmp_path, epochs=2)
    assert codes == {"pod-pretrain": 0}, logs
    assert "resuming from runs/run/step-" in logs


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"epoch": 1}, 2), ({"device": "cuda"}, 2), ({"data": "data/none"}, 3), ({"store": "s3://no-such-bucket/run"}, 3)],
)
def test_the_exit_codes_of_the_pod(pod: PlayPod, tmp_path: Path, changes: dict[str, Any], code: int) -> None:
    codes, logs = pod(tmp_path, **changes)
    assert codes == {"pod-pretrain": code}, logs


def test_the_ray_image_runs_what_kuberay_starts(engine: Engine, data: Path, tmp_path: Path) -> None:
    """The head of a cluster, as the operator starts it with a token, its health checks, and the command."""
    if engine("image", "inspect", RAY).returncode:
        pytest.skip(f"{RAY} is not built; run `docker/build-images.sh ray`")
    folder = writable(tmp_path / "data")
    group = only(written("prepare-rayjob.yaml"), "RayJob")["spec"]["rayClusterSpec"]["headGroupSpec"]
    (container,) = group["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    health = [f"http://localhost:{ports['dashboard']}{container['readinessProbe']['httpGet']['path']}"]
    health += ["http://localhost:52365/api/local_raylet_healthz"]  # of workers
    script = f"""
        set -e
        ray start --head --num-cpus=2 --object-store-memory=100000000 --node-ip-address=127.0.0.1
        for url in {" ".join(health)}; do
          python -c 'import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=60).read())' $url
        done
        babybert prepare --engine=ray --ray-address=auto --out=data/ray
    """
    flags = ["--entrypoint=/bin/bash", "--shm-size=1g", f"-v={folder}:/babybert/data"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    done = engine.run(RAY, "-c", script, flags=flags, variables=token)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("b'success'") == 2
    (prepared,) = data.iterdir()
    for path in filter(Path.is_file, prepared.iterdir()):
        assert (folder / "ray" / path.name).read_bytes() == path.read_bytes()
