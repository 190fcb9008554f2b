"""How `prepare` scales: text of several sizes with one and two workers, and on Ray.

    python benchmarks/scale.py                                   # 20 minutes on two cores; needs 20 GB of disk
    python benchmarks/scale.py --sizes 64 256 --engines local-1 local-2

The text is generated as it is read, and not stored. Each case runs in a process of its own. Prints speed, the memory of
the driver and of its largest worker, the bytes that are sent to the shards, the seconds of work per block, and ratios.
All cases of a size must write the same bytes. Writes the figures as JSON; `scale_simulation.py` continues from them.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
from generated_text import GeneratedText
from timed_jobs import run_timed

from babybert.config import PrepareConfig
from babybert.corpus.files import BadRows
from babybert.data.block_plan import BLOCK_TOKENS
from babybert.data.engine import Engine, Function, Result
from babybert.data.local_engine import InProcessEngine, LocalEngine
from babybert.data.output_folder import OutputFolder
from babybert.data.prepare_corpus import prepare_corpus
from babybert.logs import configure_logging

MB = 1_000_000
MIB = 1 << 20
SIZES = (64, 256, 1024, 4096)
ENGINES = ("local-1", "local-2", "ray-2")
LARGEST_OF_ALL_ENGINES = 1024  # larger text is prepared by `local-2` alone
SECONDS_BETWEEN_SAMPLES = 0.5


def main() -> None:
    """Run all cases, print them, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="MB of text")
    parser.add_argument("--engines", nargs="+", default=ENGINES, help="local-N or ray-N, for N workers")
    parser.add_argument("--tokenizer-kind", choices=("basic-english", "wordpiece"), default="basic-english")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/scale.json"), help="path of the JSON file")
    parser.add_argument("--case", nargs=2, metavar=("ENGINE", "MB"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        configure_logging()
        print(json.dumps(run_case(options.case[0], int(options.case[1]), options.tokenizer_kind)))
        return
    cases: list[dict[str, Any]] = []
    for size in options.sizes:
        engines = options.engines if size <= LARGEST_OF_ALL_ENGINES else options.engines[-2:-1]
        for engine in engines:
            cases.append(case_in_a_process(engine, size, options.tokenizer_kind))
            print_case(cases[-1], next(case for case in cases if case["mb"] == size))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(cases, indent=2) + "\n")  # not with `common`, which imports PyTorch
    print(f"written: {options.json}")


def case_in_a_process(engine: str, size: int, tokenizer_kind: str) -> dict[str, Any]:
    """Run one case in a new process."""
    command = [sys.executable, __file__, "--tokenizer-kind", tokenizer_kind, "--case", engine, str(size)]
    # Ray's workers do not inherit `sys.path`, and have to find `timed_jobs`.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path[1:]])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    case: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return case


def run_case(name: str, size: int, tokenizer_kind: Any) -> dict[str, Any]:
    """Prepare text of `size` MB with an engine, and return figures."""
    kind, _, workers = name.partition("-")
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".scale-") as folder:
        out = Path(folder) / "out"
        config = PrepareConfig(corpus="demo", out=out, tokenizer_kind=tokenizer_kind, vocab_size=8192)
        output = OutputFolder(out)
        start = time.perf_counter()
        with (
            output.open(),
            timed_engine(kind, int(workers), output.work) as engine,
            sampled_memory() as (driver_bytes, worker_bytes),
        ):
            writer = prepare_corpus(config, GeneratedText(size * MB), BadRows(), output, engine)
            facts = writer.finish(0)
        seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    digests = [shard["sha256"] for split in ("train", "validation") for shard in facts["shards"][split]]
    blocks = max(1, round(facts["tokens"] / BLOCK_TOKENS))
    return {
        "engine": name,
        "mb": size,
        "seconds": seconds,
        "documents": facts["documents"],
        "tokens": facts["tokens"],
        "blocks": blocks,
        "shards": len(digests),
        "sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "driver_mib": max(driver_bytes) / MIB,
        "driver_cpu_seconds": usage.ru_utime + usage.ru_stime,
        "worker_mib": max(worker_bytes) / MIB,
        "jobs": engine.jobs,
        "job_seconds": engine.seconds,
        "job_bytes": engine.bytes_returned,
        "input_seconds": engine.input_seconds,
        "result_seconds": engine.result_seconds,
    }


class TimedJobs(Engine):
    """Adds up by the name of the job: how many there were, their seconds, and the bytes that they returned.

    Also for how many seconds the driver made their inputs (which may wait for other jobs) and used their results.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.jobs: collections.Counter[str] = collections.Counter()
        self.seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self.bytes_returned: collections.Counter[str] = collections.Counter()
        self.input_seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self.result_seconds: collections.defaultdict[str, float] = collections.defaultdict(float)

    def map(self, function: Function, inputs: Iterable[tuple[Any, ...]], pieces: int = 0) -> Generator[Result]:
        """Run the jobs with `run_timed`; see `Engine.map`."""
        name = function.__name__
        timed_inputs = self._timed_inputs(name, inputs)
        with contextlib.closing(super().map(functools.partial(run_timed, function), timed_inputs, pieces)) as results:
            for result in results:
                timed = result.summary
                self.jobs[name] += 1
                self.seconds[name] += timed.seconds
                self.bytes_returned[name] += timed.bytes_returned
                start = time.perf_counter()
                yield result._replace(summary=timed.summary)
                self.result_seconds[name] += time.perf_counter() - start

    def _timed_inputs(self, name: str, inputs: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        start = time.perf_counter()
        for arguments in inputs:
            self.input_seconds[name] += time.perf_counter() - start
            yield arguments
            start = time.perf_counter()


def timed_engine(kind: str, workers: int, folder: Path) -> Any:
    """Return an engine that times its jobs."""
    if kind == "ray":
        from babybert.data.ray_engine import RayEngine

        return type("TimedRayEngine", (TimedJobs, RayEngine), {})(folder, workers, None)
    if workers == 1:
        return type("TimedInProcessEngine", (TimedJobs, InProcessEngine), {})(folder)
    return type("TimedLocalEngine", (TimedJobs, LocalEngine), {})(folder, workers)


@contextlib.contextmanager
def sampled_memory() -> Iterator[tuple[list[int], list[int]]]:
    """Sample the memory of this process and of each worker, without what they share. Yields both lists of samples.

    Ray's object store is shared memory.
    """
    driver_bytes, worker_bytes = [0], [0]
    stop = threading.Event()

    def private(process: psutil.Process) -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    def sample() -> None:
        this_process = psutil.Process()
        while not stop.wait(SECONDS_BETWEEN_SAMPLES):
            driver_bytes.append(private(this_process))
            for process in this_process.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    # Of Ray's processes, only those that run jobs.
                    if "ray" not in " ".join(process.cmdline()) or process.name().startswith("ray::"):
                        worker_bytes.append(private(process))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield driver_bytes, worker_bytes
    finally:
        stop.set()
        thread.join()


def print_case(case: dict[str, Any], first: dict[str, Any]) -> None:
    """Print a case, with its ratio to the first one of the same size."""
    assert case["sha256"] == first["sha256"], "the cases of a size wrote different bytes"
    shuffled = case["job_bytes"].get("partition", 0) + case["job_bytes"].get("partition_again", 0)
    block_seconds = case["job_seconds"]["write_shard"] / case["blocks"]
    print(
        f"{case['engine']:<8} {case['mb']:>6,} MB  {case['seconds']:7.1f} s  {case['mb'] / case['seconds']:5.1f} MB/s"
        f"  {case['documents'] / case['seconds']:>7,.0f} documents/s  {first['seconds'] / case['seconds']:5.2f}x"
        f" of {first['engine']}  driver {case['driver_mib']:>5,.0f} MiB  worker {case['worker_mib']:>5,.0f} MiB"
        f"  sent {shuffled / MB:>6,.0f} MB  {block_seconds:.2f} s a block  {case['shards']} shards",
        flush=True,
    )


if __name__ == "__main__":
    main()
