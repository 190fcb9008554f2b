"""Any request to a real TorchServe gets a documented response, never a 5xx, and the worker survives it.

`BABYBERT_FUZZ=10000` sends that many random bodies instead of a few hundred.
"""

import http.client
import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import psutil  # type: ignore[import-untyped, unused-ignore]
import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import JSON, ServedModel

OPENAPI = schemathesis.openapi.from_path(Path(__file__).parents[2] / "handler/openapi.yaml")
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_rejection,
]
FUZZ = int(os.environ.get("BABYBERT_FUZZ", "400"))
CONNECTIONS = 8
MAX_GROWTH = 40 * 2**20  # bytes that a worker may allocate permanently, for the buffers of the largest batch

TEXT = st.text(alphabet=st.characters(), max_size=60) | st.sampled_from(
    ["a [MASK]", "[MASK][MASK]", "[PAD]", "[MASK] \ud800", "\0", "word " * 700 + "[MASK]", ""]
)
NUMBER = st.integers() | st.floats() | st.sampled_from([10**400, -(10**4000), 2**63, 1e308, 0, 1, 5, 100, 101])
LEAF = st.none() | st.booleans() | NUMBER | TEXT
KEY = (
    st.sampled_from(
        ["text", "inputs", "parameters", "top_k", "targets", "truncate", "sentence_a", "sentence_b", "pairs"]
    )
    | TEXT
)
JSON_VALUE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEY, inner, max_size=4), max_leaves=20
)
MASKED = st.lists(TEXT, max_size=3).map(lambda parts: "[MASK] ".join([*parts, ""]))
NEAR = st.fixed_dictionaries(
    {},
    optional={
        "text": MASKED | st.lists(MASKED | LEAF, max_size=40),
        "inputs": MASKED | st.lists(MASKED, max_size=3),
        "parameters": st.dictionaries(st.sampled_from(["top_k", "targets", "truncate", "x"]), JSON_VALUE, max_size=3),
        "top_k": st.integers(0, 101) | JSON_VALUE,
        "targets": st.lists(st.sampled_from(["the", "sheriff", "The"]) | TEXT, max_size=4) | JSON_VALUE,
        "truncate": st.booleans() | JSON_VALUE,
        "sentence_a": TEXT,
        "sentence_b": TEXT,
        "pairs": st.lists(st.fixed_dictionaries({"sentence_a": TEXT, "sentence_b": TEXT}), max_size=4),
    },
)
GOOD = st.builds(
    lambda text, k: {"text": f"the {text} [MASK]", "top_k": k},
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.integers(1, 100),
)
DEEP = st.builds(
    lambda start, depth: start * depth,
    st.sampled_from([b"[", b'{"text":', b'{"text":[', b'{"a":{"text":']),
    st.integers(1, 20_000),
)
MANY_DIGITS = st.integers(1, 9).map(lambda digit: b'{"text": "[MASK]", "top_k": ' + str(digit).encode() * 9000 + b"}")
BODIES = (
    st.binary(max_size=300)
    | DEEP
    | MANY_DIGITS
    | (JSON_VALUE | NEAR | GOOD).map(lambda value: json.dumps(value).encode())
)
FORMS = ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
CONTENT_TYPES = ["application/json"] * 12 + ["text/plain", "application/json; charset=utf-16", *FORMS]
UNDECODED = "a form that TorchServe cannot decode"

Status = int | str


@OPENAPI.parametrize()
@hypothesis.settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
def test_every_response_is_as_documented(case: Any, server: ServedModel) -> None:
    case.call_and_validate(base_url=f"http://127.0.0.1:{server.inference_port}", checks=CHECKS)


def test_random_bodies_have_documented_responses_and_the_worker_survives(server: ServedModel) -> None:
    worker = psutil.Process(server.worker())
    random_types = random.Random(0)
    requests = [(body, random_types.choice(CONTENT_TYPES)) for body in draw_examples(BODIES, FUZZ)]
    send_all(server, requests[:16])  # warms up the worker
    memory = worker.memory_info().rss
    statuses = send_all(server, requests)
    growth = worker.memory_info().rss - memory
    print(f"{len(requests):,} bodies: {Counter(statuses)}, worker {memory / 1e6:.0f} MB and {growth / 1e6:+.1f}")
    assert len(requests) == FUZZ
    assert {200, 400, 415} <= set(statuses)
    assert server.worker() == worker.pid
    assert growth < MAX_GROWTH
    assert server.ask({"text": "the [MASK]"}).status == 200


def draw_examples(strategy: st.SearchStrategy[bytes], count: int) -> list[bytes]:
    """`count` examples of a strategy, the same in each run."""
    examples: list[bytes] = []

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(example: bytes) -> None:
        examples.append(example)

    collect()
    return examples


def send_all(server: ServedModel, requests: list[tuple[bytes, str]]) -> list[Status]:
    """Send pairs of body and content type over a few connections. Fails for a response that is not documented."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        futures = [pool.submit(send, server, requests[start::CONNECTIONS]) for start in range(CONNECTIONS)]
        return [status for future in futures for status in future.result()]


def send(server: ServedModel, requests: list[tuple[bytes, str]]) -> list[Status]:
    """Send requests over one connection, one after the other."""
    connection = http.client.HTTPConnection("127.0.0.1", server.inference_port, timeout=60)
    statuses: list[Status] = []
    for body, content_type in requests:
        response = server.ask(body, {**JSON, "Content-Type": content_type}, connection=connection)
        # TorchServe decodes forms before they reach a worker, and answers 500 to one that it cannot decode.
        is_undecoded = response.status == 500 and response.body.get("type") == "ErrorDataDecoderException"
        if is_undecoded and content_type in FORMS:
            statuses.append(UNDECODED)
            continue
        assert response.status in (200, 400, 415), (response.status, response.body, body[:300], content_type)
        assert response.status == 200 or list(response.body) == ["error"], (response.body, body[:300])
        statuses.append(response.status)
    connection.close()
    return statuses
