"""A Kubernetes control plane on the loopback interface: etcd, API server and controllers. No kubelet: no pod runs."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from babybert.serving.torchserve import free_ports

Resource = dict[str, Any]  # one Kubernetes object, or any part of one
Found = TypeVar("Found")

START_SECONDS = 60.0
STOP_SECONDS = 10.0
KUBECTL_SECONDS = 60.0
REQUEST_SECONDS = 20.0
POLL_SECONDS = 0.5
LAST_LINES = 15  # of the log of a program that failed


class ClusterError(Exception):
    """A program that is missing or does not start, a command that fails, or a wait that took too long."""


def find_program(name: str, hint: str, folder: Path | None = None) -> str:
    """The path of a program: in `folder` if it is given, else next to this Python, else in PATH."""
    if folder is not None:
        path = shutil.which(name, path=str(folder))
    else:
        path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        raise ClusterError(f"there is no program {name}{f' in {folder}' if folder else ''}; {hint}")
    return path


def wait_for(what: str, condition: Callable[[], Found | None], seconds: float) -> Found:
    """The first result of `condition` that is true. Raises ClusterError if there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not within {seconds:.0f} s")
        time.sleep(POLL_SECONDS)


def responds(port: int) -> bool:
    """Whether a program listens on this port of the loopback interface."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Cluster:
    """A running API server: requests to it, kubectl, and the programs that belong to it.

    Args:
        binaries: The folder with the programs of Kubernetes.
        folder: For data, keys and logs. The caller deletes it.
    """

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries = binaries
        self.folder = folder
        self.kubeconfig = folder / "kubeconfig"
        self.certificate = folder / "certificates/apiserver.crt"  # the API server writes it when it starts
        self._kubectl = find_program("kubectl", "`make lint-deploy` installs it")
        self._token = secrets.token_hex(16)
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._opener = urllib.request.build_opener()
        self._url = ""

    def has_program(self, name: str) -> bool:
        """Whether the folder of programs has this one."""
        return shutil.which(name, path=str(self.binaries)) is not None

    def start_program(self, name: str, path: str, *flags: str) -> None:
        """Start a program that runs until `stop`. Its output goes to a file."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen([path, *flags], cwd=self.folder, stdout=log, stderr=subprocess.STDOUT)
        self._processes.append((name, process))

    def wait_until_up(self, name: str, condition: Callable[[], object]) -> None:
        """Wait until a program is up. Raises ClusterError if any program has ended, or the time is over."""

        def is_up() -> bool:
            self.check_programs()
            return bool(condition())

        wait_for(name, is_up, START_SECONDS)

    def check_programs(self) -> None:
        """Raise ClusterError with the end of the log if a program has ended."""
        for name, process in self._processes:
            if process.poll() is not None:
                log = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
                last = "\n".join(log[-LAST_LINES:])
                raise ClusterError(f"{name} ended with exit code {process.returncode}:\n{last}")

    def stop(self) -> None:
        """End all programs, the newest first."""
        for _, process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def start_api_server(self) -> None:
        """Start etcd and the API server, and wait until it is ready."""
        etcd_port, peer_port, port = free_ports(3)
        etcd_url, peer_url = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{peer_port}"
        self.start_program(
            "etcd",
            find_program("etcd", "on Debian, the package etcd-server has it"),
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={etcd_url}",
            f"--advertise-client-urls={etcd_url}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster=default={peer_url}",
            "--unsafe-no-fsync",
        )
        key = self.folder / "service-accounts.key"
        openssl = find_program("openssl", "install it")
        subprocess.run([openssl, "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        tokens = self.folder / "tokens.csv"
        tokens.write_text(f"{self._token},maintainer,maintainer,system:masters\n")
        self.start_program(
            "kube-apiserver",
            find_program("kube-apiserver", "docs/deploy.md says how to get it", self.binaries),
            f"--etcd-servers={etcd_url}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={port}",
            f"--cert-dir={self.certificate.parent}",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--authorization-mode=RBAC",
            f"--token-auth-file={tokens}",
            "--endpoint-reconciler-type=none",
        )
        self._url = f"https://127.0.0.1:{port}"
        self.wait_until_up("kube-apiserver", self._is_ready)

    def _is_ready(self) -> bool:
        if not self.certificate.exists():
            return False
        if not self.kubeconfig.exists():
            self._connect()
        with contextlib.suppress(OSError):
            self._send("GET", "/readyz").close()
            return True
        return False

    def _connect(self) -> None:
        """Trust the certificate of the API server, and write the file by which other programs find it."""
        context = ssl.create_default_context(cafile=str(self.certificate))
        direct = urllib.request.ProxyHandler({})  # the server is on loopback, whatever proxy the environment names
        self._opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), direct)
        name = "loopback"
        cluster = {"server": self._url, "certificate-authority": str(self.certificate)}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": name, "cluster": cluster}],
            "users": [{"name": name, "user": {"token": self._token}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
            "current-context": name,
        }
        self.kubeconfig.write_text(yaml.safe_dump(content))

    def start_controllers(self) -> None:
        """Start the controller manager. A node of this cluster never reports, so its lifecycle is not watched."""
        self.start_program(
            "kube-controller-manager",
            find_program("kube-controller-manager", "docs/deploy.md says how to get it", self.binaries),
            f"--kubeconfig={self.kubeconfig}",
            f"--service-account-private-key-file={self.folder / 'service-accounts.key'}",
            f"--root-ca-file={self.certificate}",
            "--controllers=*,-node-lifecycle-controller",
            "--leader-elect=false",
            "--secure-port=0",
        )
        path = "/api/v1/namespaces/default/serviceaccounts"
        self.wait_until_up("kube-controller-manager", lambda: self.get(path)["items"])

    def _send(
        self, method: str, path: str, body: Resource | None = None, content_type: str = "application/json"
    ) -> Any:
        request = urllib.request.Request(
            self._url + path,
            json.dumps(body).encode() if body is not None else None,
            {"Authorization": f"Bearer {self._token}", "Content-Type": content_type},
            method=method,
        )
        return self._opener.open(request, timeout=REQUEST_SECONDS)

    def _request(self, *arguments: Any) -> Resource:
        """The answer of the API server. Raises ClusterError with its message."""
        try:
            with self._send(*arguments) as response:
                answer: Resource = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            message = error.read().decode(errors="replace")
            raise ClusterError(f"{arguments[0]} {arguments[1]}: {error.code} {message}") from error
        except OSError as error:
            raise ClusterError(f"{arguments[0]} {arguments[1]}: {error}") from error

    def get(self, path: str) -> Resource:
        """The object or list at this path of the API."""
        return self._request("GET", path)

    def create(self, path: str, body: Resource) -> Resource:
        """Create an object in the list at this path, or a subresource such as an eviction."""
        return self._request("POST", path, body)

    def patch(self, path: str, body: Resource) -> Resource:
        """Change an object by a strategic merge patch, which keeps conditions of other types."""
        return self._request("PATCH", path, body, "application/strategic-merge-patch+json")

    def delete(self, path: str) -> None:
        """Delete an object now, without a grace period, as a kubelet does with a pod that has ended."""
        with contextlib.suppress(urllib.error.HTTPError):  # gone already
            self._send("DELETE", f"{path}?gracePeriodSeconds=0").close()

    def knows(self, resource: Resource) -> bool:
        """Whether the API server has this kind of objects."""
        version = resource["apiVersion"]
        try:
            kinds = self.get(f"/apis/{version}" if "/" in version else f"/api/{version}")["resources"]
        except ClusterError:
            return False
        return resource["kind"] in {each["kind"] for each in kinds}

    def kubectl(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run kubectl with `text` as its input. The caller checks the exit code."""
        command = [self._kubectl, f"--kubeconfig={self.kubeconfig}", f"--cache-dir={self.folder / 'cache'}"]
        environment = {**os.environ, "HOME": str(self.folder), "KUBECTL_KUBERC": "false"}
        try:
            return subprocess.run(
                [*command, *arguments],
                env=environment,
                input=text,
                capture_output=True,
                text=True,
                timeout=KUBECTL_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"kubectl {' '.join(arguments)}: not within {KUBECTL_SECONDS:.0f} s") from error

    def apply(self, namespace: str, resources: list[Resource]) -> None:
        """Apply resources with kubectl. Raises ClusterError with its message."""
        text = yaml.safe_dump_all(resources)
        done = self.kubectl("apply", f"--namespace={namespace}", "--filename=-", text=text)
        if done.returncode:
            raise ClusterError(f"kubectl apply: {done.stderr}")

    def create_namespace(self) -> str:
        """Create a namespace that allows only pods of the Pod Security Standard `restricted`. Returns its new name."""
        labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": "test-", "labels": labels}}
        return str(self.create("/api/v1/namespaces", namespace)["metadata"]["name"])

    def versions(self) -> str:
        """The versions of the programs."""
        answer = json.loads(self.kubectl("version", "--output=json").stdout)
        etcd = subprocess.run([find_program("etcd", ""), "--version"], capture_output=True, text=True, timeout=20)
        return ", ".join(
            [
                f"Kubernetes {answer['serverVersion']['gitVersion']}",
                f"kubectl {answer['clientVersion']['gitVersion']}",
                f"etcd {etcd.stdout.split()[2]}",
            ]
        )


@contextlib.contextmanager
def running_cluster(binaries: Path) -> Iterator[Cluster]:
    """A cluster in a temporary folder, which is deleted at the end, as all programs are stopped."""
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
        cluster = Cluster(binaries, Path(folder))
        try:
            cluster.start_api_server()
            yield cluster
        finally:
            cluster.stop()
