"""The whole line as a user runs it: prepare, pretrain, evaluate, archive, serve, ask over HTTP, read both metrics.

Real processes, a real TorchServe on free ports. The corpus is the demo's, the training shorter than the demo's.
"""

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from babybert.inference.server import free_ports

JSON = {"Content-Type": "application/json"}


def babybert(folder: Path, *arguments: str) -> str:
    """Run one command in `folder` and return what it printed."""
    done = subprocess.run([sys.executable, "-m", "babybert.cli", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the line has been run up to the archive."""
    folder = tmp_path_factory.mktemp("line")
    assert "generated reviews" in babybert(folder, "prepare", "--demo-documents", "1500")
    babybert(folder, "pretrain", "--epochs", "24", "--metrics-port", "0", "--device", "cpu")
    babybert(folder, "archive")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """`babybert serve` on free ports: its process and its ports."""
    ports = free_ports(3)
    flags = [f"--{name}-port={port}" for name, port in zip(("inference", "management", "metrics"), ports, strict=True)]
    process = subprocess.Popen([sys.executable, "-m", "babybert.cli", "serve", *flags], cwd=folder, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    assert "POST" in line, line + process.stderr.read()
    threading.Thread(target=process.stderr.read, daemon=True).start()
    yield process, ports
    process.terminate()
    assert process.wait(60) == 0


def post(server, body, headers=JSON, method="POST"):
    """Status, content type and JSON answer of one request; `body` is sent as JSON unless it is bytes."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server[1][0]}/predictions/babybert", data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers["content-type"], json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.headers["content-type"], json.load(error)


def metrics(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server[1][2]}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(s.name, s.labels.get("task"), s.labels.get("outcome")): s.value for family in families for s in family.samples}


def test_training_learned(folder):
    scores = json.loads(babybert(folder, "evaluate", "--json"))
    assert scores["mlm_loss"] < scores["mlm_unigram_loss"] - 2
    assert scores["mlm_top1"] > 0.4 > scores["mlm_unigram_top1"] + 0.2


def test_fill_ins_make_sense_and_are_the_command_lines(folder, server):
    question = {"text": "The sheriff rides with a revolver near the [MASK].", "top_k": 3}
    status, content_type, answer = post(server, question)
    assert (status, content_type) == (200, "application/json")
    (mask,) = answer["masks"]
    western = {"saloon", "desert", "canyon"}  # the places of the genre that the sheriff, the horse and the revolver are of
    assert mask["candidates"][0]["token"] in western
    assert len(western & {c["token"] for c in mask["candidates"]}) >= 2
    assert mask["candidates"][0]["score"] > 0.1
    local = json.loads(babybert(folder, "fill-mask", question["text"], "--top-k", "3", "--json"))
    assert [c["token"] for c in local["masks"][0]["candidates"]] == [c["token"] for c in mask["candidates"]]
    assert [c["score"] for c in local["masks"][0]["candidates"]] == pytest.approx([c["score"] for c in mask["candidates"]], rel=1e-3)


def test_next_sentence_is_the_command_lines(folder, server):
    pair = ("Mary is superb as the pilot.", "She launches near the planet with a laser.")
    status, _, answer = post(server, dict(zip(("sentence_a", "sentence_b"), pair, strict=True)))
    assert status == 200
    assert set(answer) == {"is_next", "probability"}
    local = json.loads(babybert(folder, "next-sentence", *pair, "--json"))
    assert answer["probability"] == pytest.approx(local["probability"], rel=1e-3)
    assert answer["is_next"] == (answer["probability"] >= 0.5)


@pytest.mark.parametrize(
    ("body", "headers", "method", "message"),
    [
        ({"text": "no mask here"}, JSON, "POST", "no [MASK]"),
        ({"question": "?"}, JSON, "POST", "neither 'text'"),
        (b"{not json", JSON, "POST", "not JSON"),
        (b"\xff\xfe", JSON, "POST", "not JSON"),
        (b"[" * 100_000, JSON, "POST", "not JSON"),
        (b'["a"]', JSON, "POST", "must be a JSON object"),
        (b"", JSON, "POST", "JSON"),
        (None, {}, "GET", "JSON"),
        (b"text=%5BMASK%5D", {"Content-Type": "application/x-www-form-urlencoded"}, "POST", "JSON"),
        ({"text": "long " * 600 + "[MASK]"}, JSON, "POST", "at most 512"),
    ],
)
def test_a_bad_request_is_a_400_that_says_why(server, body, headers, method, message):
    status, content_type, answer = post(server, body, headers, method)
    assert (status, content_type, list(answer)) == (400, "application/json", ["error"])
    assert message in answer["error"]


def test_good_and_bad_requests_in_one_batch_do_not_mix(server):
    bodies = [{"text": f"The {word} is [MASK]."} if i % 3 else {"text": "no mask"} for i, word in enumerate(["sheriff", "pilot", "film", "medic"] * 8)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: post(server, body), bodies))
    for body, (status, _, answer) in zip(bodies, answers, strict=True):
        assert status == (200 if "[MASK]" in body["text"] else 400)
        if status == 200:
            assert answer["masks"][0]["candidates"][0]["sequence"].startswith(body["text"][: body["text"].index("[")].lower())


def test_metrics_count_what_was_asked(server):
    before = metrics(server)
    for body in ({"text": "[MASK]"}, {"text": "[MASK]"}, {"sentence_a": "a", "sentence_b": "b"}, {"x": 1}):
        post(server, body)
    expected = {("fill-mask", "ok"): 2, ("next-sentence", "ok"): 1, ("unknown", "bad_request"): 1}

    def moved():
        after = metrics(server)
        return {key: after.get(("babybert_inference_requests_total", *key), 0) - before.get(("babybert_inference_requests_total", *key), 0) for key in expected}

    for _ in range(50):  # metrics travel by the worker's output, a moment behind the answers
        if moved() == expected:
            break
        threading.Event().wait(0.1)
    assert moved() == expected
    assert metrics(server)["babybert_inference_batch_seconds_count", None, None] > 0


def test_ctrl_c_ends_java_too(folder):
    """Java is a child of ours: if it outlived us, its port would still answer."""
    ports = free_ports(3)
    flags = [f"--{name}-port={port}" for name, port in zip(("inference", "management", "metrics"), ports, strict=True)]
    process = subprocess.Popen([sys.executable, "-m", "babybert.cli", "serve", *flags], cwd=folder, stderr=subprocess.PIPE, text=True)
    assert re.search("POST", process.stderr.readline())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/ping", timeout=5)
