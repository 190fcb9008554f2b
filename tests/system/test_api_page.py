"""docs/api.md and handler/openapi.yaml agree with the server: examples are run, limits are compared with the code."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from served import ServedModel

from babybert.serving import request_schema

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(r"```(sh|python)\n(.*?)```\n+```json\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)


def shape(value: Any) -> Any:
    """The keys, list lengths and types of an answer."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return [shape(item) for item in value] if isinstance(value, list) else type(value)


@pytest.mark.parametrize(("language", "code", "shown"), EXAMPLES)
def test_an_example_has_an_answer_of_the_documented_shape(
    server: ServedModel, language: str, code: str, shown: str
) -> None:
    code = code.replace("localhost:8080", f"127.0.0.1:{server.inference_port}")
    program = ["bash", "-c", code] if language == "sh" else [sys.executable, "-c", code]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    answer = json.loads(done.stdout)
    assert shape(answer) == shape(json.loads(shown)), done.stderr
    if "error" in answer:
        assert answer == json.loads(shown)


def test_all_examples_were_found() -> None:
    assert len(EXAMPLES) == (ROOT / "docs/api.md").read_text().count("```json") == 6


def test_the_documented_limits_are_those_of_the_code() -> None:
    page = (ROOT / "docs/api.md").read_text()
    document = yaml.safe_load((ROOT / "handler/openapi.yaml").read_text())
    schemas = document["components"]["schemas"]
    assert schemas["TopK"] == {
        **schemas["TopK"],
        "maximum": request_schema.MAX_TOP_K,
        "default": request_schema.DEFAULT_TOP_K,
    }
    assert {schemas[name]["maxLength"] for name in ("MaskedText", "Sentence")} == {request_schema.MAX_CHARACTERS}
    assert schemas["MaskedTexts"]["oneOf"][1]["maxItems"] == request_schema.MAX_ITEMS
    assert schemas["NextSentences"]["properties"]["pairs"]["maxItems"] == request_schema.MAX_ITEMS
    assert schemas["Targets"]["oneOf"][1]["maxItems"] == request_schema.MAX_TARGETS
    assert f"together at most {request_schema.MAX_MASKS}" in schemas["MaskedText"]["description"]
    assert f"{request_schema.MAX_ANSWER_CHARACTERS:,}" in schemas["TopK"]["description"]
    for limit in (request_schema.MAX_CHARACTERS, request_schema.MAX_BODY_BYTES, request_schema.MAX_ANSWER_CHARACTERS):
        assert f"{limit:,}" in page
    assert f"{request_schema.MAX_ITEMS} texts, {request_schema.MAX_MASKS} `[MASK]`s" in page
    assert f"1 to {request_schema.MAX_TOP_K}" in page
