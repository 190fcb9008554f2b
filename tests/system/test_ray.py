"""`prepare` on Ray writes the same bytes as in one process: in a cluster of its own, a running one, after a kill."""

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_jobs
import numpy as np
import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
from conftest import S3, aws_variables, run_until_killed
from engine_corpus import BAD_ROWS, corpus_config, digests, make_many_batches
from faulty_proxy import Refusal, S3Proxy, pass_all
from processes import run_babybert, start_babybert
from test_output_prefix import is_upload, objects

from babybert.config import PrepareConfig
from babybert.data.engine import WorkerDied
from babybert.data.prepare import prepare
from babybert.errors import DataError, StorageError, UsageError

ray_engine = pytest.importorskip("babybert.data.ray_engine")
Digests = dict[str, dict[str, str]]
# A cluster has several processes, which must answer each other in time.
pytestmark = pytest.mark.serial


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    """Changes that last for all tests of this module."""
    with pytest.MonkeyPatch.context() as patch:
        make_many_batches(patch)
        yield patch


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> dict[str, PrepareConfig]:
    """How to prepare a corpus of each kind."""
    folder = tmp_path_factory.mktemp("corpus")
    return {
        "csv": corpus_config(folder / "csv", "csv"),
        "jsonl": dataclasses.replace(
            corpus_config(folder / "jsonl", "jsonl"), tokenizer_kind="wordpiece", vocab_size=300, segments="runs"
        ),
        "demo": PrepareConfig(demo_documents=300, validation_fraction=0.1),
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, configs: dict[str, PrepareConfig]) -> Digests:
    """The files that one process writes."""
    folder = tmp_path_factory.mktemp("expected")
    for name, config in configs.items():
        prepare(dataclasses.replace(config, out=folder / name, workers=1))
    return {name: digests(folder / name) for name in configs}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch, s3_endpoint: str) -> Iterator[str]:
    """The address of a cluster of two CPUs, which the tests connect to as to one of other machines.

    Its workers use the S3 server itself, whatever the tests set for the driver.
    """
    ray = ray_engine.ray
    for name, value in aws_variables(s3_endpoint).items():
        patch.setenv(name, value)
    patch.setenv("PYTHONPATH", str(Path(engine_jobs.__file__).parent), prepend=os.pathsep)
    with ray_engine.RayEngine(tmp_path_factory.mktemp("cluster"), 2, None):
        address = ray.get_runtime_context().gcs_address
        init, shutdown = ray.init, ray.shutdown
        # This process is connected already. To connect once more would take seconds for each test.
        ray.init = lambda *arguments, **settings: arguments == (address,) or init(*arguments, **settings)
        ray.shutdown = lambda: None
        try:
            yield address
        finally:
            ray.init, ray.shutdown = init, shutdown


def is_running(process: psutil.Process, name: str = "") -> bool:
    """Whether a process has this name, or any, and has not ended."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.name().startswith(name))
    except psutil.NoSuchProcess:
        return False


def test_a_cluster_is_started_on_loopback_and_stopped(
    tmp_path: Path,
    configs: dict[str, PrepareConfig],
    expected: Digests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one worker. The processes are looked at in the middle of the work."""
    listening: set[str] = set()
    processes: list[psutil.Process] = []
    earlier = set(psutil.Process().children(recursive=True))  # of other tests
    start = ray_engine.RayEngine._start

    def look_and_start(engine: Any, *arguments: Any) -> Any:
        if not listening:
            processes.extend(filter(is_running, set(psutil.Process().children(recursive=True)) - earlier))
            for process in processes:
                connections = process.net_connections()
                listening.update(connection.laddr.ip for connection in connections if connection.status == "LISTEN")
        return start(engine, *arguments)

    monkeypatch.setattr(ray_engine.RayEngine, "_start", look_and_start)
    prepare(dataclasses.replace(configs["csv"], out=tmp_path / "out", engine="ray", workers=1))
    assert digests(tmp_path / "out") == expected["csv"]
    assert listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert processes
    deadline = time.monotonic() + 30
    while (left := [process for process in processes if is_running(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_a_running_cluster_writes_the_same_bytes(
    tmp_path: Path, cluster: str, configs: dict[str, PrepareConfig], expected: Digests
) -> None:
    for name, config in configs.items():
        facts = prepare(dataclasses.replace(config, out=tmp_path / name, engine="ray", ray_address=cluster))
        assert digests(tmp_path / name) == expected[name]
        assert facts["skipped_rows"] == (0 if name == "demo" else BAD_ROWS)


@pytest.mark.parametrize("job", [4, 40])
def test_a_worker_that_is_killed_does_not_change_the_data(
    tmp_path: Path,
    cluster: str,
    configs: dict[str, PrepareConfig],
    expected: Digests,
    job: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[Any] = []
    killed: list[int] = []
    start = ray_engine.RayEngine._start

    def start_and_kill(engine: Any, *arguments: Any) -> Any:
        started.append(start(engine, *arguments))
        # The job may have ended before it is seen. Then a worker of a later one is killed.
        deadline = time.monotonic() + 0.5
        while len(started) >= job and not killed and time.monotonic() < deadline:
            busy = [child for child in psutil.Process().children(recursive=True) if is_running(child, "ray::_run")]
            if busy:
                os.kill(busy[0].pid, signal.SIGKILL)
                killed.append(busy[0].pid)
        return started[-1]

    monkeypatch.setattr(ray_engine.RayEngine, "_start", start_and_kill)
    prepare(dataclasses.replace(configs["csv"], out=tmp_path / "out", engine="ray", ray_address=cluster))
    assert killed
    assert digests(tmp_path / "out") == expected["csv"]


def test_a_cluster_that_does_not_start_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a plain Exception if a part of it is killed, or the machine is too slow."""

    def fail(*arguments: Any, **settings: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...\nmore")

    monkeypatch.setattr(ray_engine.ray, "init", fail)
    with (
        pytest.raises(StorageError, match="Ray cannot be started: The current node timed out"),
        ray_engine.RayEngine(tmp_path, 1, None),
    ):
        pass


def test_small_data_is_not_in_the_memory_of_the_driver(cluster: str, tmp_path: Path) -> None:
    with ray_engine.RayEngine(tmp_path, None, cluster) as engine:
        (result,) = engine.map(engine_jobs.double, [(1, [np.arange(10)])], pieces=1)
        assert engine.get(result.handles[0])[0].tolist() == list(range(0, 20, 2))
        locations = ray_engine.ray.experimental.get_object_locations(result.handles)
        assert locations[result.handles[0]]["node_ids"]  # none for an object that its owner has


def test_jobs_may_be_left_at_any_moment(cluster: str, tmp_path: Path) -> None:
    """Ray ended this process if a task was cancelled just as it finished, about once in 200 times."""
    with ray_engine.RayEngine(tmp_path, 2, cluster) as engine:
        for n in range(200):
            results = engine.map(engine_jobs.double, ((n, [np.arange(10)]) for _ in range(100)), pieces=1)
            for _ in range(1 + n % 3):
                assert next(results).summary[1] == 2 * n
            results.close()


def test_errors_of_jobs_are_those_of_this_machine(
    tmp_path: Path, cluster: str, configs: dict[str, PrepareConfig]
) -> None:
    config = dataclasses.replace(configs["csv"], out=tmp_path / "out", engine="ray", ray_address=cluster)
    with pytest.raises(DataError, match=r"1.csv: row 61: has 2 cells, the header has 1"):
        prepare(dataclasses.replace(config, skip_bad_rows=False))
    assert not (tmp_path / "out").exists()
    with ray_engine.RayEngine(tmp_path, 2, cluster) as engine:
        with pytest.raises(ValueError, match="number 2"):
            list(engine.map(engine_jobs.fail_at, ((n, {2, 4}) for n in range(1, 100))))
        with pytest.raises(WorkerDied):
            list(engine.map(engine_jobs.die_until, [(3, tmp_path, 99)], pieces=1))


def test_workers_of_a_running_cluster_upload_their_shards_themselves(
    cluster: str, configs: dict[str, PrepareConfig], expected: Digests, s3: S3, s3_proxy: S3Proxy
) -> None:
    """The driver uses a proxy, which sees no shard. A server where nothing arrives is noticed before the work."""
    for name, config in configs.items():
        prepare(dataclasses.replace(config, out=f"s3://{s3.bucket}/{name}", engine="ray", ray_address=cluster))
        assert objects(s3, f"{name}/") == expected[name]
    assert not any(map(is_upload, s3_proxy.requests))
    s3_proxy.rule = lambda request: Refusal(404) if request.method == "HEAD" else None
    config = dataclasses.replace(configs["csv"], out=f"s3://{s3.bucket}/other", engine="ray", ray_address=cluster)
    with pytest.raises(UsageError, match="workers use another S3 server than this command"):
        prepare(config)
    s3_proxy.rule = pass_all
    prepare(config)
    assert objects(s3, "other/") == expected["csv"]


def test_workers_of_a_running_cluster_fetch_sources_themselves(
    cluster: str, configs: dict[str, PrepareConfig], expected: Digests, s3: S3, s3_proxy: S3Proxy, tmp_path: Path
) -> None:
    """The driver uses a proxy, which sees no source."""
    for path in map(Path, configs["csv"].source):
        s3.client.upload_file(str(path), s3.bucket, f"in/{path.name}")
    config = dataclasses.replace(configs["csv"], source=(f"s3://{s3.bucket}/in",), out=tmp_path / "out")
    assert prepare(dataclasses.replace(config, engine="ray", ray_address=cluster))["skipped_rows"] == BAD_ROWS
    assert {**digests(tmp_path / "out"), "dataset.json": ""} == {**expected["csv"], "dataset.json": ""}
    assert not [request for request in s3_proxy.requests if request.path.endswith(".csv")]


def test_a_cluster_of_this_machine_uploads_to_s3(s3: S3, expected: Digests) -> None:
    flags = ["prepare", "--demo-documents=300", "--validation-fraction=0.1", "--engine=ray", "--workers=1"]
    done = run_babybert(*flags, f"--out=s3://{s3.bucket}/data")
    assert done.returncode == 0, done.stderr
    assert objects(s3, "data/") == expected["demo"]


def test_without_a_cluster_the_error_names_the_address(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        prepare(PrepareConfig(out=tmp_path / "out", engine="ray", ray_address="127.0.0.1:1"))
    assert not (tmp_path / "out").exists()


def test_a_killed_command_ends_its_cluster_and_the_next_one_goes_on(tmp_path: Path) -> None:
    """The second command runs without Ray: what is finished does not depend on the engine."""
    config = PrepareConfig(demo_documents=300, validation_fraction=0.1, out=tmp_path / "expected")
    prepare(config)
    out = tmp_path / "data"
    flags = ["prepare", "--demo-documents=300", "--validation-fraction=0.1", f"--out={out}"]
    before = {process.pid for process in psutil.process_iter()}
    run_until_killed("babybert.data.finished_shards:FinishedShards.add", 2, *flags, "--engine=ray", "--workers=1")
    deadline = time.monotonic() + 30
    while (left := [process for process in psutil.process_iter() if of_ray(process, before)]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert not left
    second = start_babybert(*flags)
    assert second.wait() == 0, second.output
    assert "1 of 2 shards were finished by an earlier command" in second.output
    assert digests(out) == digests(tmp_path / "expected")


def of_ray(process: psutil.Process, before: set[int]) -> bool:
    """Whether this is a process of a Ray cluster that has been started since.

    Ray's agents do not count. They end about a minute later, when they have given up to report the death of the others.
    """
    try:
        command = " ".join(process.cmdline())
        return process.pid not in before and is_running(process) and "ray" in command and "Agent" not in command
    except psutil.Error:
        return False
