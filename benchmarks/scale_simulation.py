"""How long `prepare` takes on a large cluster: a simulation from the figures of `scale.py`.

    python benchmarks/scale_simulation.py --json runs/benchmarks/scale.json        # half a minute

It runs the jobs of `prepare --engine ray` in their order through a list of cores: tokenize each batch, send the
documents to groups of shards, then to shards, and write the shards. What a job costs comes from the measured cost per
MB of text. On top of it:

- Jobs vary (lognormal), and one node in twenty is three times slower: stragglers.
- Nodes of 16 cores fail, once in 1,000 hours each. The jobs that they ran, and those whose data they held, run again.
- The driver starts one job at a time, and adds up what was counted. With `--driver-reads` it also reads all documents,
  as it does if they are not in S3.
- A node has a network of 10 Gbit/s, and everything that is sent to shards goes through it.

Not simulated: nodes that are added or removed, other users of the network, limits of S3.
"""

import argparse
import heapq
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from babybert.corpus.batches import batch_bytes
from babybert.data.block_plan import BLOCK_TOKENS, FILE_BYTES_PER_TOKEN
from babybert.data.shuffle import plan_shuffle

MB = 1_000_000
CORES_OF_NODE = 16
BYTES_PER_TOKEN = 5  # an id, and whether a sentence ends
NETWORK_BYTES = 10e9 / 8  # per second and node
HOURS_BETWEEN_FAILURES = 1000.0  # of one node
SLOW_NODES, SLOWNESS = 0.05, 3.0
SPREAD = 0.2  # of the logarithm of a job's time
DRIVER_SECONDS_PER_JOB = 0.001  # Ray's drivers start about a thousand tasks a second
DRIVER_BYTES_PER_HANDLE = 2400  # measured with Ray 2.60


@dataclass(frozen=True)
class Costs:
    """What a MB of text costs and becomes.

    Attributes:
        tokenize: seconds of a core for tokenizing and counting.
        partition: seconds of a core for one pass that sends documents to groups or shards, without the network.
        write: seconds of a core for making and writing pairs.
        read: seconds of the driver for reading documents, if it does.
        merge: seconds of the driver for adding up what was counted.
        tokens: tokens.
    """

    tokenize: float
    partition: float
    write: float
    read: float
    merge: float
    tokens: float

    @classmethod
    def measured(cls, cases: list[dict[str, Any]]) -> "Costs":
        """The costs in the largest case with Ray, or in the largest one."""
        case = max(cases, key=lambda case: (case["engine"].startswith("ray"), case["mb"]))
        mb = float(case["mb"])
        tokenizing = ("tokenize_words", "tokenize_with", "count_chunks")

        def seconds(kind: str, *jobs: str) -> float:
            return float(sum(case[kind].get(job, 0.0) for job in jobs)) / mb

        return cls(
            tokenize=seconds("job_seconds", *tokenizing),
            partition=seconds("job_seconds", "partition"),
            write=seconds("job_seconds", "write_shard"),
            read=seconds("input_seconds", *tokenizing),
            merge=seconds("result_seconds", *tokenizing),
            tokens=case["tokens"] / mb,
        )


@dataclass(frozen=True)
class Phase:
    """Jobs that may run at the same time.

    Attributes:
        jobs: how many.
        seconds: what each takes on an ordinary core.
        bytes: what each gets from other nodes.
        driver_seconds: what the driver needs to start each.
    """

    jobs: int
    seconds: float
    bytes: float
    driver_seconds: float


def phases_of(mb: float, shard_mb: float, driver_reads: bool, costs: Costs) -> tuple[list[Phase], dict[str, float]]:
    """Return the phases of preparing `mb` of text, and how many shards and handles there are."""
    batches = math.ceil(mb * MB / batch_bytes(int(mb * MB)))
    tokens = mb * costs.tokens
    blocks = max(1, round(tokens / BLOCK_TOKENS))
    shards = min(blocks, max(1, round(tokens * FILE_BYTES_PER_TOKEN["csv"] / (shard_mb * MB))))
    plan = plan_shuffle(batches, shards)
    jobs = math.ceil(batches / plan.batches_per_job)
    again = plan.groups * math.ceil(jobs / plan.groups) if plan.groups > 1 else 0
    token_bytes = BYTES_PER_TOKEN * tokens

    def phase(count: int, seconds_per_mb: float, total_bytes: float, driver: float = 0.0) -> Phase:
        return Phase(count, seconds_per_mb * mb / count, total_bytes / count, DRIVER_SECONDS_PER_JOB + driver / count)

    phases = [
        phase(batches, costs.tokenize, mb * MB, (costs.merge + costs.read * driver_reads) * mb),
        phase(jobs, costs.partition, token_bytes),
        *([phase(again, costs.partition, token_bytes)] if again else []),
        phase(shards, costs.write, token_bytes),
    ]
    handles = (
        2 * batches + jobs * plan.groups + again * shards / plan.groups**2 if again else 2 * batches + jobs * shards
    )
    return phases, {"shards": shards, "handles": handles}


def simulate(phases: list[Phase], cores: int, rng: np.random.Generator) -> tuple[float, float, int]:
    """Return the seconds until all phases are done, those in which the driver was busy, and how many nodes failed."""
    nodes = math.ceil(cores / CORES_OF_NODE)
    slowness = np.where(rng.random(nodes) < SLOW_NODES, SLOWNESS, 1.0)
    now = driver_busy = 0.0
    failures = 0
    earlier_core_seconds = 0.0  # of the jobs whose data lies on the nodes
    for phase in phases:
        transfer = phase.bytes / (NETWORK_BYTES / CORES_OF_NODE)
        free = [(now, core) for core in range(cores)]
        driver = now
        durations = (phase.seconds * rng.lognormal(0.0, SPREAD, phase.jobs) + transfer).tolist()
        end = now
        while durations:
            seconds = durations.pop()
            driver += phase.driver_seconds
            core_free, core = heapq.heappop(free)
            start = max(core_free, driver)
            finish = start + seconds * slowness[core // CORES_OF_NODE]
            if rng.random() < (finish - start) / (3600 * HOURS_BETWEEN_FAILURES) / CORES_OF_NODE:
                failures += 1
                # The jobs of its other cores run again, and what it had made of the earlier phases is made again.
                durations += [seconds] * min(CORES_OF_NODE, cores)
                finish += earlier_core_seconds / nodes / cores
            heapq.heappush(free, (finish, core))
            end = max(end, finish)
        driver_busy += phase.jobs * phase.driver_seconds
        earlier_core_seconds += phase.jobs * phase.seconds
        now = end
    return now, driver_busy, failures


def main() -> None:
    """Simulate each size on each number of cores, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/scale.json"), help="figures of scale.py")
    parser.add_argument("--gb", type=float, nargs="+", default=(100, 1_000, 10_000), help="sizes of the text")
    parser.add_argument("--cores", type=int, nargs="+", default=(10, 100, 1_000), help="cores of the cluster")
    parser.add_argument("--driver-reads", action="store_true", help="the text is in files that only the driver sees")
    parser.add_argument("--shard-mb", type=float, default=512, help="as for `babybert prepare`")
    options = parser.parse_args()
    costs = Costs.measured(json.loads(options.json.read_text()))
    print(costs)
    print("      GB  cores     hours  of ideal  driver busy  failed nodes   shards    handles  driver GB")
    for gb in options.gb:
        phases, counts = phases_of(1000 * gb, options.shard_mb, options.driver_reads, costs)
        ideal = sum(phase.jobs * phase.seconds for phase in phases)
        for cores in options.cores:
            seconds, driver_busy, failures = simulate(phases, cores, np.random.default_rng(0))
            print(
                f"{gb:>8,.0f} {cores:>6,} {seconds / 3600:>9.1f} {ideal / cores / seconds:>9.0%} "
                f"{driver_busy / seconds:>12.0%} {failures:>13,} {counts['shards']:>8,.0f} {counts['handles']:>10,.0f} "
                f"{counts['handles'] * DRIVER_BYTES_PER_HANDLE / 1e9:>10.1f}"
            )


if __name__ == "__main__":
    main()
