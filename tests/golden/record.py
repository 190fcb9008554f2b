"""Record what the program writes, computes and answers, so that a change that should alter nothing can be checked.

`python tests/golden/record.py OUT.json` runs the command line alone, in a temporary folder, and writes:

- `prepare`: SHA-256 of every file of several datasets (the demo; with BABYBERT_IMDB also 2,000 real reviews);
- `pretrain`: the losses of 50 steps of each preset and of the reference recipe, as the exact numbers;
- `evaluate`: what `evaluate --json` prints;
- `http`: status and body of twenty requests to a served model.

Losses are equal to the bit on one kind of processor and one torch only; `machine` says which. It takes about four minutes.
"""

import hashlib
import http.client
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 50
RUNS = {
    "baby": ["--preset", "baby"],
    "tiny": ["--preset", "tiny"],
    "mini": ["--preset", "mini"],
    "reference": ["--recipe", "reference"],
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
    """What the bits of a loss depend on beside the program: processor, torch, number of threads."""
    import torch

    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    keys = ("model name", "model", "stepping", "flags")
    facts = [match[1] for key in keys if (match := re.search(rf"^{key}\s*: (.*)$", cpu, re.MULTILINE))]
    digest = hashlib.sha256("\n".join([*facts, platform.machine()]).encode()).hexdigest()[:16]
    return {"processor": digest, "torch": torch.__version__, "threads": torch.get_num_threads()}


def run(*arguments: str) -> str:
    """Run one command; return what it printed."""
    done = subprocess.run([sys.executable, "-m", "babybert.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"babybert {' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, caches left out."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and ".cache" not in str(path.relative_to(folder))
    )
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def record_prepare(folder: Path, imdb: str | None, wordpiece: str | None) -> dict[str, Any]:
    """The digests of datasets. WordPiece is trained by a library whose ties differ, so its tokenizer is given."""
    kinds: dict[str, list[str]] = {
        "demo": [],
        "demo-parquet": ["--format", "parquet"],
        "demo-5-copies": ["--duplicates", "5", "--demo-documents", "50"],
    }
    if imdb:
        (folder / "aclImdb.tar.gz").symlink_to(imdb)
        for form in ("csv", "parquet"):
            source = ["--corpus", "imdb", "--source", "aclImdb.tar.gz", "--limit", "2000", "--format", form]
            kinds[f"imdb-{form}"] = source
            if wordpiece:
                kinds[f"imdb-wordpiece-{form}"] = [*source, "--tokenizer", wordpiece]
    for name, flags in kinds.items():
        run("prepare", "--out", name, *flags)
    return {name: digests(folder / name) for name in kinds}


def record_pretrain(folder: Path) -> dict[str, Any]:
    """The losses of each step, from `metrics.jsonl`."""
    found = {}
    for name, flags in RUNS.items():
        run(
            "pretrain",
            "--data",
            "demo",
            "--out",
            f"runs/{name}",
            "--max-steps",
            str(STEPS),
            "--log-every",
            "1",
            "--no-metrics",
            "--device",
            "cpu",
            *flags,
        )
        lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = [
            [line["mlm_loss"], line["nsp_loss"], line.get("gradient_norm")]
            for line in lines
            if line["split"] in ("train", "validation")
        ]
    return found


def record_http(folder: Path) -> list[Any]:
    """Status and body of each request; the ports are free ones."""
    run("archive", "--source", "runs/tiny", "--out", "model-store")
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    flags = [f"--{name}-port={port}" for name, port in zip(("inference", "management", "metrics"), ports, strict=True)]
    command = [sys.executable, "-m", "babybert.cli", "serve", "model-store/babybert.mar", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        if not any("POST" in line for line in process.stderr):
            raise RuntimeError("the server did not start")
        answers = []
        for body, headers in REQUESTS:
            connection = http.client.HTTPConnection("127.0.0.1", ports[0], timeout=60)
            connection.request(
                "POST", "/predictions/babybert", body if isinstance(body, bytes) else json.dumps(body), headers
            )
            answer = connection.getresponse()
            answers.append([answer.status, json.loads(answer.read())])
            connection.close()
        return answers
    finally:
        process.terminate()
        process.stderr.read()
        process.wait(60)


def record(imdb: str | None = None, wordpiece: str | None = None) -> dict[str, Any]:
    """All of it, in a temporary folder."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            folder = Path(name)
            return {
                "machine": machine(),
                "prepare": record_prepare(folder, imdb, wordpiece),
                "pretrain": record_pretrain(folder),
                "evaluate": json.loads(run("evaluate", "--checkpoint", "runs/tiny", "--data", "demo", "--json")),
                "http": record_http(folder),
            }
        finally:
            os.chdir(here)


if __name__ == "__main__":
    found = record(os.environ.get("BABYBERT_IMDB"), os.environ.get("BABYBERT_WORDPIECE"))
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
