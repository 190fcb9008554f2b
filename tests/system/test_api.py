"""What a real TorchServe answers over HTTP: every form of request, every error, and the headers that name the model."""

import http.client
import json
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from served import DAMAGED, JSON, ServedModel

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
TEXT = "Mary is [MASK] in the [MASK]."
PAIR = {"sentence_a": "Mary is superb.", "sentence_b": "She rides."}


def test_fill_mask(server: ServedModel) -> None:
    answer = server.ask({"text": TEXT, "top_k": 2})
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert [mask["position"] for mask in answer.body["masks"]] == [2, 5]
    candidates = [candidate for mask in answer.body["masks"] for candidate in mask["candidates"]]
    assert [list(candidate) for candidate in candidates] == [["token", "id", "score", "sequence"]] * 4
    several = server.ask({"text": [TEXT, "The [MASK]."], "top_k": 2})
    assert [len(each["masks"]) for each in several.body] == [2, 1]
    assert numbers(several.body[0]) == pytest.approx(numbers(answer.body), abs=1e-6)
    targets = server.ask({"text": "The [MASK].", "targets": ["pilot", "sheriff"]})
    assert {c["token"] for c in targets.body["masks"][0]["candidates"]} == {"pilot", "sheriff"}


def test_the_format_of_hugging_face(server: ServedModel) -> None:
    one = server.ask({"inputs": "The [MASK].", "parameters": {"top_k": 3}})
    assert one.status == 200
    assert [list(c) for c in one.body] == [["score", "token", "token_str", "sequence"]] * 3
    assert [len(mask) for mask in server.ask({"inputs": TEXT}).body] == [5, 5]
    assert [len(each) for each in server.ask({"inputs": ["The [MASK].", TEXT]}).body] == [5, 2]


def test_next_sentence(server: ServedModel) -> None:
    one = server.ask(PAIR)
    assert one.status == 200
    assert set(one.body) == {"is_next", "probability"}
    several = server.ask({"pairs": [PAIR, {"sentence_a": "a", "sentence_b": "b"}]})
    assert several.body[0]["probability"] == pytest.approx(one.body["probability"], abs=1e-6)
    assert len(several.body) == 2


def test_the_headers_name_the_model(server: ServedModel) -> None:
    (archive,) = server.archives()
    with zipfile.ZipFile(archive) as content:
        served = json.loads(content.read("served.json"))
    assert served["step"] == 7
    for body in (PAIR, {"bad": 1}):
        headers = server.ask(body).headers
        assert headers["x-babybert-version"] == served["version"] == f"7-{served['digest'][:12]}"
        assert headers["x-babybert-step"] == "7"
    assert server.model()["modelVersion"] == served["version"]


@pytest.mark.parametrize(
    ("body", "headers", "method", "status", "message"),
    [
        ({"text": "no mask here"}, JSON, "POST", 400, "no [MASK]"),
        ({"text": "[MASK]", "targets": ["pilot", "xyzzy"]}, JSON, "POST", 400, "'xyzzy'"),
        ({"question": "?"}, JSON, "POST", 400, "none of 'text'"),
        ({"text": "long " * 600 + "[MASK]"}, JSON, "POST", 400, "at most 512"),
        ({"text": "long " * 600 + "[MASK]", "truncate": True}, JSON, "POST", 400, "loses 1 of its 1 [MASK]s"),
        ({"\ud800": 1, "text": "[MASK]"}, JSON, "POST", 400, "unknown key"),
        ({"text": "[MASK] \ud800"}, JSON, "POST", 400, "surrogate"),
        (b"{not json", JSON, "POST", 400, "not JSON"),
        (b"\xff\xfe", JSON, "POST", 400, "not UTF-8"),
        (b"[" * 100_000, JSON, "POST", 400, "not JSON"),
        (b'{"text": "[MASK]", "top_k": ' + b"9" * 10_000 + b"}", JSON, "POST", 400, "too many digits"),
        (b'{"text": "[MASK]", "top_k": 1e999}', JSON, "POST", 400, "'top_k' is Infinity"),
        (b'{"text": "[MASK]", "top_k": NaN}', JSON, "POST", 400, "NaN is not a number in JSON"),
        (b'{"text": "[MASK]", "text": "[MASK]"}', JSON, "POST", 400, "more than once"),
        (b'["a"]', JSON, "POST", 400, "must be a JSON object"),
        (b"", JSON, "POST", 400, "no body"),
        (None, {}, "POST", 400, "no body"),
        (None, {}, "GET", 400, "no body"),
        (b"{}", {}, "POST", 415, "content type"),
        (b'{"text": "[MASK]"}', {"Content-Type": "text/plain"}, "POST", 415, "content type"),
        (b'{"text": "[MASK]"}', {"Content-Type": "application/octet-stream"}, "POST", 415, "content type"),
        (b"text=%5BMASK%5D", FORM, "POST", 415, "content type"),
        (
            b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n[MASK]\r\n--x--\r\n',
            {"Content-Type": "multipart/form-data; boundary=x"},
            "POST",
            415,
            "",
        ),
    ],
)
def test_an_invalid_request_is_an_error_with_the_reason(
    server: ServedModel, body: Any, headers: Mapping[str, str], method: str, status: int, message: str
) -> None:
    answer = server.ask(body, headers, method)
    assert (answer.status, answer.headers["content-type"], list(answer.body)) == (status, "application/json", ["error"])
    assert message in answer.body["error"]


def test_a_character_set_in_the_content_type_and_a_query_are_accepted(server: ServedModel) -> None:
    assert server.ask(PAIR, {"Content-Type": "application/json; charset=utf-8"}).status == 200
    # TorchServe keeps the content type of the body under the name of this header, which therefore replaces it.
    assert server.ask(PAIR, {**JSON, "body": "x"}).status == 200
    assert server.ask(PAIR, query="?text=x&top_k=2").status == 200


def test_the_largest_answer_is_not_too_large_for_the_server(server: ServedModel) -> None:
    """Each candidate repeats the text, so answers grow with masks x top_k x text; here a character takes four bytes."""
    text = "\U0001f3ac" * 9_000 + " [MASK]"
    answer = server.ask({"text": text, "top_k": 100})
    assert answer.status == 200
    text = "a " * 250 + "[MASK] " * 32
    assert "at most 1,000,000" in server.ask({"text": text, "top_k": 100}).body["error"]
    fits = "a " * 10 + "[MASK] " * 32
    assert len(server.ask({"text": fits, "top_k": 100}).body["masks"]) == 32


def test_answers_do_not_depend_on_their_batch(server: ServedModel) -> None:
    """32 requests of all kinds, also invalid ones, at once over as many connections: the same as one by one."""
    bodies: list[dict[str, Any]] = []
    for repeats in range(1, 9):
        bodies += [
            {"text": "The sheriff is [MASK].", "top_k": 3},
            PAIR,
            {"inputs": ["A film [MASK] [MASK]."] * (1 + repeats % 3)},
            {"text": "no mask"},
        ]
    alone = [server.ask(body) for body in bodies]
    before = server.value("babybert_inference_batch_requests_count")
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(server.ask, bodies))
    for first, second in zip(alone, together, strict=True):
        assert first.status == second.status
        assert numbers(first.body) == pytest.approx(numbers(second.body), abs=1e-6)
    assert server.value("babybert_inference_batch_requests_count") - before < 32, "none of them shared a batch"


def test_a_non_finite_score_is_an_error_of_its_request_alone(server: ServedModel) -> None:
    bodies = [{"text": f"The {word} is [MASK]."} for word in ("pilot", DAMAGED) * 16]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(server.ask, bodies))
    assert [answer.status for answer in answers] == [200, 500] * 16
    assert "no finite score" in answers[1].body["error"]
    server.wait_for_metrics()
    assert server.value("babybert_inference_requests_total", task="fill-mask", outcome="failed") >= 16


def numbers(body: Any) -> list[float]:
    """All numbers in an answer, in order."""
    if isinstance(body, dict):
        return [number for value in body.values() for number in numbers(value)]
    if isinstance(body, list):
        return [number for value in body for number in numbers(value)]
    return [] if isinstance(body, str) else [float(body)]


def test_a_connection_is_kept_open(server: ServedModel) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.inference_port, timeout=60)
    assert [server.ask(body, connection=connection).status for body in (PAIR, {"bad": 1}, PAIR)] == [200, 400, 200]
    connection.close()
