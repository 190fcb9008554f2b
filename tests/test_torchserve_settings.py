"""What TorchServe is started with. The tests of the running server are in system/test_serve.py."""

import json
import os
import re
import socket
from pathlib import Path

import pytest

from babybert import cli
from babybert.config import ServeConfig
from babybert.errors import UsageError
from babybert.serving import torchserve_settings
from babybert.serving.torchserve_settings import (
    check_folder,
    choose_addresses,
    free_ports,
    launch_environment,
    resolve_host,
    write_settings,
)

# Variables that TorchServe 0.12's Python and Java code, log4j, Java and Python read. Each could change the server.
FOREIGN = """
TS_CONFIG_FILE TS_MODEL_SERVER_HOME TS_OPEN_INFERENCE_PROTOCOL TS_BENCHMARK TS_DECODE_INPUT_REQUEST
TS_INFERENCE_ADDRESS TS_MANAGEMENT_ADDRESS TS_METRICS_ADDRESS TS_DISABLE_TOKEN_AUTHORIZATION TS_ENABLE_MODEL_API
TS_ALLOWED_URLS TS_HEADER_KEY_SEQUENCE_ID TS_HEADER_KEY_SEQUENCE_START TS_HEADER_KEY_SEQUENCE_END SM_TELEMETRY_LOG
MXNETMODELSERVER_PROGRAM DOMAIN REALM TEMP LOG_LOCATION METRICS_LOCATION ENABLE_TORCH_PROFILER
LOCAL_RANK RANK WORLD_SIZE LOCAL_WORLD_SIZE
LOG4J_CONFIGURATION_FILE LOG4J_LAYOUT_JSONTEMPLATE_TIME_ZONE
JAVA_HOME JAVA_OPTS JAVA_TOOL_OPTIONS JDK_JAVA_OPTIONS _JAVA_OPTIONS CLASSPATH
PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONINSPECT PYTHONOPTIMIZE PYTHONWARNINGS PYTHONSAFEPATH PYTHONUNBUFFERED
AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_DEFAULT_REGION
http_proxy https_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY no_proxy LANG LC_ALL LC_NUMERIC
BABYBERT_SERVE_HOST BABYBERT_MODEL_URI
"""
NEEDED = {
    "PATH": "/bin",
    "HOME": "/root",
    "LD_LIBRARY_PATH": "/lib",
    "OMP_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "10",
    "NUMBA_CACHE_DIR": "/tmp/numba",
    "CUDA_VISIBLE_DEVICES": "",
}


def test_only_named_variables_are_passed_on() -> None:
    environment = launch_environment({**dict.fromkeys(FOREIGN.split(), "foreign"), **NEEDED}, Path("/work"))
    written = dict.fromkeys(("TMPDIR", "TEMP", "LOG_LOCATION", "METRICS_LOCATION"), "/work")
    assert environment == {**NEEDED, **written, "LC_ALL": "C.UTF-8"}


@pytest.mark.parametrize("host", ["::1", "nobody.invalid", "a..b", "http://127.0.0.1", "127.0.0.1/8", "x" * 80])
def test_a_host_that_is_no_ipv4_address_is_refused(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--host", host, "x.mar"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(
        r"babybert serve: error: (--host \S+: not an IPv4 address, nor a name|host is '\S+'; it must be)", line
    )
    assert host in line


def test_hosts_are_resolved() -> None:
    assert [resolve_host(host) for host in ("localhost", "127.0.0.1", "0.0.0.0")] == [
        "127.0.0.1",
        "127.0.0.1",
        "0.0.0.0",
    ]


def test_free_ports_are_different_and_not_those_of_outgoing_connections() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert all(15000 <= port < 30000 for port in ports)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ports[0]))
        assert ports[0] not in free_ports(14900)
    with pytest.raises(UsageError, match="no 15001 ports are free"):
        free_ports(15001)


def test_an_address_that_cannot_be_used_is_refused() -> None:
    first, second = free_ports(2)
    config = ServeConfig(host="192.0.2.1", inference_port=first, metrics_port=second)  # an address for documentation
    with pytest.raises(UsageError, match=rf"cannot listen on 192\.0\.2\.1:{first} \(.*; choose another .* or --host"):
        choose_addresses(config)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may listen on every port")
def test_a_port_that_needs_rights_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cannot listen on 127\.0\.0\.1:1 \("):
        choose_addresses(ServeConfig(inference_port=1))


def test_a_folder_that_torchserve_cannot_use_is_refused(tmp_path: Path) -> None:
    check_folder(Path("/tmp/Ümlaut #1, 100%"))
    for folder, reason in (
        (Path(f"/tmp/{'x' * 90}"), "too long"),
        (Path(os.fsdecode(b"/tmp/\xff")), "not valid UTF-8"),
    ):
        with pytest.raises(UsageError, match=f"{reason}.*set TMPDIR"):
            check_folder(folder)


def test_paths_in_the_settings_are_escaped_as_java_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("/opt/Ü \\ 👶 #1 = 100%")
    monkeypatch.setattr(torchserve_settings, "handler_folder", lambda: folder)
    config = ServeConfig()
    addresses = torchserve_settings.ListenAddresses(*[("127.0.0.1", port) for port in range(5)])
    lines = write_settings(tmp_path, config, addresses).read_bytes().decode("latin-1").splitlines()
    (value,) = [line.partition("=")[2] for line in lines if line.startswith("metrics_config=")]
    assert value.isascii()
    assert json.loads(f'"{value}"') == f"{folder}/metrics.yaml"
