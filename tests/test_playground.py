"""The playground behind its page: backends and their failures, text inspection, run history, and the server."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import S3, tokenizer_of
from faulty_proxy import FaultyProxy
from processes import start_babybert

from babybert.checkpoint.format import checkpoint_step, list_checkpoints
from babybert.checkpoint.storage import S3Store
from babybert.cli import main
from babybert.config import ModelConfig, PlaygroundConfig
from babybert.errors import DataError, UsageError
from babybert.evaluation.look import attention_weights
from babybert.evaluation.preference import compare_sentences
from babybert.model.bert import BabyBert
from babybert.playground import app, backends
from babybert.playground.app import LOOPBACK, PAGE, open_sources
from babybert.playground.backends import ApiResponse, EndpointBackend, EndpointDown, LocalBackend
from babybert.playground.inspection import (
    MAX_MAP_POSITIONS,
    MAX_SCORED_TOKENS,
    inspect_text,
    nearest_words,
    preferred_sentence,
)
from babybert.playground.run_history import RunHistory, evenly_spaced
from babybert.serving.predictor import Predictor
from babybert.serving.torchserve import free_ports
from babybert.training.train import pretrain

JSON = "application/json"


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(0)
    tokenizer = tokenizer_of("mary rides near the desert . she fights two zombies !")
    sizes = ModelConfig(vocab_size=tokenizer.size, width=8, heads=2, layers=2, feed_forward=16)
    return Predictor(BabyBert(sizes), tokenizer)


def json_body(**keys: Any) -> bytes:
    return json.dumps(keys).encode()


@contextmanager
def fixed_endpoint(status: int, content: bytes, version: str) -> Iterator[str]:
    """An HTTP server that gives every request the same response; yields its address."""

    class FixedResponse(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("X-BabyBERT-Version", version)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), FixedResponse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "content", "expected", "problem"),
    [
        (200, b'{"masks": []}', ApiResponse(200, {"masks": []}, "7-abc"), None),
        (400, b'{"error": "no"}', ApiResponse(400, {"error": "no"}, "7-abc"), None),
        (
            503,
            b'{"code": 503, "type": "T", "message": "queue full"}',
            ApiResponse(503, {"code": 503, "type": "T", "message": "queue full"}, "7-abc"),
            "queue full",
        ),
        (413, b"", ApiResponse(413, {"error": "Request Entity Too Large (the endpoint sent no JSON)"}), None),
        (200, b"<html>", ApiResponse(502, {"error": "OK (the endpoint sent no JSON)"}), "sent no JSON"),
    ],
)
def test_the_response_of_an_endpoint_is_passed_on(
    status: int, content: bytes, expected: ApiResponse, problem: str | None
) -> None:
    with fixed_endpoint(status, content, "7-abc") as url:
        endpoint = EndpointBackend(url)
        assert endpoint.query(json_body(text="[MASK]")) == expected
        if problem is None:
            assert endpoint.problem() is None
        else:
            assert problem in (endpoint.problem() or "")


def test_an_endpoint_that_is_down_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    endpoint = EndpointBackend(f"http://127.0.0.1:{port}/")
    assert endpoint.url == f"http://127.0.0.1:{port}/predictions/babybert"
    message = rf"127\.0\.0\.1:{port}/predictions/babybert does not answer: connection refused"
    with pytest.raises(EndpointDown, match=message):
        endpoint.query(json_body(text="[MASK]"))
    with pytest.raises(EndpointDown, match="no such host"):
        EndpointBackend("http://nobody.invalid/own/path").query(b"")
    proxy = FaultyProxy(("127.0.0.1", port))
    try:
        proxy.mode = "hang"
        monkeypatch.setattr(backends, "PROBE_SECONDS", 0.3)
        assert "nothing came within 0.3 s" in (EndpointBackend(proxy.url).problem() or "")
        proxy.mode = "refuse"
        assert "does not answer" in (EndpointBackend(proxy.url).problem() or "")
    finally:
        proxy.close()


def test_a_checkpoint_answers_as_the_api_does(predictor: Predictor) -> None:
    local = LocalBackend(predictor)
    assert local.problem() is None
    expected = predictor.fill_mask(["mary [MASK] ."], 2)[0]
    assert local.query(json_body(text="mary [MASK] .", top_k=2)) == ApiResponse(200, expected)
    pairs = predictor.next_sentence([("mary", "she")])
    assert local.query(json_body(pairs=[{"sentence_a": "mary", "sentence_b": "she"}])) == ApiResponse(200, pairs)
    error = {"error": "'top_k' is 500; it must be a whole number from 1 to 100"}
    assert local.query(json_body(text="[MASK]", top_k=500)) == ApiResponse(400, error)
    assert local.query(json_body(text="[MASK]"), "text/plain").status == 415
    damaged = Predictor(BabyBert(predictor.model.config), predictor.tokenizer)
    torch.nn.init.constant_(damaged.model.mlm_decoder.bias, float("nan"))
    assert LocalBackend(damaged).query(json_body(text="[MASK]")).status == 500


def test_a_text_as_the_model_reads_it(predictor: Predictor) -> None:
    result = inspect_text(predictor, "Mary RIDES a tank.", "She fights!", 1, 0)
    tokens = result["tokens"]
    expected_tokens = ["[CLS]", "mary", "rides", "[UNK]", "[UNK]", ".", "[SEP]", "she", "fights", "!", "[SEP]"]
    expected_sources = ["", "Mary", "RIDES", "a", "tank", ".", "", "She", "fights", "!", ""]
    assert [token["token"] for token in tokens] == expected_tokens
    assert [token["source"] for token in tokens] == expected_sources
    assert [token["segment"] for token in tokens] == [1] * 7 + [2] * 4
    assert [token["unknown"] for token in tokens] == [i in (3, 4) for i in range(11)]
    ids_1T = torch.tensor([[token["id"] for token in tokens]])
    segments_1T = torch.tensor([[token["segment"] for token in tokens]])
    weights_LBHTT = attention_weights(predictor.model, ids_1T, segments_1T)
    torch.testing.assert_close(torch.tensor(result["attention"]), weights_LBHTT[1, 0, 0], atol=1e-4, rtol=0)
    single = inspect_text(predictor, "Mary [MASK] .", " ", 0, 1)
    assert [token["token"] for token in single["tokens"]] == ["[CLS]", "mary", "[MASK]", ".", "[SEP]"]


def test_a_text_that_cannot_be_inspected_says_why(predictor: Predictor) -> None:
    long = inspect_text(predictor, "mary " * (MAX_MAP_POSITIONS - 1), "", 0, 0)
    assert long["attention"] is None
    assert f"{MAX_MAP_POSITIONS + 1} tokens" in long["reason"]
    invalid: list[tuple[tuple[Any, ...], str]] = [
        (("mary", "", 2, 0), "'layer' is 2; it must be a whole number from 0 to 1"),
        (("mary", "", 0, True), "'head' is true"),
        ((" ", "", 0, 0), "empty"),
        ((7, "", 0, 0), "must be a string"),
        (("mary", 5, 0, 0), "must be a string"),
        (("mary", '"', 0, 0), "no words"),
        (('"', "", 0, 0), "no words"),
        (("mary " * 600, "", 0, 0), "602 tokens"),
        (("\ud800", "", 0, 0), "surrogate"),
        (("mary " * 300, "she " * 300, 0, 0), "603 tokens"),
    ]
    for arguments, message in invalid:
        with pytest.raises(UsageError, match=message):
            inspect_text(predictor, *arguments)
    assert len(nearest_words(predictor, "Mary")["neighbours"]) == 6
    assert nearest_words(predictor, "tank") == {"word": "tank", "known": False, "neighbours": []}
    with pytest.raises(UsageError, match="empty"):
        nearest_words(predictor, "")


def test_which_sentence_is_preferred(predictor: Predictor) -> None:
    answer = preferred_sentence(predictor, "Mary rides near the desert.", "Mary rides the near desert.")
    expected = compare_sentences(
        predictor.model, predictor.tokenizer, "Mary rides near the desert.", "Mary rides the near desert."
    )
    assert {**answer, "verdict": ""} == {**expected, "verdict": ""}
    assert answer["verdict"].startswith(f"The model prefers {expected['preferred'].upper()}, by ")
    invalid: list[tuple[tuple[Any, Any], str]] = [
        ((" ", "mary"), "empty"),
        (("mary", ""), "'sentence_b' is empty"),
        (("mary", 7), "must be a string"),
        (("mary", "[MASK]"), "special token"),
        (("mary " * (MAX_SCORED_TOKENS + 1), "mary"), f"sentence A has {MAX_SCORED_TOKENS + 1} tokens"),
    ]
    for arguments, message in invalid:
        with pytest.raises(UsageError, match=message):
            preferred_sentence(predictor, *arguments)


def test_the_page_shows_paths_that_are_not_utf_8(predictor: Predictor, tmp_path: Path) -> None:
    run = tmp_path / os.fsdecode(b"d\xe9")
    run.mkdir()
    about = app.about(app.PlaygroundSources(LocalBackend(predictor), f"Checkpoint of {run}.", RunHistory(str(run))))
    assert about["run"] == rf"{tmp_path}/d\xe9"
    assert about["name"] == rf"Checkpoint of {tmp_path}/d\xe9."
    assert json.loads(bytes(app.EscapedJsonResponse({"error": str(run)}).body)) == {"error": str(run)}


def test_evenly_spaced_steps_hold_the_first_and_the_last() -> None:
    assert evenly_spaced([3, 5], 5) == [3, 5]
    assert evenly_spaced(list(range(1, 101)), 5) == [1, 26, 51, 75, 100]


@pytest.fixture
def run(small: Any) -> Path:
    """A run with seven checkpoints, all kept."""
    result = pretrain(small(epochs=1, max_steps=35, checkpoint_every="5", keep_checkpoints=100))
    assert result is not None
    return result.checkpoint.parent


@pytest.mark.slow
def test_the_history_of_a_run_on_disk_and_in_s3(run: Path, s3: S3, small: Any) -> None:
    pretrain(small(epochs=1, max_steps=35, store=f"s3://{s3.bucket}/run", keep_checkpoints=100))
    store = S3Store(f"s3://{s3.bucket}/run")
    for folder in list_checkpoints(run):
        store.upload(folder)
    local, remote = RunHistory(str(run)), RunHistory(f"s3://{s3.bucket}/run/")
    assert local.steps() == remote.steps() == sorted(map(checkpoint_step, list_checkpoints(run)))
    check_curves(local.curves()["curves"], run)
    local_baselines = local.curves()["curves"]["mlm_loss"]["baselines"]
    assert [baseline["name"] for baseline in local_baselines] == ["unigram baseline", "chance"]
    assert remote.curves()["curves"]["mlm_loss"]["baselines"] == local_baselines
    sources = open_sources(PlaygroundConfig(checkpoint=remote.address))
    assert sources.backend.query(json_body(text="[MASK]")).status == 200
    assert sources.run is not None
    assert sources.run.address == remote.address
    assert open_sources(PlaygroundConfig(checkpoint=f"{remote.address}/step-00000005")).run is None
    request = json_body(text="Mary is [MASK] .", top_k=2)
    response = local.query_checkpoints(request, JSON)
    assert response.body == remote.query_checkpoints(request, JSON).body
    assert [entry["step"] for entry in response.body["checkpoints"]] == evenly_spaced(local.steps(), 5)
    for entry in response.body["checkpoints"]:
        predictor = Predictor.load(run / f"step-{entry['step']:08d}")
        assert entry == {"step": entry["step"], **predictor.fill_mask(["Mary is [MASK] ."], 2)[0]}


def check_curves(curves: dict[str, Any], run: Path) -> None:
    """The curves are what metrics.jsonl has."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    last = [line for line in lines if line["split"] == "validation"][-1]
    baseline_keys = {"mlm_loss": ["mlm_unigram_loss", "mlm_chance_loss"], "nsp_loss": ["nsp_chance_loss"]}
    for loss, keys in baseline_keys.items():
        assert curves[loss]["held_out"][-1] == [last["step"], last[loss]]
        assert curves[loss]["train"] == [[line["step"], line[loss]] for line in train]
        assert [baseline["value"] for baseline in curves[loss]["baselines"]] == [last[key] for key in keys]


def test_a_corrupt_checkpoint_is_skipped_with_the_reason(run: Path) -> None:
    first = min(list_checkpoints(run))
    (first / "model.safetensors").write_bytes(b"")
    history = RunHistory(str(run))
    answer = history.query_checkpoints(json_body(text="Mary is [MASK] ."), JSON).body
    assert [entry["step"] for entry in answer["checkpoints"]] == evenly_spaced(history.steps(), 5)[1:]
    assert len(answer["passed_over"]) == 1
    assert str(first) in answer["passed_over"][0]
    invalid = json_body(text="Mary is [MASK] .", targets=["xyzzy"])
    assert history.query_checkpoints(invalid, JSON).status == 400
    for folder in list_checkpoints(run):
        shutil.rmtree(folder)
    assert history.steps() == []
    with pytest.raises(DataError, match="no checkpoint there yet"):
        history.query_checkpoints(json_body(text="[MASK]"), JSON)


def test_what_is_not_a_run_is_refused(tmp_path: Path, s3: S3) -> None:
    with pytest.raises(DataError, match="no such folder"):
        RunHistory(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        RunHistory(str(tmp_path)).curves()
    with pytest.raises(DataError, match=r"has no metrics\.jsonl yet"):
        RunHistory(f"s3://{s3.bucket}/none").curves()
    with pytest.raises(UsageError, match="one 'text'"):
        RunHistory(str(tmp_path)).query_checkpoints(json_body(sentence_a="a", sentence_b="b"), JSON)


def test_settings_that_cannot_work_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one of --endpoint URL and --checkpoint PATH"):
        PlaygroundConfig()
    with pytest.raises(UsageError, match="one of --endpoint URL and --checkpoint PATH"):
        PlaygroundConfig(endpoint="http://h", checkpoint="c")
    for endpoint in ("localhost:8080", "http://h:abc", "http://a b", "http://", "http://user:password@h", ""):
        with pytest.raises(UsageError, match=f"endpoint is '{endpoint}'"):
            PlaygroundConfig(endpoint=endpoint)
    with pytest.raises(UsageError, match="port is 65536"):
        PlaygroundConfig(endpoint="http://h", port=65536)
    assert main(["playground", "--checkpoint", str(tmp_path)]) == 3
    assert str(tmp_path) in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["playground", "--endpoint=http://127.0.0.1:1", f"--port={taken.getsockname()[1]}"]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_without_a_port_it_takes_the_default_or_a_free_one_and_says_which(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (default,) = free_ports(1)
    monkeypatch.setattr(app, "DEFAULT_PORT", default)
    with app._listen("127.0.0.1", None) as first:
        assert first.getsockname()[1] == default
        assert not caplog.messages
        with app._listen("127.0.0.1", None) as second:
            port = second.getsockname()[1]
            assert port != default
            assert caplog.messages == [f"port {default} is taken; using port {port}"]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{default}"):
            app._listen("127.0.0.1", default)
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1"):  # an address of no machine
        app._listen("192.0.2.1", None)
    with pytest.raises(UsageError, match=r"cannot listen on a\.\.b"):
        app._listen("a..b", None)


def test_two_playgrounds_run_on_one_machine() -> None:
    children = [start_babybert("playground", "--endpoint=http://127.0.0.1:1") for _ in range(2)]
    try:
        urls = [page_url(child.wait_for_line("http://")) for child in children]
        assert len(set(urls)) == 2
        for url in urls:
            with urllib.request.urlopen(url, timeout=30) as page:
                assert page.status == 200
    finally:
        for child in children:
            child.kill()


def page_url(line: str) -> str:
    """The address of the page in the line that the playground prints when it is ready."""
    match = re.search(r"http://127\.0\.0\.1:\d+/", line)
    assert match, line
    return match[0]


def test_the_command_serves_its_page_until_sigterm() -> None:
    (port,) = free_ports(1)
    proxy = {"http_proxy": "http://nobody.invalid:1", "no_proxy": "", "NO_PROXY": ""}  # loopback is asked directly
    child = start_babybert("playground", f"--endpoint=http://127.0.0.1:{port}", "--port=0", environment=proxy)
    try:
        url = page_url(child.wait_for_line("http://"))
        with urllib.request.urlopen(url, timeout=30) as page:
            assert page.headers["Content-Security-Policy"].startswith("default-src 'self'")
            names = re.findall(r'(?:href|src)="/(page/[^"]+)"', page.read().decode())
        assert len(names) == 3
        for name in names:
            with urllib.request.urlopen(url + name, timeout=30) as file:
                assert file.read() == (PAGE.parent / name).read_bytes()
        error = f"http://127.0.0.1:{port}/predictions/babybert does not answer: connection refused"
        assert post(url, "api/predict", b"{}") == (502, {"error": error, "down": True})
        assert post(url, "api/predict", b" " * 1_000_001)[0] == 413
        assert post(url, "api/inside", b"{}")[0] == 404  # an endpoint does not have this route
        connection = http.client.HTTPConnection(url.split("/")[2], timeout=30)
        connection.request("GET", "/api/about", headers={"Host": "elsewhere.example"})
        assert connection.getresponse().status == 400
        connection.close()
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0
    finally:
        child.kill()


@pytest.mark.slow
def test_an_endpoint_that_hangs_does_not_keep_the_page_from_ending() -> None:
    with socket.create_server(("127.0.0.1", 0)) as endpoint:
        endpoint.settimeout(60)
        address = f"http://127.0.0.1:{endpoint.getsockname()[1]}"
        child = start_babybert("playground", f"--endpoint={address}", "--port=0")
        try:
            url = page_url(child.wait_for_line("http://"))
            answers: list[tuple[int, Any]] = []
            client = threading.Thread(target=lambda: answers.append(post(url, "api/predict", b"{}")))
            client.start()
            connection, _ = endpoint.accept()
            child.send_signal(signal.SIGTERM)
            assert child.wait(backends.ANSWER_SECONDS / 2) == 0
            client.join(60)
            connection.close()
            assert answers == [(503, {"error": "the playground is ending"})]
            assert "Traceback" not in child.output
        finally:
            child.kill()


def post(url: str, path: str, content: bytes) -> tuple[int, Any]:
    """Status and JSON of one request to the playground."""
    request = urllib.request.Request(url + path, content, {"Content-Type": JSON})
    try:
        with urllib.request.urlopen(request, timeout=90) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text


def test_a_page_for_an_endpoint_imports_no_pytorch() -> None:
    code = """
import sys
from babybert.config import PlaygroundConfig
from babybert.playground.app import make_app, open_sources
make_app(open_sources(PlaygroundConfig(endpoint="http://h")), "localhost")
assert "torch" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_the_page_loads_nothing_from_other_servers() -> None:
    assert PlaygroundConfig(endpoint="http://h").host in LOOPBACK
    for path in PAGE.iterdir():
        assert set(re.findall(r"https?://[^\s\"')]+", path.read_text())) <= {"http://www.w3.org/2000/svg"}, path
