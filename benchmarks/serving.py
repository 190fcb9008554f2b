"""Requests/s and latency of the served model beside three peers with the same server settings, all in one run.

    python benchmarks/serving.py --data data/imdb       # five minutes on two cores; needs `pip install '.[bench]'` and wrk

The echo handler answers without looking, and is the server's own ceiling. All servers run at once, each asked in turn by
`wrk` on loopback, and medians of the rounds are compared; client and servers share the cores. The model has the reference's
sizes; how well it was trained does not matter. Prints a table and writes JSON.
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
from pathlib import Path
from typing import Any

from babybert.checkpoint.format import MODEL_FILES, find_checkpoint
from babybert.config import PRESETS, ServeConfig
from babybert.data.tokenizer import Tokenizer
from babybert.serving.archive import MODEL_NAME, pack, write_archive
from babybert.serving.torchserve import Server, free_ports

HERE = Path(__file__).parent
CLIENTS = (1, 8, 64)
TEXTS = (
    "the movie was [MASK] .",
    "i thought the acting in this film was really [MASK] , but the story was not .",
    "one of the worst [MASK] that i have ever seen .",
    "if you like this kind of thing , you will love it : the [MASK] is great and so is the music .",
)
WAYS = {
    "ours": "babybert serve",
    "echo": "a handler that answers without looking",
    "hugging face": "fill-mask pipeline, BertForMaskedLM of the same sizes",
    "reference": "logits and softmax at every position, one text at a time",
}


def main() -> None:
    """Pack, serve and ask all of them; print as they end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path("data/imdb"), help="prepared IMDB: the vocabulary of the reference's size"
    )
    parser.add_argument("--seconds", type=int, default=4, help="of each load")
    parser.add_argument("--workers", type=int, default=1, help="of each server")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server at each load")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for serving.json")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed; run: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        archives = make_archives(options.data, Path(folder))
        start = first_answer_seconds(archives["ours"])
        servers = {way: stack.enter_context(serve(archive, options.workers)) for way, archive in archives.items()}
        found = measure(servers, options)
        memory = {way: worker_mb(server) for way, server in servers.items()}
    show(found, memory, start)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "serving.json").write_text(
        json.dumps({"loads": found, "worker_mb": memory, "first_answer_s": start}, indent=2) + "\n"
    )


def make_archives(data: Path, folder: Path) -> dict[str, Path]:
    """An archive of each way, of a model of the reference's sizes that has taken one step."""
    command = [
        sys.executable,
        "-m",
        "babybert.cli",
        "pretrain",
        f"--data={data}",
        f"--out={folder / 'run'}",
        "--preset=baby",
        "--max-steps=1",
    ]
    subprocess.run([*command, "--validation-pairs=64", "--no-metrics", "--device=cpu"], check=True)
    checkpoint = find_checkpoint(folder / "run")
    for way in ("echo", "hugging_face", "reference"):
        (folder / way / "content").mkdir(parents=True)
    for name in MODEL_FILES:
        shutil.copyfile(checkpoint / name, folder / "reference" / "content" / name)
    package = Path(__file__).parent.parent / "babybert"
    shutil.copytree(
        package, folder / "reference" / "content" / "babybert", ignore=shutil.ignore_patterns("__pycache__")
    )
    save_hugging_face(
        Tokenizer.load(checkpoint / "tokenizer.json"),
        checkpoint / "tokenizer.json",
        folder / "hugging_face" / "content",
    )
    (folder / "echo" / "content" / "nothing").touch()
    archives = {"ours": write_archive(checkpoint, folder / "ours")}
    for way in ("echo", "hugging face", "reference"):
        name = way.replace(" ", "_")
        served = {"version": "1", "step": 1, "digest": ""}
        archives[way] = pack(
            folder / name / "content", HERE / "serving_peers" / name / "babybert_handler.py", served, folder / name
        )
    return archives


def save_hugging_face(tokenizer: Tokenizer, path: Path, content: Path) -> None:
    """A masked language model of `transformers` of the same sizes, untrained, with the same tokenizer."""
    import transformers

    own = PRESETS["baby"]
    sizes = {
        "hidden_size": own["width"],
        "num_hidden_layers": own["layers"],
        "num_attention_heads": own["heads"],
        "intermediate_size": own["feed_forward"],
    }
    config = transformers.BertConfig(vocab_size=tokenizer.size, **sizes)
    model: Any = transformers.BertForMaskedLM(config)
    model.save_pretrained(content)
    names = {
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "unk_token": "[UNK]",
    }
    wrapped: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **names)
    wrapped.save_pretrained(content)


def serve(archive: Path, workers: int) -> Server:
    """A server of this archive on ports of its own."""
    inference, management, metrics = free_ports(3)
    return Server(
        ServeConfig(
            source=str(archive),
            workers=workers,
            inference_port=inference,
            management_port=management,
            metrics_port=metrics,
        ),
        archive,
    )


def first_answer_seconds(archive: Path) -> float:
    """From `babybert serve` of a built archive to its first answer, the median of three."""
    taken = []
    for _ in range(3):
        ports = free_ports(3)
        flags = [
            f"--{name}-port={port}" for name, port in zip(("inference", "management", "metrics"), ports, strict=True)
        ]
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "babybert.cli", "serve", str(archive), *flags], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr
        assert "POST" in process.stderr.readline()
        asked = json.dumps({"text": TEXTS[0]})
        url = f"http://127.0.0.1:{ports[0]}/predictions/{MODEL_NAME}"
        subprocess.run(
            ["curl", "-sf", "-H", "Content-Type: application/json", "-d", asked, url],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        taken.append(time.perf_counter() - start)
        process.terminate()
        process.wait()
    return statistics.median(taken)


def measure(servers: dict[str, Server], options: argparse.Namespace) -> dict[str, dict[int, dict[str, float]]]:
    """Medians over the rounds of what `wrk` says, by way and number of clients; the first answers warm each server up."""
    loads: dict[str, dict[int, list[dict[str, float]]]] = {way: {clients: [] for clients in CLIENTS} for way in servers}
    for server in servers.values():
        ask(server, 8, 2)
    for _ in range(options.rounds):
        for clients in CLIENTS:
            for way, server in servers.items():
                loads[way][clients].append(ask(server, clients, options.seconds))
    names = ("requests_per_second", "p50_ms", "p99_ms")
    return {
        way: {
            clients: {name: statistics.median(run[name] for run in runs) for name in names}
            for clients, runs in own.items()
        }
        for way, own in loads.items()
    }


def ask(server: Server, clients: int, seconds: int) -> dict[str, float]:
    """One load. Anything but an answer of status 200 ends the benchmark."""
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
          print(string.format("found %d %d %d %d %d", summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
            e.connect + e.read + e.write + e.status + e.timeout))
        end
    """
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        command = [
            "wrk",
            "-t1",
            f"-c{clients}",
            f"-d{seconds}s",
            "--timeout",
            "60s",
            "-s",
            file.name,
            server.predictions_url,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    match = re.search(r"found (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
    assert match, done.stdout + done.stderr
    requests, microseconds, p50, p99, failed = map(int, match.groups())
    assert failed == 0, done.stdout
    return {"requests_per_second": 1e6 * requests / microseconds, "p50_ms": p50 / 1000, "p99_ms": p99 / 1000}


def worker_mb(server: Server) -> float:
    """The most memory that one of its workers has had."""
    workers = server.manage("GET", f"/models/{MODEL_NAME}")[0]["workers"]
    return max(
        int(Path(f"/proc/{worker['pid']}/status").read_text().split("VmHWM:")[1].split()[0]) / 1000
        for worker in workers
    )


def show(found: dict[str, dict[int, dict[str, float]]], memory: dict[str, float], start: float) -> None:
    """The table, and ours beside each."""
    for clients in CLIENTS:
        print(f"\n{clients} client{'s' if clients > 1 else ''}")
        ours = found["ours"][clients]["requests_per_second"]
        for way, text in WAYS.items():
            own = found[way][clients]
            rate = f"{own['requests_per_second']:>9,.1f} requests/s   p50 {own['p50_ms']:>8,.1f} ms   p99 {own['p99_ms']:>8,.1f} ms"
            print(f"  {way:<13}{rate}   ours has {ours / own['requests_per_second']:6.2f} x   {text}")
    print("\nmost memory of a worker: " + ", ".join(f"{way} {mb:,.0f} MB" for way, mb in memory.items()))
    print(f"from `babybert serve` of a built archive to the first answer: {start:.1f} s")


if __name__ == "__main__":
    main()
