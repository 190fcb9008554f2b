"""Parsing of request bodies: every valid form, and every reason to refuse one."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babybert.errors import DataError, UsageError
from babybert.serving.request_schema import (
    MAX_CHARACTERS,
    MAX_ITEMS,
    MAX_MASKS,
    MAX_TARGETS,
    FillMask,
    NextSentence,
    Request,
    UnsupportedType,
    http_status,
    parse,
    parse_object,
)

PAIR = {"sentence_a": "a", "sentence_b": "b"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "must be a JSON object, not null"),
        ([], "must be a JSON object, not a list"),
        ("text", "must be a JSON object, not a string"),
        ({}, "none of 'text'"),
        ({"txt": "[MASK]"}, "none of 'text'"),
        ({"text": 5}, "'text' must be a string or a list of strings, not a number"),
        ({"text": "  "}, "'text' is empty"),
        ({"text": ""}, "'text' is empty"),
        ({"text": []}, "'text' is an empty list"),
        ({"text": ["[MASK]", None]}, r"'text\[1\]' must be a string, not null"),
        ({"text": ["[MASK]", "a"]}, r"'text\[1\]' has no \[MASK\]"),
        ({"text": ["[MASK]"] * (MAX_ITEMS + 1)}, "'text' is a list of 33; at most 32"),
        ({"text": "[MASK]" * (MAX_MASKS + 1)}, r"'text' has 33 \[MASK\]s; at most 32"),
        ({"text": ["[MASK]" * 30, "[MASK]" * 3]}, r"'text' has 33 \[MASK\]s"),
        ({"text": "[MASK]" + "a" * MAX_CHARACTERS}, "'text' is 10,006 characters long; at most 10,000"),
        ({"text": "[MASK]" * 20 + "a" * 9000, "top_k": 100}, "is 18,240,000, at most 1,000,000"),
        ({"text": "no mask"}, r"no \[MASK\]"),
        ({"text": "[MASK]", "top_k": 0}, "'top_k' is 0; it must be a whole number from 1 to 100"),
        ({"text": "[MASK]", "top_k": 101}, "'top_k' is 101"),
        ({"text": "[MASK]", "top_k": True}, "'top_k' is true"),
        ({"text": "[MASK]", "top_k": 2.0}, "'top_k' is 2.0"),
        ({"text": "[MASK]", "top_k": None}, "'top_k' is null"),
        ({"text": "[MASK]", "top_k": [1]}, "'top_k' is a list"),
        ({"text": "[MASK]", "top_k": "5" * 100}, "'top_k' is '5{59}[.]{3};"),
        ({"text": "[MASK]", "truncate": "yes"}, "'truncate' must be true or false, not a string"),
        ({"text": "[MASK]", "targets": []}, "'targets' is an empty list"),
        ({"text": "[MASK]", "targets": {"a": 1}}, "'targets' must be a list of strings, not an object"),
        ({"text": "[MASK]", "targets": ["a", 1]}, r"'targets\[1\]' must be a string, not a number"),
        ({"text": "[MASK]", "targets": ["a"] * (MAX_TARGETS + 1)}, "'targets' is a list of 101; at most 100"),
        ({"text": "[MASK]", "sentence_a": "a"}, "unknown key 'sentence_a'; this task takes text, top_k"),
        ({"text": "[MASK]", "\ud800": 1}, r"unknown key '\\ud800'"),
        ({"text": "[MASK] \ud800"}, "surrogate"),
        ({"inputs": {}}, "'inputs' must be a string or a list"),
        ({"inputs": "[MASK]", "top_k": 1}, "unknown key 'top_k'; this task takes inputs, parameters"),
        ({"inputs": "[MASK]", "parameters": []}, "'parameters' must be an object, not a list"),
        ({"inputs": "[MASK]", "parameters": {"k": 1}}, "unknown key 'k'; 'parameters' takes top_k, targets, truncate"),
        ({"inputs": "[MASK]", "parameters": {"top_k": -1}}, "'top_k' is -1"),
        ({"sentence_a": "a"}, "'sentence_b' is missing"),
        ({"sentence_b": "a"}, "'sentence_a' is missing"),
        ({"sentence_a": "a", "sentence_b": None}, "'sentence_b' must be a string, not null"),
        ({**PAIR, "prefix": "x"}, "unknown key 'prefix'"),
        ({"pairs": "a"}, "'pairs' must be a list, not a string"),
        ({"pairs": []}, "'pairs' is an empty list"),
        ({"pairs": [["a", "b"]]}, r"'pairs\[0\]' must be an object with sentence_a and sentence_b, not a list"),
        ({"pairs": [PAIR, {"sentence_a": "a"}]}, r"'sentence_b' is missing; 'pairs\[1\]' takes"),
        ({"pairs": [PAIR, {"sentence_a": "a", "sentence_b": ""}]}, r"'pairs\[1\].sentence_b' is empty"),
        ({"pairs": [PAIR] * 33}, "'pairs' is a list of 33; at most 32"),
        ({"pairs": [PAIR], "truncate": 1}, "'truncate' must be true or false, not a number"),
    ],
)
def test_an_invalid_request_is_refused_with_the_reason(body: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse_object(body)
    assert len(str(error.value)) < 300
    str(error.value).encode()


def test_valid_requests() -> None:
    assert parse_object({"text": "a [MASK]", "top_k": 3}) == Request(
        "fill-mask", [FillMask("a [MASK]", 3)], single=True
    )
    several = parse_object({"text": ["[MASK]"], "targets": ["b", "a", "b"], "truncate": True})
    assert several == Request(
        "fill-mask", [FillMask("[MASK]", targets=("b", "a"), truncate=True, name="text[0]")], single=False
    )
    assert parse_object(PAIR) == Request("next-sentence", [NextSentence("a", "b")], single=True)
    assert parse_object({"pairs": [PAIR]}) == Request(
        "next-sentence", [NextSentence("a", "b", prefix="pairs[0].")], single=False
    )
    hugging_face = parse_object({"inputs": "[MASK]", "parameters": {"targets": "a", "top_k": 2}})
    assert hugging_face == Request(
        "fill-mask", [FillMask("[MASK]", 2, ("a",), pipeline=True, name="inputs")], single=True
    )
    assert parse_object({"inputs": ["[MASK]"]}).single
    assert not parse_object({"inputs": ["[MASK]"] * 2}).single


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "no body"),
        (b"", "no body"),
        (b"{", "is not JSON: Expecting"),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"top_k": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"top_k": NaN}', "NaN is not a number in JSON"),
        (b'{"top_k": -Infinity}', "-Infinity is not a number in JSON"),
        (b'{"text": "[MASK]", "top_k": 1e999}', "'top_k' is Infinity"),
        (b'{"text": "a", "text": "b"}', "the key 'text' is there more than once"),
        (b'\xef\xbb\xbf{"text": "a"}', "is not JSON"),
    ],
)
def test_a_body_that_is_not_json_is_refused_with_the_reason(body: bytes | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(body)


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "\ud800" * 999])
def test_another_content_type_is_refused(content_type: str | None) -> None:
    with pytest.raises(UnsupportedType, match="content type"):
        parse(b"{}", content_type)


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=9).map(
        json.dumps
    )
)
def test_any_body_is_a_request_or_a_usage_error(body: bytes | str) -> None:
    try:
        assert parse(body).items
    except UsageError as error:
        str(error).encode()


def test_parameters_and_case_of_the_content_type_do_not_matter() -> None:
    assert parse(json.dumps(PAIR).encode(), "Application/JSON; charset=UTF-8").items
    with pytest.raises(UsageError, match="no body"):
        parse(b"", None)
    with pytest.raises(UnsupportedType):
        parse(b"", "text/plain")


def test_errors_have_the_status_of_the_api() -> None:
    assert http_status(UnsupportedType("x")) == 415
    assert http_status(UsageError("x")) == 400
    assert http_status(DataError("x")) == 500


def test_it_needs_no_torch() -> None:
    code = "import sys, babybert.serving.request_schema; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
