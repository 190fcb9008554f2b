"""Every engine gives the same bytes; what dies or fails is run again or named, and nothing else."""

import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import engine_jobs
import numpy as np
import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
from conftest import run_until_killed
from engine_corpus import BAD_ROWS, corpus_config, digests, make_many_batches
from processes import babybert_command, start_babybert

from babybert.config import PrepareConfig
from babybert.corpus.demo import generate_reviews
from babybert.corpus.documents import open_corpus
from babybert.corpus.files import BadRows
from babybert.data import local_engine
from babybert.data.engine import Engine, WorkerDied, in_order
from babybert.data.local_engine import InProcessEngine, LocalEngine, usable_cores
from babybert.data.prepare import choose_engine, prepare
from babybert.data.tokenize_corpus import CorpusReader
from babybert.errors import DataError, UsageError


def engine_of(workers: int, folder: Path) -> Engine:
    return InProcessEngine(folder) if workers == 1 else LocalEngine(folder, workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_return_summaries_and_leave_data_with_the_engine(tmp_path: Path, workers: int) -> None:
    with engine_of(workers, tmp_path) as engine:
        first = engine.put([np.arange(3), np.zeros((0,), np.int32)])
        results = list(in_order(engine.map(engine_jobs.double, ((n, first, first) for n in range(7)), pieces=2)))
        assert [result.input_index for result in results] == list(range(7))
        assert [result.summary[1] for result in results] == [0, 2, 4, 6, 8, 10, 12]
        processes = {result.summary[0] for result in results}
        assert len(processes) == workers
        assert (os.getpid() in processes) == (workers == 1)
        (again,) = engine.map(engine_jobs.double, [(1, results[3].handles[1])], pieces=1)
        values, empty = engine.get(again.handles[0])
        assert values.tolist() == [0, 4, 8]
        assert (str(empty.dtype), len(empty)) == ("int32", 0)
        engine.drop(again.handles[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_of_several_errors_the_one_of_the_first_input_is_raised(tmp_path: Path, workers: int) -> None:
    with engine_of(workers, tmp_path) as engine, pytest.raises(ValueError, match="number 2"):
        list(engine.map(engine_jobs.fail_at, ((n, {2, 4}) for n in range(1, 100))))


def test_workers_have_the_environment_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("one", "two"):
        monkeypatch.setenv("BABYBERT_TEST_VALUE", value)
        with LocalEngine(tmp_path, 2) as engine:
            results = engine.map(engine_jobs.read_variable, [("BABYBERT_TEST_VALUE",)] * 4)
            assert [result.summary for result in results] == [value] * 4


def test_only_the_job_of_a_dead_process_runs_again(tmp_path: Path) -> None:
    with LocalEngine(tmp_path / "work", 2) as engine:
        (tmp_path / "work").mkdir(exist_ok=True)
        results = list(in_order(engine.map(engine_jobs.die_until, ((n, tmp_path, 2) for n in range(8)), pieces=1)))
        assert [engine.get(result.handles[0])[0].tolist() for result in results] == [[n] * 3 for n in range(8)]
    calls = (tmp_path / "calls").read_text().split()
    assert sorted(calls) == sorted([*map(str, range(8)), "3", "3"])


def test_a_job_that_always_kills_its_process_is_an_error(tmp_path: Path) -> None:
    with LocalEngine(tmp_path / "work", 2) as engine:
        with pytest.raises(WorkerDied, match="died 3 times at the same work"):
            list(engine.map(engine_jobs.die_until, ((n, tmp_path, 99) for n in range(8)), pieces=1))
        assert [result.summary for result in engine.map(engine_jobs.die_until, [(5, tmp_path, 0)], pieces=1)] == [5]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tokenizer_kind", "segments"), [("csv", "basic-english", "runs"), ("jsonl", "wordpiece", "sentences")]
)
def test_the_data_depends_neither_on_the_workers_nor_on_the_order_of_the_files(
    tmp_path: Path,
    kind: str,
    tokenizer_kind: Any,
    segments: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_many_batches(monkeypatch)
    corpus = corpus_config(tmp_path / "corpus", kind)
    config = dataclasses.replace(corpus, tokenizer_kind=tokenizer_kind, segments=segments)
    for workers in (1, 2):
        facts = prepare(dataclasses.replace(config, out=tmp_path / str(workers), workers=workers))
        assert facts["skipped_rows"] == BAD_ROWS
        assert caplog.text.count("skipped: ") == 11  # ten rows, and that there are more
        caplog.clear()
        assert len(facts["shards"]["train"]) > 1
    expected = digests(tmp_path / "1")
    assert digests(tmp_path / "2") == expected
    prepare(dataclasses.replace(config, out=tmp_path / "reverse", workers=2, source=config.source[::-1]))
    in_reverse = digests(tmp_path / "reverse")
    contents = [json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("1", "reverse")]
    assert {**contents[0], "source": ""} == {**contents[1], "source": ""}
    del in_reverse["dataset.json"], expected["dataset.json"]
    assert in_reverse == expected


@pytest.mark.slow
@pytest.mark.parametrize("job", [3, 40])
def test_a_worker_that_is_killed_does_not_change_the_data(
    tmp_path: Path, job: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_many_batches(monkeypatch)
    config = corpus_config(tmp_path / "corpus", "jsonl")
    prepare(dataclasses.replace(config, out=tmp_path / "expected", workers=1))
    started = []
    start = LocalEngine._start

    def start_and_kill(engine: Any, *arguments: Any) -> Any:
        started.append(start(engine, *arguments))
        if len(started) == job:
            (process,) = started[-1].worker.pool._processes.values()
            os.kill(process.pid, signal.SIGKILL)
        return started[-1]

    monkeypatch.setattr(LocalEngine, "_start", start_and_kill)
    prepare(dataclasses.replace(config, out=tmp_path / "killed", workers=2))
    assert len(started) > job
    assert sum(job.deaths for job in started) == 1
    assert digests(tmp_path / "killed") == digests(tmp_path / "expected")


@pytest.mark.slow
@pytest.mark.parametrize("workers_see_files", [True, False])
def test_a_document_that_kills_every_process_is_named(
    tmp_path: Path, workers_see_files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        texts = [f"Number {n} is {'poison' if (name, n) == ('b', 5) else 'good'}." for n in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PrepareConfig(corpus="jsonl", source=(str(tmp_path),))
    corpus = open_corpus(config, tmp_path / "work", BadRows())
    with LocalEngine(tmp_path / "engine", 2) as engine:
        (tmp_path / "engine").mkdir(exist_ok=True)
        monkeypatch.setattr(engine, "workers_see_files", workers_see_files, raising=False)
        reader = CorpusReader(config, corpus, BadRows(), engine)
        with pytest.raises(DataError, match=r"b.jsonl: line 6: a worker process died 3 times when it worked on"):
            list(reader.map("tokenize", engine_jobs.die_at_poison, pieces=1))


def test_an_error_in_a_worker_is_that_of_the_first_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_many_batches(monkeypatch)
    config = dataclasses.replace(corpus_config(tmp_path / "corpus", "csv"), skip_bad_rows=False)
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"1.csv: row 61: has 2 cells, the header has 1"):
            prepare(dataclasses.replace(config, out=tmp_path / "out", workers=workers))
        assert not (tmp_path / "out").exists()


def test_a_small_corpus_stays_in_this_process(tmp_path: Path) -> None:
    config = PrepareConfig(workers=2)
    assert type(choose_engine(config, 1_000_000, tmp_path)) is InProcessEngine
    assert type(choose_engine(dataclasses.replace(config, workers=1), 10**9, tmp_path)) is InProcessEngine
    engine = choose_engine(config, 10**9, tmp_path)
    assert type(engine) is LocalEngine
    with engine:
        assert engine.window == 4


def test_a_container_with_a_limit_has_as_many_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_engine, "CPU_QUOTA", tmp_path / "cpu.max")
    cores = len(os.sched_getaffinity(0))
    for content, expected in (("max 100000", cores), ("50000 100000", 1), ("9900000 100000", cores)):
        (tmp_path / "cpu.max").write_text(content)
        assert usable_cores() == expected


def test_settings_of_the_engine_are_checked() -> None:
    with pytest.raises(UsageError, match="workers is 0; it must be at least 1"):
        PrepareConfig(workers=0)
    with pytest.raises(UsageError, match="--ray-address is for --engine ray"):
        PrepareConfig(ray_address="auto")
    with pytest.raises(UsageError, match="it must be HOST:PORT, or auto"):
        PrepareConfig(engine="ray", ray_address="ray://head:10001")


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, str]]:
    """Flags that prepare a corpus in two processes, and the files that they write."""
    folder = tmp_path_factory.mktemp("large")
    texts = generate_reviews(12_000, seed=0)
    (folder / "reviews.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PrepareConfig(corpus="jsonl", source=(str(folder / "reviews.jsonl"),), out=folder / "data", workers=1)
    assert config.source
    prepare(config)
    return ["prepare", "--corpus=jsonl", f"--source={config.source[0]}", "--workers=2"], digests(folder / "data")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "finished"),
    [
        ("babybert.data.tokenize_corpus:TokenizedCorpus.add", 0),
        ("babybert.data.finished_shards:FinishedShards.add", 1),
    ],
)
def test_a_killed_command_ends_its_workers_and_the_next_one_goes_on(
    tmp_path: Path,
    function: str,
    finished: int,
    large_corpus: tuple[list[str], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags, expected = large_corpus
    out = tmp_path / "data"
    monkeypatch.setenv("BABYBERT_TEST_MARK", str(tmp_path))
    run_until_killed(function, 2, *flags, f"--out={out}")
    deadline = time.monotonic() + 20
    while (left := processes_with("BABYBERT_TEST_MARK", str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    assert not (out / "dataset.json").exists()
    second = start_babybert(*flags, f"--out={out}")
    assert second.wait() == 0, second.output
    assert digests(out) == expected
    assert ("1 of 2 shards were finished by an earlier command" in second.output) == (finished == 1)


def processes_with(variable: str, value: str) -> list[psutil.Process]:
    """The other processes that have this environment variable and have not ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(variable) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100_000, 6_000_000])
def test_a_full_disk_in_a_worker_is_reported_in_one_line(
    tmp_path: Path, limit: int, large_corpus: tuple[list[str], dict[str, str]]
) -> None:
    """A limit on the size of files simulates the full disk: for the tokens of a batch, or for the table."""
    command = babybert_command(*large_corpus[0], f"--out={tmp_path / 'data'}")
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1, done.stderr
    (last_line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert last_line.startswith(f"babybert prepare: error: {tmp_path / 'data'}: cannot write the data: File too large")
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_a_script_without_a_main_guard_prepares_once(
    tmp_path: Path, large_corpus: tuple[list[str], dict[str, str]]
) -> None:
    source = large_corpus[0][2].removeprefix("--source=")
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from babybert.config import PrepareConfig\n"
        "from babybert.data.prepare import prepare\n"
        "print('start')\n"
        f"prepare(PrepareConfig(corpus='jsonl', source=({source!r},), out=Path('data'), workers=2))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "start\n"
    assert digests(tmp_path / "data") == large_corpus[1]
