"""The pipeline as a user runs it: prepare, pretrain, evaluate, archive, serve, and requests over HTTP.

Real processes and a real TorchServe on free ports. The corpus is the demo's, with a shorter training than the demo's.
"""

import json
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import babybert_output, start_babybert
from served import ServedModel, serve_flags, serving

TRAINING_SECONDS = 1000.0  # under a minute on two idle cores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the pipeline has run up to the archive."""
    folder = tmp_path_factory.mktemp("pipeline")
    assert "generated reviews" in babybert_output("prepare", "--demo-documents=1500", cwd=folder)
    babybert_output("pretrain", "--epochs=24", "--metrics-port=0", "--device=cpu", cwd=folder, seconds=TRAINING_SECONDS)
    babybert_output("archive", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServedModel]:
    yield from serving(folder)


def test_training_learned(folder: Path) -> None:
    scores = json.loads(babybert_output("evaluate", "--json", cwd=folder))
    assert scores["mlm_loss"] < scores["mlm_unigram_loss"] - 2
    assert scores["mlm_top1"] > 0.4 > scores["mlm_unigram_top1"] + 0.2


def test_candidates_make_sense_and_are_those_of_the_command_line(folder: Path, server: ServedModel) -> None:
    text = "The sheriff rides with a revolver near the [MASK]."
    answer = server.ask({"text": text, "top_k": 3})
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    (mask,) = answer.body["masks"]
    western = {"saloon", "desert", "canyon"}  # the places of the genre that the sheriff and the revolver belong to
    assert mask["candidates"][0]["token"] in western
    assert len(western & {c["token"] for c in mask["candidates"]}) >= 2
    assert mask["candidates"][0]["score"] > 0.1
    local = json.loads(babybert_output("fill-mask", text, "--top-k=3", "--json", cwd=folder))
    (local_mask,) = local["masks"]
    assert [c["token"] for c in local_mask["candidates"]] == [c["token"] for c in mask["candidates"]]
    scores = [c["score"] for c in mask["candidates"]]
    assert [c["score"] for c in local_mask["candidates"]] == pytest.approx(scores, rel=1e-3)


def test_next_sentence_is_that_of_the_command_line(folder: Path, server: ServedModel) -> None:
    pair = ("Mary is superb as the pilot.", "She launches near the planet with a laser.")
    reply = server.ask(dict(zip(("sentence_a", "sentence_b"), pair, strict=True)))
    assert reply.status == 200
    answer = reply.body
    assert set(answer) == {"is_next", "probability"}
    local = json.loads(babybert_output("next-sentence", *pair, "--json", cwd=folder))
    assert answer["probability"] == pytest.approx(local["probability"], rel=1e-3)
    assert answer["is_next"] == (answer["probability"] >= 0.5)


def test_valid_and_invalid_requests_in_one_batch_do_not_mix(server: ServedModel) -> None:
    bodies = [
        {"text": f"The {word} is [MASK]."} if i % 3 else {"text": "no mask"}
        for i, word in enumerate(["sheriff", "pilot", "film", "medic"] * 8)
    ]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(server.ask, bodies))
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status == (200 if "[MASK]" in body["text"] else 400)
        if answer.status == 200:
            start = body["text"][: body["text"].index("[")].lower()
            assert answer.body["masks"][0]["candidates"][0]["sequence"].startswith(start)


def test_ctrl_c_ends_java_too(folder: Path) -> None:
    """Java is a child process of the command: if it were still running, its port would answer."""
    ports, flags = serve_flags()
    child = start_babybert("serve", *flags, folder=folder)
    try:
        child.wait_for_line("POST")
        child.send_signal(signal.SIGINT)
        assert child.wait() == 0
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/ping", timeout=5)
    finally:
        child.kill()
