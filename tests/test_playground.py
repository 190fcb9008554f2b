"""What is behind the page: endpoints and what they say when they fail, a text's inside, a run's history, the server."""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from conftest import tokenizer_of
from faulty_proxy import FaultyProxy

from babybert.checkpoint.format import checkpoint_step, list_checkpoints
from babybert.checkpoint.storage import S3Store
from babybert.cli import main
from babybert.config import ModelConfig, PlaygroundConfig
from babybert.errors import DataError, UsageError
from babybert.evaluation.look import attention_weights
from babybert.model.bert import BabyBert
from babybert.playground import models
from babybert.playground.app import LOOPBACK, PAGE, open_model
from babybert.playground.history import Run, spread
from babybert.playground.inside import MOST_POSITIONS, look_inside, near
from babybert.playground.models import Answer, Endpoint, EndpointDown, Local
from babybert.serving.predictor import Predictor
from babybert.serving.torchserve import free_ports
from babybert.training.train import pretrain


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    tokenizer = tokenizer_of("mary rides near the desert . she fights two zombies !")
    return Predictor(
        BabyBert(ModelConfig(vocab_size=tokenizer.size, width=8, heads=2, layers=2, feed_forward=16)), tokenizer
    )


def body(**keys):
    return json.dumps(keys).encode()


def canned(status, content, version=None):
    """An HTTP server that gives everybody the same answer, and its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            if version:
                self.send_header("X-BabyBERT-Version", version)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize(
    ("status", "content", "answer", "problem"),
    [
        (200, b'{"masks": []}', Answer(200, {"masks": []}, "7-abc"), None),
        (400, b'{"error": "no"}', Answer(400, {"error": "no"}, "7-abc"), None),
        (
            503,
            b'{"code": 503, "type": "T", "message": "queue full"}',
            Answer(503, {"code": 503, "type": "T", "message": "queue full"}, "7-abc"),
            "queue full",
        ),
        (413, b"", Answer(413, {"error": "Request Entity Too Large (the endpoint sent no JSON)"}), None),
        (200, b"<html>", Answer(502, {"error": "OK (the endpoint sent no JSON)"}), "sent no JSON"),
    ],
)
def test_an_endpoint_is_taken_at_its_word(status, content, answer, problem):
    server, url = canned(status, content, "7-abc")
    try:
        endpoint = Endpoint(url)
        assert endpoint.answer(body(text="[MASK]")) == answer
        assert problem in endpoint.problem() if problem else endpoint.problem() is None
    finally:
        server.shutdown()
        server.server_close()


def test_an_endpoint_that_is_down_is_told_apart(monkeypatch):
    (port,) = free_ports(1)
    endpoint = Endpoint(f"http://127.0.0.1:{port}/")
    assert endpoint.url == f"http://127.0.0.1:{port}/predictions/babybert"
    with pytest.raises(
        EndpointDown, match=rf"127\.0\.0\.1:{port}/predictions/babybert does not answer: connection refused"
    ):
        endpoint.answer(body(text="[MASK]"))
    with pytest.raises(EndpointDown, match="no such host"):
        Endpoint("http://nobody.invalid/own/path").answer(b"")
    proxy = FaultyProxy(("127.0.0.1", port))
    try:
        proxy.mode = "hang"
        monkeypatch.setattr(models, "PROBE_SECONDS", 0.3)
        assert "nothing came within 0.3 s" in Endpoint(proxy.url).problem()
        proxy.mode = "refuse"
        assert "does not answer" in Endpoint(proxy.url).problem()
    finally:
        proxy.close()


def test_a_checkpoint_answers_as_the_api_does(predictor):
    local = Local(predictor)
    assert local.answer(body(text="mary [MASK] .", top_k=2)) == Answer(
        200, predictor.fill_mask(["mary [MASK] ."], 2)[0]
    )
    assert local.answer(body(pairs=[{"sentence_a": "mary", "sentence_b": "she"}])) == Answer(
        200, predictor.next_sentence([("mary", "she")])
    )
    assert local.answer(body(text="[MASK]", top_k=500)) == Answer(
        400, {"error": "'top_k' is 500; it must be a whole number from 1 to 100"}
    )
    assert local.answer(body(text="[MASK]"), "text/plain").status == 415
    damaged = Predictor(BabyBert(predictor.model.config), predictor.tokenizer)
    torch.nn.init.constant_(damaged.model.mlm_decoder.bias, float("nan"))
    assert Local(damaged).answer(body(text="[MASK]")).status == 500


def test_a_text_as_the_model_reads_it(predictor):
    found = look_inside(predictor, "Mary RIDES a tank.", "She fights!", 1, 0)
    assert [token["token"] for token in found["tokens"]] == [
        "[CLS]",
        "mary",
        "rides",
        "[UNK]",
        "[UNK]",
        ".",
        "[SEP]",
        "she",
        "fights",
        "!",
        "[SEP]",
    ]
    assert [token["source"] for token in found["tokens"]] == [
        "",
        "Mary",
        "RIDES",
        "a",
        "tank",
        ".",
        "",
        "She",
        "fights",
        "!",
        "",
    ]
    assert [token["segment"] for token in found["tokens"]] == [1] * 7 + [2] * 4
    assert [token["unknown"] for token in found["tokens"]] == [i in (3, 4) for i in range(11)]
    ids = torch.tensor([[token["id"] for token in found["tokens"]]])
    weights = attention_weights(predictor.model, ids, torch.tensor([[token["segment"] for token in found["tokens"]]]))
    torch.testing.assert_close(torch.tensor(found["attention"]), weights[1, 0, 0], atol=1e-4, rtol=0)
    alone = look_inside(predictor, "Mary [MASK] .", " ", 0, 1)
    assert [token["token"] for token in alone["tokens"]] == ["[CLS]", "mary", "[MASK]", ".", "[SEP]"]


def test_an_inside_that_cannot_be_shown_says_why(predictor):
    long = look_inside(predictor, "mary " * (MOST_POSITIONS - 1), "", 0, 0)
    assert long["attention"] is None
    assert f"{MOST_POSITIONS + 1} tokens" in long["reason"]
    for arguments, line in (
        (("mary", "", 2, 0), "'layer' is 2; it must be a whole number from 0 to 1"),
        (("mary", "", 0, True), "'head' is true"),
        ((" ", "", 0, 0), "empty"),
        ((7, "", 0, 0), "must be a string"),
        (("mary " * 600, "", 0, 0), "602 tokens"),
    ):
        with pytest.raises(UsageError, match=line):
            look_inside(predictor, *arguments)
    assert near(predictor, "Mary")["neighbours"]
    assert near(predictor, "tank") == {"word": "tank", "known": False, "neighbours": []}


def test_checkpoints_are_chosen_from_early_to_late():
    assert spread([3, 5], 5) == [3, 5]
    assert spread(list(range(1, 101)), 5) == [1, 26, 51, 75, 100]


@pytest.fixture
def run(small):
    """Seven checkpoints, all kept."""
    return pretrain(small(epochs=1, max_steps=35, checkpoint_every="5", keep_checkpoints=100)).checkpoint.parent


@pytest.mark.slow
def test_a_run_tells_how_it_learned_here_and_in_s3(run, s3, small):
    pretrain(small(epochs=1, max_steps=35, store=f"s3://{s3.bucket}/run", keep_checkpoints=100))
    store = S3Store(f"s3://{s3.bucket}/run")
    for folder in list_checkpoints(run):
        store.upload(folder)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    here, there = Run(str(run)), Run(f"s3://{s3.bucket}/run/")
    assert here.steps() == there.steps() == sorted(map(checkpoint_step, list_checkpoints(run)))
    curves = here.curves()["curves"]
    for loss, baselines in (("mlm_loss", ["mlm_unigram_loss", "mlm_chance_loss"]), ("nsp_loss", ["nsp_chance_loss"])):
        last = [line for line in lines if line["split"] == "validation"][-1]
        assert curves[loss]["held_out"][-1] == [last["step"], last[loss]]
        assert curves[loss]["train"] == [[line["step"], line[loss]] for line in lines if line["split"] == "train"]
        assert [line["value"] for line in curves[loss]["baselines"]] == [last[key] for key in baselines]
    assert there.curves()["curves"]["mlm_loss"]["baselines"] == curves["mlm_loss"]["baselines"]
    shown = open_model(PlaygroundConfig(checkpoint=there.address))
    assert shown.model.answer(body(text="[MASK]")).status == 200
    assert shown.run.address == there.address
    assert open_model(PlaygroundConfig(checkpoint=f"{there.address}/step-00000005")).run is None
    question = body(text="Mary is [MASK] .", top_k=2)
    answer = here.answer(question, "application/json")
    assert answer.body == there.answer(question, "application/json").body
    assert [entry["step"] for entry in answer.body["checkpoints"]] == spread(here.steps(), 5)
    for entry in answer.body["checkpoints"]:
        own = Predictor.load(run / f"step-{entry['step']:08d}").fill_mask(["Mary is [MASK] ."], 2)[0]
        assert {"step": entry["step"], **own} == entry


def test_a_damaged_checkpoint_is_passed_over_and_told(run):
    first = min(list_checkpoints(run))
    (first / "model.safetensors").write_bytes(b"")
    history = Run(str(run))
    answer = history.answer(body(text="Mary is [MASK] ."), "application/json").body
    assert [entry["step"] for entry in answer["checkpoints"]] == spread(history.steps(), 5)[1:]
    assert len(answer["passed_over"]) == 1
    assert str(first) in answer["passed_over"][0]
    assert history.answer(body(text="Mary is [MASK] .", targets=["xyzzy"]), "application/json").status == 400
    for folder in list_checkpoints(run):
        shutil.rmtree(folder)
    assert history.steps() == []
    with pytest.raises(DataError, match="no checkpoint there yet"):
        history.answer(body(text="[MASK]"), "application/json")


def test_what_is_no_run_is_refused(tmp_path, s3):
    with pytest.raises(DataError, match="no such folder"):
        Run(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        Run(str(tmp_path)).curves()
    with pytest.raises(DataError, match=r"has no metrics\.jsonl yet"):
        Run(f"s3://{s3.bucket}/none").curves()
    with pytest.raises(UsageError, match="one 'text'"):
        Run(str(tmp_path)).answer(body(sentence_a="a", sentence_b="b"), "application/json")


def test_settings_that_cannot_work_are_refused(capsys, tmp_path):
    for settings in ({}, {"endpoint": "http://h", "checkpoint": "c"}):
        with pytest.raises(UsageError, match="one of --endpoint URL and --checkpoint PATH"):
            PlaygroundConfig(**settings)
    with pytest.raises(UsageError, match="endpoint is 'localhost:8080'"):
        PlaygroundConfig(endpoint="localhost:8080")
    assert main(["playground", "--checkpoint", str(tmp_path)]) == 3
    assert "no whole checkpoint" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["playground", "--endpoint=http://127.0.0.1:1", f"--port={taken.getsockname()[1]}"]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_the_command_serves_its_page_until_it_is_told_to_end():
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "babybert.cli", "playground", f"--endpoint=http://127.0.0.1:{port}", "--port=0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+/", process.stderr.readline())[0]
        with urllib.request.urlopen(url) as page:
            assert page.headers["Content-Security-Policy"].startswith("default-src 'self'")
            names = re.findall(r'(?:href|src)="/(page/[^"]+)"', page.read().decode())
        assert len(names) == 3
        for name in names:
            with urllib.request.urlopen(url + name) as file:
                assert file.read() == (PAGE.parent / name).read_bytes()
        assert ask(url, "api/predict", b"{}") == (
            502,
            {
                "error": f"http://127.0.0.1:{port}/predictions/babybert does not answer: connection refused",
                "down": True,
            },
        )
        assert ask(url, "api/predict", b" " * 1_000_001)[0] == 413
        assert ask(url, "api/inside", b"{}")[0] == 404  # an endpoint has none
        host = url.split("/")[2]
        connection = http.client.HTTPConnection(host)
        connection.request("GET", "/api/about", headers={"Host": "elsewhere.example"})
        assert connection.getresponse().status == 400
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        process.stderr.close()


@pytest.mark.slow
def test_an_endpoint_that_hangs_does_not_keep_the_page_from_ending():
    with socket.create_server(("127.0.0.1", 0)) as endpoint:
        address = f"http://127.0.0.1:{endpoint.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "babybert.cli", "playground", f"--endpoint={address}", "--port=0"],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            url = re.search(r"http://127\.0\.0\.1:\d+/", process.stderr.readline())[0]
            answers = []
            asking = threading.Thread(target=lambda: answers.append(ask(url, "api/predict", b"{}")))
            asking.start()
            taken, _ = endpoint.accept()
            process.send_signal(signal.SIGTERM)
            assert process.wait(models.ANSWER_SECONDS / 2) == 0
            asking.join()
            taken.close()
            assert answers == [(503, {"error": "the playground is ending"})]
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
            process.stderr.close()


def ask(url, path, content):
    """Status and JSON of one question."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url + path, content, {"Content-Type": "application/json"})
        ) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text


def test_an_endpoints_page_loads_no_pytorch():
    code = "import sys; from babybert.playground.app import make_app, open_model; from babybert.config import PlaygroundConfig as C\n"
    code += "make_app(open_model(C(endpoint='http://h')), 'localhost'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_nothing_of_the_page_is_elsewhere():
    assert PlaygroundConfig(endpoint="http://h").host in LOOPBACK
    for path in PAGE.iterdir():
        assert set(re.findall(r"https?://[^\s\"')]+", path.read_text())) <= {"http://www.w3.org/2000/svg"}, path
