"""Whatever is sent to a real TorchServe: an answer as documented, never a 5xx, and the same worker afterwards.

`BABYBERT_FUZZ=10000` sends that many random bodies in place of a few hundred.
"""

import functools
import http.client
import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import psutil
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
from served import JSON

OPENAPI = schemathesis.openapi.from_path(Path(__file__).parents[2] / "handler/openapi.yaml")
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_rejection,
]
FUZZ = int(os.environ.get("BABYBERT_FUZZ", "400"))
CONNECTIONS = 8
GROWTH = 40 * 2**20  # bytes that a worker may take for good, for buffers of the largest batch

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


@OPENAPI.parametrize()
@hypothesis.settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
def test_every_answer_is_as_documented(case, server):
    case.call_and_validate(base_url=f"http://127.0.0.1:{server.inference_port}", checks=CHECKS)


def test_random_bodies_neither_fail_nor_harm(server):
    worker, chosen = psutil.Process(server.worker()), random.Random(0)
    bodies = collected(BODIES, FUZZ)
    for at_once in (16, FUZZ):  # the first warm the worker up
        statuses = pooled(server, bodies[:at_once], chosen)
        if at_once == 16:
            before = worker.memory_info().rss
    growth = worker.memory_info().rss - before
    print(f"{len(bodies):,} bodies: {Counter(statuses)}, worker {before / 1e6:.0f} MB and {growth / 1e6:+.1f}")
    assert len(bodies) == FUZZ
    assert {200, 400, 415} <= set(statuses)
    assert server.worker() == worker.pid
    assert growth < GROWTH
    assert server.ask({"text": "the [MASK]"}).status == 200


def collected(strategy, count):
    """This many examples, the same each time."""
    found = []

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(example):
        found.append(example)

    collect()
    return found


def pooled(server, bodies, chosen):
    """Send all over a few connections; returns the statuses. A body that is answered in any other way than documented fails."""
    kinds = [chosen.choice(CONTENT_TYPES) for _ in bodies]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        parts = [(bodies[start::CONNECTIONS], kinds[start::CONNECTIONS]) for start in range(CONNECTIONS)]
        return [status for part in pool.map(functools.partial(send, server), parts) for status in part]


def send(server, part):
    connection = http.client.HTTPConnection("127.0.0.1", server.inference_port, timeout=60)
    statuses = []
    for body, kind in zip(*part, strict=True):
        answer = server.ask(body, {**JSON, "Content-Type": kind}, connection=connection)
        # TorchServe decodes forms itself, before there is a worker, and calls one that it cannot decode an error of its own.
        if answer.status == 500 and answer.body.get("type") == "ErrorDataDecoderException" and kind in FORMS:
            statuses.append(UNDECODED)
            continue
        assert answer.status in (200, 400, 415), (answer.status, answer.body, body[:300], kind)
        assert answer.status == 200 or list(answer.body) == ["error"], (answer.body, body[:300])
        statuses.append(answer.status)
    connection.close()
    return statuses
