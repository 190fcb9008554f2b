"""Record what the command line writes, computes and answers, to check changes that must not alter results.

`make goldens` writes tests/golden/goldens.json, which tests/test_goldens.py compares with the present code. Every value
comes from babybert commands run in a temporary folder:

- `prepare`: SHA-256 of each file of several data sets: generated reviews and, if BABYBERT_IMDB names the archive,
  also 2,000 real ones. `datasets` holds the parsed dataset.json of each, which names library versions.
- `pretrain`: the losses of 50 steps of each preset and of the reference recipe, as exact numbers; and of 12 steps of
  a network like `small`, in fp32 and bf16, and of `tiny` on data of `prepare --segments runs`.
- `evaluate`: the output of `evaluate --json`.
- `http`: status and body of twenty requests to a served model.

Losses are equal to the bit only on one kind of processor, with one version of torch and one number of threads:
`machine` identifies them. Recording takes about five minutes.
"""

import hashlib
import http.client
import importlib.metadata
import json
import os
import platform
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # this file also runs as a script
from processes import run_babybert, start_babybert

from babybert.serving.torchserve import free_ports

GOLDENS = Path(__file__).parent / "goldens.json"
STEPS, FEW_STEPS = 50, 12
DATASETS: dict[str, list[str]] = {
    "demo": [],
    "demo-parquet": ["--format", "parquet"],
    "demo-runs": ["--segments", "runs", "--demo-documents", "200"],
    "demo-5-copies": ["--duplicates", "5", "--demo-documents", "50"],
}
IMDB = ["--corpus", "imdb", "--source", "aclImdb.tar.gz", "--limit", "2000"]
IMDB_DATASETS: dict[str, list[str]] = {
    "imdb-csv": [*IMDB, "--format", "csv"],
    "imdb-parquet": [*IMDB, "--format", "parquet"],
}
RUNS: dict[str, list[str]] = {
    "baby": ["--preset", "baby"],
    "tiny": ["--preset", "tiny"],
    "mini": ["--preset", "mini", "--precision", "fp32"],
    "reference": ["--recipe", "reference"],
}
# With AdamW: Muon's rounding depends on whether the processor has bf16.
SMALL = ["--preset", "small", "--width", "128", "--layers", "2", "--feed-forward", "256"]
SMALL += ["--optimizer", "adamw", "--lr", "1e-3", "--batch-size", "64", "--masked-share", "0.15"]
# Runs of FEW_STEPS. `small-bf16` is compared where the processor has fast bf16.
SHORT_RUNS: dict[str, list[str]] = {
    "small": [*SMALL, "--precision", "fp32"],
    "small-bf16": [*SMALL, "--precision", "bf16"],
    "segments-runs": ["--preset", "tiny", "--data", "demo-runs"],
}
JSON = {"Content-Type": "application/json"}
PAIR = {"sentence_a": "Mary is superb as the pilot.", "sentence_b": "She launches near the planet."}
REQUESTS: list[tuple[Any, dict[str, str]]] = [
    ({"text": "The sheriff rides near the [MASK]."}, JSON),
    ({"text": "The sheriff rides near the [MASK].", "top_k": 2}, JSON),
    ({"text": "Mary is [MASK] in the [MASK].", "top_k": 3}, JSON),
    ({"text": ["The film is [MASK].", "The pilot launches [MASK]."], "top_k": 2}, JSON),
    ({"text": "The film is [MASK].", "targets": ["superb", "dull"]}, JSON),
    ({"text": "The [MASK] " + "is good " * 300, "truncate": True, "top_k": 1}, JSON),
    ({"inputs": "The film is [MASK].", "parameters": {"top_k": 2}}, JSON),
    ({"inputs": ["The [MASK].", "Mary [MASK] [MASK]."]}, JSON),
    (PAIR, JSON),
    ({"pairs": [PAIR, {"sentence_a": "A film.", "sentence_b": "It is dull."}]}, JSON),
    ({"text": "no mask here"}, JSON),
    ({"text": "[MASK]", "targets": ["pilot", "xyzzy"]}, JSON),
    ({"question": "?"}, JSON),
    ({"text": "long " * 600 + "[MASK]"}, JSON),
    ({"text": "[MASK]", "top_k": 0}, JSON),
    ({"text": "[MASK]", "top_k": "3"}, JSON),
    (b"{not json", JSON),
    (b"", JSON),
    (b'{"text": "[MASK]"}', {"Content-Type": "text/plain"}),
    ({"pairs": []}, JSON),
]


def machine() -> dict[str, Any]:
    """What the bits of a loss depend on apart from the code: processor, torch, number of threads."""
    cpuinfo_path = Path("/proc/cpuinfo")
    cpuinfo = cpuinfo_path.read_text() if cpuinfo_path.exists() else ""
    facts = []
    for key in ("model name", "model", "stepping", "flags"):
        if match := re.search(rf"^{key}\s*: (.*)$", cpuinfo, re.MULTILINE):
            facts.append(match[1])
    facts.append(platform.machine())
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    return {"processor": digest, "torch": torch.__version__, "threads": torch.get_num_threads()}


def pyarrow_version() -> str:
    """The bytes of a Parquet file depend on it: the file names its writer."""
    return importlib.metadata.version("pyarrow")


def numba_cache(folder: Path) -> dict[str, str]:
    """Variables that give the commands in a folder their own cache of compiled kernels.

    A process that compiles a kernel computes other low bits than one that loads it from the cache, so the state of the
    cache must be the same in each recording.
    """
    return {"NUMBA_CACHE_DIR": str(folder / "numba")}


def run(folder: Path, *arguments: str) -> str:
    """Run one command in a folder and return its output. Raises RuntimeError if it fails."""
    done = run_babybert(*arguments, cwd=folder, environment=numba_cache(folder), seconds=500)
    if done.returncode:
        raise RuntimeError(f"babybert {' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, by relative path. Caches are left out."""
    result = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and ".cache" not in name:
            result[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return result


def prepare(folder: Path, name: str) -> Path:
    """Prepare one of the data sets in `folder`; those of IMDb read `aclImdb.tar.gz` there."""
    run(folder, "prepare", "--out", name, *{**DATASETS, **IMDB_DATASETS}[name])
    return folder / name


def pretrain(folder: Path, name: str) -> list[list[float | None]]:
    """MLM loss, NSP loss and gradient norm of each line of metrics.jsonl, after one of RUNS or SHORT_RUNS.

    The data is `folder/demo` unless the run names another.
    """
    steps, flags = (STEPS, RUNS[name]) if name in RUNS else (FEW_STEPS, SHORT_RUNS[name])
    data = [] if "--data" in flags else ["--data", "demo"]
    command = ["pretrain", *data, "--log-every", "1", "--no-metrics", "--device", "cpu", *flags]
    run(folder, *command, "--out", f"warm-up/{name}", "--max-steps", "1")  # compiles the kernels, see numba_cache
    run(folder, *command, "--out", f"runs/{name}", "--max-steps", str(steps))
    losses = []
    for text in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["split"] in ("train", "validation"):
            losses.append([line["mlm_loss"], line["nsp_loss"], line.get("gradient_norm")])
    return losses


def evaluate(folder: Path) -> dict[str, Any]:
    """The scores of the run `tiny`."""
    output = run(folder, "evaluate", "--checkpoint", "runs/tiny", "--data", "demo", "--json")
    scores: dict[str, Any] = json.loads(output)
    return scores


def post(port: int, body: Any, headers: dict[str, str]) -> tuple[int, Any]:
    """Send one request; `body` is sent as JSON unless it is bytes. Returns status and parsed answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body)
    try:
        connection.request("POST", "/predictions/babybert", content, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def answers(folder: Path) -> list[list[Any]]:
    """Serve the run `tiny` and send REQUESTS. Returns status and body of each answer."""
    run(folder, "archive", "--source", "runs/tiny", "--out", "model-store")
    ports = free_ports(3)
    flags = [f"--{name}-port={port}" for name, port in zip(("inference", "management", "metrics"), ports, strict=True)]
    server = start_babybert("serve", "model-store/babybert.mar", *flags, folder=folder, environment=numba_cache(folder))
    try:
        server.wait_for_line("POST")
        return [list(post(ports[0], body, headers)) for body, headers in REQUESTS]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def record(imdb: str | None) -> dict[str, Any]:
    """Everything, in a temporary folder. `imdb` names the public archive, or is None."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = list(DATASETS)
        if imdb:
            (folder / "aclImdb.tar.gz").symlink_to(Path(imdb).resolve())
            names += IMDB_DATASETS
        datasets = {name: prepare(folder, name) for name in names}
        return {
            "machine": machine(),
            "pyarrow": pyarrow_version(),
            "prepare": {name: digests(path) for name, path in datasets.items()},
            "datasets": {name: json.loads((path / "dataset.json").read_text()) for name, path in datasets.items()},
            "pretrain": {name: pretrain(folder, name) for name in [*RUNS, *SHORT_RUNS]},
            "evaluate": evaluate(folder),
            "http": answers(folder),
        }


def main() -> None:
    """Write goldens.json, or the file that the first argument names."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDENS
    goldens = record(os.environ.get("BABYBERT_IMDB"))
    out.write_text(json.dumps(goldens, indent=1) + "\n", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
