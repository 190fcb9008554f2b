"""Throughput and latency of the served model, compared with three peers behind the same server settings in one run.

    python benchmarks/serving.py --data data/imdb
    python benchmarks/serving.py --data data/imdb-wordpiece --preset small

It takes six minutes on two cores, and needs `pip install '.[bench]'` and wrk. The echo handler answers without a
model: it shows what the server alone can do. All servers run at the same time. `wrk` queries them in turn on loopback,
and medians over the rounds are compared. Client and servers share the cores. The model has the sizes of the reference,
or of another preset; its training makes no difference. Prints a table and writes JSON.
"""

import argparse
import contextlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from babybert.checkpoint.format import MODEL_FILES, find_checkpoint
from babybert.config import PRESETS, ServeConfig
from babybert.data.tokenizer import Tokenizer
from babybert.serving.archive import MODEL_NAME, copy_package, pack, write_archive
from babybert.serving.torchserve import TorchServe, free_ports

PEERS_FOLDER = Path(__file__).parent / "serving_peers"
CLIENTS = (1, 8, 64)
START_TRIALS = 3
TEXTS = (
    "the movie was [MASK] .",
    "i thought the acting in this film was really [MASK] , but the story was not .",
    "one of the worst [MASK] that i have ever seen .",
    "if you like this kind of thing , you will love it : the [MASK] is great and so is the music .",
)
SERVERS = {
    "ours": "babybert serve",
    "int8": "babybert serve --int8: the layers have int8 weights",
    "echo": "a handler that answers without a model",
    "hugging face": "fill-mask pipeline, BertForMaskedLM of the same sizes",
    "reference": "logits and softmax at every position, one text at a time",
}
MEASURES = ("requests_per_second", "p50_ms", "p99_ms")
Measures = dict[str, float]  # by name of MEASURES
Loads = dict[str, dict[int, Measures]]  # by server and number of clients


def main() -> None:
    """Write the archives, serve them, measure, and print."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path("data/imdb"), help="prepared IMDB, whose vocabulary is that of the reference"
    )
    parser.add_argument("--preset", choices=PRESETS, default="baby", help="sizes of the model")
    parser.add_argument("--seconds", type=int, default=4, help="of each load")
    parser.add_argument("--workers", type=int, default=1, help="of each server")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each server at each load")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for serving.json")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed; run: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        archives = make_archives(options.data, options.preset, Path(folder))
        start_seconds = first_answer_seconds(archives["ours"])
        servers = {
            name: stack.enter_context(make_server(archive, options.workers)) for name, archive in archives.items()
        }
        loads = measure(servers, options.rounds, options.seconds)
        memory = {name: worker_memory_mb(server) for name, server in servers.items()}
    print_report(loads, memory, start_seconds)
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"loads": loads, "worker_mb": memory, "first_answer_s": start_seconds}
    (options.out / "serving.json").write_text(json.dumps(report, indent=2) + "\n")


def make_archives(data: Path, preset: str, folder: Path) -> dict[str, Path]:
    """An archive for each server, with a model of the preset's sizes after one step of training."""
    flags = [f"--preset={preset}", "--max-steps=1", "--validation-pairs=64", "--no-metrics", "--device=cpu"]
    command = [sys.executable, "-m", "babybert.cli", "pretrain", f"--data={data}", f"--out={folder / 'run'}", *flags]
    subprocess.run(command, check=True)
    checkpoint = find_checkpoint(folder / "run")
    contents = {name: folder / name.replace(" ", "_") / "content" for name in ("echo", "hugging face", "reference")}
    for content in contents.values():
        content.mkdir(parents=True)
    (contents["echo"] / "empty").touch()  # the archiver refuses an empty folder
    save_hugging_face_model(preset, checkpoint / "tokenizer.json", contents["hugging face"])
    copy_package(contents["reference"])
    for name in MODEL_FILES:
        shutil.copyfile(checkpoint / name, contents["reference"] / name)
    archives = {
        "ours": write_archive(checkpoint, folder / "ours"),
        "int8": write_archive(checkpoint, folder / "int8", int8=True),
    }
    for name, content in contents.items():
        handler = PEERS_FOLDER / name.replace(" ", "_") / "babybert_handler.py"
        archives[name] = pack(content, handler, {"version": "1", "step": 1, "digest": ""}, content.parent)
    return archives


def save_hugging_face_model(preset: str, tokenizer_file: Path, content: Path) -> None:
    """Save an untrained masked language model of `transformers` with a preset's sizes and our tokenizer."""
    import transformers

    sizes = PRESETS[preset]
    config = transformers.BertConfig(
        vocab_size=Tokenizer.load(tokenizer_file).size,
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["feed_forward"],
    )
    model: Any = transformers.BertForMaskedLM(config)
    model.save_pretrained(content)
    special_tokens = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask", "unk")}
    tokenizer: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), **special_tokens)
    tokenizer.save_pretrained(content)


def make_server(archive: Path, workers: int) -> TorchServe:
    """A server for this archive on free ports."""
    inference, management, metrics = free_ports(3)
    config = ServeConfig(
        source=str(archive),
        workers=workers,
        inference_port=inference,
        management_port=management,
        metrics_port=metrics,
    )
    return TorchServe(config, archive)


def first_answer_seconds(archive: Path) -> float:
    """Seconds from the start of `babybert serve ARCHIVE` to its first answer, the median of START_TRIALS."""
    return statistics.median(time_first_answer(archive) for _ in range(START_TRIALS))


def time_first_answer(archive: Path) -> float:
    """Seconds from the start of `babybert serve ARCHIVE` to its first answer."""
    inference, management, metrics = free_ports(3)
    ports = [f"--inference-port={inference}", f"--management-port={management}", f"--metrics-port={metrics}"]
    command = [sys.executable, "-m", "babybert.cli", "serve", str(archive), *ports]
    request = urllib.request.Request(
        f"http://127.0.0.1:{inference}/predictions/{MODEL_NAME}",
        json.dumps({"text": TEXTS[0]}).encode(),
        {"Content-Type": "application/json"},
    )
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    assert "POST" in process.stderr.readline()  # the server is ready
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read()
    seconds = time.perf_counter() - start
    process.terminate()
    process.wait()
    return seconds


def measure(servers: dict[str, TorchServe], rounds: int, seconds: int) -> Loads:
    """Medians over the rounds of what `wrk` measures; each server is warmed up before."""
    for server in servers.values():
        run_wrk(server, clients=8, seconds=2)
    results: dict[tuple[str, int], list[Measures]] = {}
    for _ in range(rounds):
        for clients in CLIENTS:
            for name, server in servers.items():
                results.setdefault((name, clients), []).append(run_wrk(server, clients, seconds))
    return {name: {clients: medians(results[name, clients]) for clients in CLIENTS} for name in servers}


def medians(results: list[Measures]) -> Measures:
    """The median of each measure."""
    return {name: statistics.median(result[name] for result in results) for name in MEASURES}


def run_wrk(server: TorchServe, clients: int, seconds: int) -> Measures:
    """Send requests with `wrk`. Any response with a status other than 200 ends the benchmark."""
    bodies = ", ".join(f"[[{json.dumps({'text': text})}]]" for text in TEXTS)
    script = f"""
        local requests, next = {{}}, 0
        function init(args)
          for _, body in ipairs({{{bodies}}}) do
            requests[#requests + 1] = wrk.format("POST", nil, {{["Content-Type"] = "application/json"}}, body)
          end
        end
        function request() next = next % #requests + 1; return requests[next] end
        function done(summary, latency)
          local e = summary.errors
          local failed = e.connect + e.read + e.write + e.status + e.timeout
          print(string.format("measured %d %d %d %d %d", summary.requests, summary.duration,
            latency:percentile(50), latency:percentile(99), failed))
        end
    """
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        flags = ["-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "60s", "-s", file.name]
        done = subprocess.run(["wrk", *flags, server.predictions_url], capture_output=True, text=True, check=True)
    match = re.search(r"measured (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
    assert match, done.stdout + done.stderr
    requests, microseconds, p50, p99, failed = map(int, match.groups())
    assert failed == 0, done.stdout
    return {"requests_per_second": 1e6 * requests / microseconds, "p50_ms": p50 / 1000, "p99_ms": p99 / 1000}


def worker_memory_mb(server: TorchServe) -> float:
    """The peak memory of the largest worker."""
    workers = server.manage("GET", f"/models/{MODEL_NAME}")[0]["workers"]
    return max(peak_memory_mb(worker["pid"]) for worker in workers)


def peak_memory_mb(pid: int) -> float:
    """The peak resident memory of a process, from the kernel."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def print_report(loads: Loads, memory: dict[str, float], start_seconds: float) -> None:
    """A table for each number of clients, with the throughput of ours relative to each server."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    for clients in CLIENTS:
        table = Table(
            title=f"{clients} client{'s' if clients > 1 else ''}", title_justify="left", title_style="", box=None
        )
        table.add_column("server")
        for heading in ("requests/s", "p50 ms", "p99 ms", "ours / it"):
            table.add_column(heading, justify="right")
        table.add_column("what it is")
        our_rate = loads["ours"][clients]["requests_per_second"]
        for name, description in SERVERS.items():
            result = loads[name][clients]
            rate = result["requests_per_second"]
            cells = [f"{rate:,.1f}", f"{result['p50_ms']:,.1f}", f"{result['p99_ms']:,.1f}", f"{our_rate / rate:.2f} x"]
            table.add_row(name, *cells, description)
        console.print(table)
        console.print()
    console.print("peak memory of a worker: " + ", ".join(f"{name} {mb:,.0f} MB" for name, mb in memory.items()))
    console.print(f"from `babybert serve` of an archive to the first answer: {start_seconds:.1f} s")


if __name__ == "__main__":
    main()
