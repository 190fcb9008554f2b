"""The request schema of the HTTP API: JSON bodies are parsed and validated here, without PyTorch.

A request is one HTTP body. It holds one item or a list of items. An item is either a text with `[MASK]`s (fill-mask)
or a pair of sentences (next-sentence). A request with an invalid item is refused. The error is one line that says
which value is wrong, what was sent and what the limit is. Whether a text fits into the model is checked by the
predictor, because it depends on the tokenizer.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from babybert.errors import UsageError, UserError

MAX_BODY_BYTES = 1_000_000  # also TorchServe's limit (see torchserve.py), so a longer body never reaches the handler
MAX_CHARACTERS = 10_000  # of one text or sentence; 512 tokens of English are about 2,500 characters
MAX_ITEMS = 32  # texts or pairs of one request
MAX_MASKS = 32  # of all texts of one request
MAX_TOP_K = 100
MAX_TARGETS = 100
MAX_ANSWER_CHARACTERS = 1_000_000  # candidates x characters of their text: each candidate repeats its text
DEFAULT_TOP_K = 5

FILL_MASK, NEXT_SENTENCE, UNKNOWN = "fill-mask", "next-sentence", "unknown"
MAX_QUOTED_CHARACTERS = 60  # of a value from the request that an error message repeats


class UnsupportedType(UsageError):
    """The Content-Type header is not JSON: status 415 over HTTP."""


@dataclass(frozen=True)
class FillMask:
    """A text whose `[MASK]`s are to be filled in. Raises UsageError for invalid values.

    Attributes:
        text: 1 to MAX_CHARACTERS characters with at least one `[MASK]`.
        top_k: candidates for each mask, 1 to MAX_TOP_K.
        targets: score only these words; None scores the whole vocabulary.
        truncate: cut a text that is too long for the model instead of refusing it.
        pipeline: answer in the format of Hugging Face's fill-mask pipeline.
        name: what error messages call the text, such as `text[3]`.
    """

    text: str
    top_k: int = DEFAULT_TOP_K
    targets: tuple[str, ...] | None = None
    truncate: bool = False
    pipeline: bool = False
    name: str = "text"

    def __post_init__(self) -> None:
        require_text(self.name, self.text)
        if "[MASK]" not in self.text:
            raise UsageError(
                f"'{self.name}' has no [MASK]; put one where a word is to be found, as in \"the movie was [MASK].\""
            )
        if type(self.top_k) is not int or not 1 <= self.top_k <= MAX_TOP_K:  # `type`, because a bool is an int
            raise UsageError(f"'top_k' is {quoted(self.top_k)}; it must be a whole number from 1 to {MAX_TOP_K}")
        _require_flag("truncate", self.truncate)

    @property
    def max_candidates(self) -> int:
        """The largest possible number of candidates for each mask."""
        return self.top_k if self.targets is None else min(self.top_k, len(self.targets))


@dataclass(frozen=True)
class NextSentence:
    """Two sentences; the question is whether B follows A. Raises UsageError for invalid values.

    Attributes:
        sentence_a: 1 to MAX_CHARACTERS characters.
        sentence_b: the same.
        truncate: cut a pair that is too long for the model instead of refusing it.
        prefix: goes before the names of the sentences in error messages, such as `pairs[1].`.
    """

    sentence_a: str
    sentence_b: str
    truncate: bool = False
    prefix: str = ""

    def __post_init__(self) -> None:
        require_text(f"{self.prefix}sentence_a", self.sentence_a)
        require_text(f"{self.prefix}sentence_b", self.sentence_b)
        _require_flag("truncate", self.truncate)


Item = FillMask | NextSentence


@dataclass(frozen=True)
class Request:
    """One parsed body.

    Attributes:
        task: FILL_MASK or NEXT_SENTENCE.
        items: at least one item, all of this task.
        single: whether the response is the answer to the only item, or a list of answers.
    """

    task: str
    items: list[Item]
    single: bool


def parse(body: bytes | str | None, content_type: str | None = "application/json") -> Request:
    """Parse an HTTP body. Raises UnsupportedType for another content type, UsageError for an invalid body."""
    media_type = (content_type or "").split(";")[0].strip().lower()
    if (media_type or body) and media_type != "application/json":
        problem = f"is {quoted(media_type)}" if media_type else "is missing"
        raise UnsupportedType(
            f"the content type {problem}; POST a JSON object with the header 'Content-Type: application/json'"
        )
    if not body:
        raise UsageError("the request has no body; POST a JSON object with the header 'Content-Type: application/json'")
    return parse_object(_load_json(body))


def parse_object(body: Any) -> Request:
    """Validate a body that is already parsed as JSON. Raises UsageError."""
    if not isinstance(body, dict):
        raise UsageError(f"the body must be a JSON object, not {_json_type(body)}")
    for key, parse_body in BODY_PARSERS.items():
        if key in body:
            return parse_body(body)
    raise UsageError(
        "the body has none of 'text' or 'inputs' (fill-mask), 'sentence_a' and 'sentence_b', or 'pairs' (next-sentence)"
    )


def _parse_text(body: dict[str, Any]) -> Request:
    """`{"text": str or list of str, "top_k", "targets", "truncate"}`."""
    _require_keys(body, ("text",), ("top_k", "targets", "truncate"))
    return _fill_mask_request("text", body["text"], body)


def _parse_inputs(body: dict[str, Any]) -> Request:
    """Hugging Face's format: `{"inputs": str or list of str, "parameters": {"top_k", "targets", "truncate"}}`."""
    _require_keys(body, ("inputs",), ("parameters",))
    parameters = body.get("parameters", {})
    if not isinstance(parameters, dict):
        raise UsageError(f"'parameters' must be an object, not {_json_type(parameters)}")
    _require_keys(parameters, (), ("top_k", "targets", "truncate"), "'parameters' takes")
    request = _fill_mask_request("inputs", body["inputs"], parameters, pipeline=True)
    if len(request.items) > 1:
        return request
    # The pipeline answers a list of one text as it answers the text alone.
    return Request(FILL_MASK, request.items, single=True)


def _parse_pair(body: dict[str, Any]) -> Request:
    """`{"sentence_a": str, "sentence_b": str, "truncate"}`."""
    _require_keys(body, ("sentence_a", "sentence_b"), ("truncate",))
    return Request(NEXT_SENTENCE, [NextSentence(**body)], single=True)


def _parse_pairs(body: dict[str, Any]) -> Request:
    """`{"pairs": list of {"sentence_a", "sentence_b"}, "truncate"}`."""
    _require_keys(body, ("pairs",), ("truncate",))
    truncate = body.get("truncate", False)
    items: list[Item] = []
    for index, pair in enumerate(_require_list("pairs", body["pairs"], MAX_ITEMS)):
        name = f"pairs[{index}]"
        if not isinstance(pair, dict):
            raise UsageError(f"'{name}' must be an object with sentence_a and sentence_b, not {_json_type(pair)}")
        _require_keys(pair, ("sentence_a", "sentence_b"), (), f"'{name}' takes")
        items.append(NextSentence(**pair, truncate=truncate, prefix=f"{name}."))
    return Request(NEXT_SENTENCE, items, single=False)


# The first of these keys that a body has decides how the body is read.
BODY_PARSERS: Mapping[str, Callable[[dict[str, Any]], Request]] = {
    "text": _parse_text,
    "inputs": _parse_inputs,
    "sentence_a": _parse_pair,
    "sentence_b": _parse_pair,
    "pairs": _parse_pairs,
}


def _fill_mask_request(key: str, texts: Any, options: dict[str, Any], pipeline: bool = False) -> Request:
    """The request for one text or a list of texts; `options` may have `top_k`, `targets` and `truncate`."""
    single = isinstance(texts, str)
    if not single and not isinstance(texts, list):
        raise UsageError(f"'{key}' must be a string or a list of strings, not {_json_type(texts)}")
    settings: dict[str, Any] = {name: options[name] for name in ("top_k", "truncate") if name in options}
    if "targets" in options:
        settings["targets"] = parse_targets(options["targets"])
    if single:
        named_texts = [(key, texts)]
    else:
        named_texts = [(f"{key}[{index}]", text) for index, text in enumerate(_require_list(key, texts, MAX_ITEMS))]
    items = [FillMask(text, name=name, pipeline=pipeline, **settings) for name, text in named_texts]
    _require_answerable(key, items)
    return Request(FILL_MASK, list(items), single)


def _require_answerable(key: str, items: list[FillMask]) -> None:
    """Refuse a request with too many masks, or whose answer would be too large."""
    mask_counts = [item.text.count("[MASK]") for item in items]
    if sum(mask_counts) > MAX_MASKS:
        raise UsageError(f"'{key}' has {sum(mask_counts)} [MASK]s; at most {MAX_MASKS} are answered in one request")
    answer_characters = sum(
        count * item.max_candidates * len(item.text) for count, item in zip(mask_counts, items, strict=True)
    )
    if answer_characters > MAX_ANSWER_CHARACTERS:
        raise UsageError(
            "the answer would be too large: masks x top_k x characters of the text is "
            f"{answer_characters:,}, at most {MAX_ANSWER_CHARACTERS:,} are answered in one request"
        )


def http_status(error: UserError) -> int:
    """The status of an error over HTTP: 415 or 400 for an invalid request, 500 for damaged weights."""
    if isinstance(error, UnsupportedType):
        return 415
    return 400 if isinstance(error, UsageError) else 500


def parse_targets(targets: Any) -> tuple[str, ...]:
    """The words of `targets` without duplicates. Raises UsageError."""
    words = [targets] if isinstance(targets, str) else targets
    if not isinstance(words, (list, tuple)):
        raise UsageError(f"'targets' must be a list of strings, not {_json_type(targets)}")
    for index, word in enumerate(_require_list("targets", words, MAX_TARGETS)):
        require_text(f"targets[{index}]", word)
    return tuple(dict.fromkeys(words))


def _load_json(body: bytes | str) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or Infinity."""
    try:
        text = body if isinstance(body, str) else body.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise UsageError(f"the body is not JSON: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise UsageError("the body is not JSON that can be read: it is nested too deeply") from None
    except UsageError:
        raise
    except ValueError:  # Python limits the number of digits of an integer (sys.get_int_max_str_digits)
        raise UsageError("the body is not JSON that can be read: a number in it has too many digits") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise UsageError(f"the key {quoted(duplicate)} is there more than once")
    return result


def _refuse_constant(name: str) -> Any:
    raise UsageError(f"the body is not JSON: {name} is not a number in JSON")


def _require_keys(
    body: dict[str, Any], required: tuple[str, ...], optional: tuple[str, ...], intro: str = "this task takes"
) -> None:
    """Refuse unknown and missing keys; `intro` begins the part of the message that lists the valid keys."""
    valid_keys = (*required, *optional)
    for key in body:
        if key not in valid_keys:
            raise UsageError(f"unknown key {quoted(key)}; {intro} {', '.join(valid_keys)}")
    for key in required:
        if key not in body:
            raise UsageError(f"'{key}' is missing; {intro} {', '.join(valid_keys)}")


def _require_list(name: str, value: Any, max_length: int) -> Any:
    """`value`, if it is a list of 1 to `max_length` elements."""
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"'{name}' must be a list, not {_json_type(value)}")
    if not value:
        raise UsageError(f"'{name}' is an empty list")
    if len(value) > max_length:
        raise UsageError(f"'{name}' is a list of {len(value):,}; at most {max_length} are answered in one request")
    return value


def require_text(name: str, value: Any) -> None:
    """Raise UsageError unless `value` is a text that can be tokenized: not empty, not too long, and valid Unicode."""
    if not isinstance(value, str):
        raise UsageError(f"'{name}' must be a string, not {_json_type(value)}")
    if not value or value.isspace():
        raise UsageError(f"'{name}' is empty")
    if len(value) > MAX_CHARACTERS:
        raise UsageError(f"'{name}' is {len(value):,} characters long; at most {MAX_CHARACTERS:,} are read")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"'{name}' has half of a surrogate pair, which is not a character") from None


def _require_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"'{name}' must be true or false, not {_json_type(value)}")


def quoted(value: Any) -> str:
    """A value from a request for an error message: shortened, and with unpaired surrogates escaped."""
    if isinstance(value, str):
        text = repr(value)
    elif value is None or isinstance(value, (bool, int, float)):
        text = json.dumps(value)
    else:
        text = _json_type(value)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= MAX_QUOTED_CHARACTERS else f"{text[:MAX_QUOTED_CHARACTERS]}..."


def _json_type(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), "that")
