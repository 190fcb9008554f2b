"""docker/compose.yaml as a whole: the server follows the run, and each service comes back after it was killed.

`make test-compose` builds the images and runs this with `docker compose` or podman-compose. A plain `pytest` does not
collect this file. It needs root, the ports of the file and a network with names (podman: netavark and aardvark-dns). If
no registry answers, the S3 server is made from the one of the other tests, and Prometheus and Grafana are left out.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from deployment import ROOT, need
from images import SERVE, TRAIN, Engine, engine, wait_for

__all__ = ["engine"]  # a fixture

PROJECT = "babybert-test"
SECONDS_TO_LEARN = 300  # from `up` to an answer of a model that has learned
SECONDS_TO_FOLLOW = 120  # from an answer to one of a newer checkpoint, of which there is one each minute
SECONDS_TO_RECOVER = 60
URL = "http://127.0.0.1:8080/predictions/babybert"
PORTS = {"serve": 8080, "playground": 7860, "prometheus": 9090, "grafana": 3000}


class Compose:
    """The project of the tests, with the images that are there."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        if engine.name == "docker":
            self._command = ["docker", "compose"]
        else:
            self._command = [need("podman-compose", "`make test-compose` brings it")]
        services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
        self.services = [name for name in services if name != "pretrain-gpu"]
        self._files = ["-f", str(ROOT / "docker/compose.yaml")]
        for name in ("prometheus", "grafana"):
            if not self._is_available(services[name]["image"]):
                self.services.remove(name)
        if not self._is_available(services["seaweedfs"]["image"]):
            self._files += ["-f", str(self._write_s3_server(folder))]

    def _is_available(self, image: str) -> bool:
        found = self.engine("image", "inspect", image).returncode == 0
        return found or self.engine("pull", "--quiet", image).returncode == 0

    def _write_s3_server(self, folder: Path) -> Path:
        """An image with the `weed` of the tests, and the file that puts it in place of the real one."""
        shutil.copy(need("weed", "`make install` brings it"), folder / "weed")
        (folder / "Dockerfile").write_text(f'FROM {TRAIN}\nUSER root\nCOPY weed /bin/weed\nENTRYPOINT ["/bin/weed"]\n')
        image = f"localhost/{PROJECT}-s3:dev"
        built = self.engine("build", "-t", image, str(folder), timeout=600)
        assert built.returncode == 0, built.stderr
        check = "import socket; socket.create_connection(('127.0.0.1', 8333), 2)"
        healthcheck = {"test": ["CMD", "python", "-c", check], "interval": "2s", "timeout": "5s", "retries": 30}
        override = folder / "compose.yaml"
        volumes = ["data:/babybert/data", "runs:/babybert/runs"]  # of the image that this one is made from
        service = {"image": image, "healthcheck": healthcheck, "volumes": volumes}
        override.write_text(yaml.safe_dump({"services": {"seaweedfs": service}}))
        return override

    def __call__(self, *arguments: str, timeout: float = 600) -> str:
        """The output of one command, which must succeed."""
        command = [*self._command, *self._files, "-p", PROJECT, *arguments]
        environment = {**self.engine.environment, "COMPOSE_PROFILES": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def up(self) -> None:
        """Start all services in the background."""
        self("up", "-d", "--no-build", *self.services)

    def process(self, service: str) -> int:
        """The number of the main process of a service on this machine; 0 if it does not run."""
        labels = {"project": PROJECT, "service": service}
        filters = [f"--filter=label=com.docker.compose.{key}={value}" for key, value in labels.items()]
        container = self.engine("ps", "-q", *filters).stdout.split()
        return int(self.engine("inspect", "--format={{.State.Pid}}", container[0]).stdout) if container else 0

    def volumes(self) -> set[str]:
        """The names of all volumes of the engine."""
        return set(self.engine("volume", "ls", "-q").stdout.split())


def served_step() -> int | None:
    """The step of the checkpoint that answers a request; None without an answer."""
    request = urllib.request.Request(URL, b'{"text": "The [MASK] was superb."}', {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return int(response.headers["X-BabyBERT-Version"].partition("-")[0])
    except OSError:
        return None


def responds(port: int) -> bool:
    """Whether an HTTP server answers on this port of the loopback interface."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def has_restarted(compose: Compose, service: str, old_process: int) -> bool:
    """Whether another process of the service runs."""
    return compose.process(service) not in (0, old_process)


@pytest.fixture(scope="module")
def compose(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """The running system, with the images tagged as the file names them."""
    if os.getuid() != 0:
        pytest.skip("only root can kill the processes of the containers")
    for image in (TRAIN, SERVE):
        engine("tag", image, image.replace(":dev", ":cpu"))
    project = Compose(engine, tmp_path_factory.mktemp("compose"))
    try:
        project.up()
        yield project
    finally:
        project("down", "--volumes", timeout=300)


@pytest.mark.timeout(1200)
def test_the_server_follows_the_run(compose: Compose) -> None:
    """The first checkpoint is nearly untrained."""
    learned = wait_for(lambda: (served_step() or 0) > 100 and served_step(), SECONDS_TO_LEARN)
    wait_for(lambda: (served_step() or 0) > learned, SECONDS_TO_FOLLOW)


@pytest.mark.timeout(1200)
def test_each_service_comes_back(compose: Compose) -> None:
    for service in compose.services:
        if service == "prepare":  # has ended
            continue
        process = compose.process(service)
        assert process, service
        os.kill(process, signal.SIGKILL)
        if service == "pretrain" and compose.engine.name == "podman":
            time.sleep(5)
            compose.up()  # podman restarts no container that depends on one that has ended, as `prepare` has
        wait_for(partial(has_restarted, compose, service, process), SECONDS_TO_RECOVER)
        if service in PORTS:
            wait_for(partial(responds, PORTS[service]), SECONDS_TO_RECOVER)
    step = wait_for(served_step, SECONDS_TO_RECOVER)
    wait_for(lambda: (served_step() or 0) > step, SECONDS_TO_FOLLOW)


@pytest.mark.timeout(1200)
def test_down_and_up_leaves_no_volume_and_keeps_the_model(compose: Compose) -> None:
    step, volumes = wait_for(served_step), compose.volumes()
    start = time.monotonic()
    compose("down", timeout=300)
    compose.up()
    assert compose.volumes() == volumes
    assert wait_for(served_step, SECONDS_TO_LEARN - (time.monotonic() - start)) >= step
