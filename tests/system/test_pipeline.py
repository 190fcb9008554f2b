"""The whole line as a user runs it: prepare, pretrain, evaluate, archive, serve, ask over HTTP, read both metrics.

Real processes, a real TorchServe on free ports. The corpus is the demo's, the training shorter than the demo's.
"""

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import babybert, serving

from babybert.serving.torchserve import free_ports


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
    yield from serving(folder)


def test_training_learned(folder):
    scores = json.loads(babybert(folder, "evaluate", "--json"))
    assert scores["mlm_loss"] < scores["mlm_unigram_loss"] - 2
    assert scores["mlm_top1"] > 0.4 > scores["mlm_unigram_top1"] + 0.2


def test_fill_ins_make_sense_and_are_the_command_lines(folder, server):
    question = {"text": "The sheriff rides with a revolver near the [MASK].", "top_k": 3}
    answer = server.ask(question)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    (mask,) = answer.body["masks"]
    western = {
        "saloon",
        "desert",
        "canyon",
    }  # the places of the genre that the sheriff, the horse and the revolver are of
    assert mask["candidates"][0]["token"] in western
    assert len(western & {c["token"] for c in mask["candidates"]}) >= 2
    assert mask["candidates"][0]["score"] > 0.1
    local = json.loads(babybert(folder, "fill-mask", question["text"], "--top-k", "3", "--json"))
    assert [c["token"] for c in local["masks"][0]["candidates"]] == [c["token"] for c in mask["candidates"]]
    assert [c["score"] for c in local["masks"][0]["candidates"]] == pytest.approx(
        [c["score"] for c in mask["candidates"]], rel=1e-3
    )


def test_next_sentence_is_the_command_lines(folder, server):
    pair = ("Mary is superb as the pilot.", "She launches near the planet with a laser.")
    reply = server.ask(dict(zip(("sentence_a", "sentence_b"), pair, strict=True)))
    assert reply.status == 200
    answer = reply.body
    assert set(answer) == {"is_next", "probability"}
    local = json.loads(babybert(folder, "next-sentence", *pair, "--json"))
    assert answer["probability"] == pytest.approx(local["probability"], rel=1e-3)
    assert answer["is_next"] == (answer["probability"] >= 0.5)


def test_good_and_bad_requests_in_one_batch_do_not_mix(server):
    bodies = [
        {"text": f"The {word} is [MASK]."} if i % 3 else {"text": "no mask"}
        for i, word in enumerate(["sheriff", "pilot", "film", "medic"] * 8)
    ]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(server.ask, bodies))
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status == (200 if "[MASK]" in body["text"] else 400)
        if answer.status == 200:
            assert answer.body["masks"][0]["candidates"][0]["sequence"].startswith(
                body["text"][: body["text"].index("[")].lower()
            )


def test_ctrl_c_ends_java_too(folder):
    """Java is a child of ours: if it outlived us, its port would still answer."""
    ports = free_ports(3)
    flags = [f"--{name}-port={port}" for name, port in zip(("inference", "management", "metrics"), ports, strict=True)]
    process = subprocess.Popen(
        [sys.executable, "-m", "babybert.cli", "serve", *flags], cwd=folder, stderr=subprocess.PIPE, text=True
    )
    assert re.search("POST", process.stderr.readline())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/ping", timeout=5)
