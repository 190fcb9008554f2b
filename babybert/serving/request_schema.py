"""What may be asked of a model, and the reading of it from JSON: every limit, every refusal, no PyTorch.

A request is one HTTP body. It holds one item or a list of them; an item is one text with `[MASK]`s or one pair of
sentences. A request is refused as a whole, with one line that says which part is wrong, what came and what the limit
is. Whether a text fits the model is for the predictor to say, since only its tokenizer knows.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from babybert.errors import UsageError

MAX_BODY_BYTES = 1_000_000  # TorchServe is told the same, and refuses a longer one before we see it
MAX_CHARACTERS = 10_000  # of one text or sentence; 512 tokens of English are about 2,500
MAX_ITEMS = 32  # texts or pairs of one request
MAX_MASKS = 32  # of all texts of one request
MAX_TOP_K = 100
MAX_TARGETS = 100
MAX_ANSWER_CHARACTERS = 1_000_000  # candidates x characters of their text: each candidate repeats its text
DEFAULT_TOP_K = 5

FILL_MASK, NEXT_SENTENCE, UNKNOWN = "fill-mask", "next-sentence", "unknown"
SHOWN = 60  # characters of what came that a message repeats


class UnsupportedType(UsageError):
    """The body is not JSON by its own word: 415 over HTTP."""


@dataclass(frozen=True)
class FillMask:
    """Which words fit at each `[MASK]` of `text`? `name` is what messages call it."""

    text: str
    top_k: int = DEFAULT_TOP_K
    targets: tuple[str, ...] | None = None  # only these words are scored
    truncate: bool = False  # cut what is too long for the model
    pipeline: bool = False  # answer as Hugging Face's fill-mask pipeline does
    name: str = "text"

    def __post_init__(self) -> None:
        _require_text(self.name, self.text)
        if "[MASK]" not in self.text:
            raise UsageError(
                f"'{self.name}' has no [MASK]; put one where a word is to be found, as in \"the movie was [MASK].\""
            )
        if type(self.top_k) is not int or not 1 <= self.top_k <= MAX_TOP_K:
            raise UsageError(f"'top_k' is {shown(self.top_k)}; it must be a whole number from 1 to {MAX_TOP_K}")
        _require_flag("truncate", self.truncate)

    @property
    def candidates(self) -> int:
        """How many there are at each mask, at most."""
        return self.top_k if self.targets is None else min(self.top_k, len(self.targets))


@dataclass(frozen=True)
class NextSentence:
    """Does `sentence_b` follow `sentence_a`? `prefix` goes before their names in messages."""

    sentence_a: str
    sentence_b: str
    truncate: bool = False
    prefix: str = ""

    def __post_init__(self) -> None:
        _require_text(f"{self.prefix}sentence_a", self.sentence_a)
        _require_text(f"{self.prefix}sentence_b", self.sentence_b)
        _require_flag("truncate", self.truncate)


Item = FillMask | NextSentence


@dataclass(frozen=True)
class Request:
    """One body: its items, and whether the answer is that of its only item or a list of answers."""

    task: str
    items: list[Item]
    single: bool


def parse(body: bytes | str | None, content_type: str | None = "application/json") -> Request:
    """The request in an HTTP body. Raises UnsupportedType, or UsageError that says what is wrong with it."""
    kind = (content_type or "").split(";")[0].strip().lower()
    if (kind or body) and kind != "application/json":
        came = f"is {shown(kind)}" if kind else "is missing"
        raise UnsupportedType(
            f"the content type {came}; POST a JSON object with the header 'Content-Type: application/json'"
        )
    if not body:
        raise UsageError("the request has no body; POST a JSON object with the header 'Content-Type: application/json'")
    return parse_object(_read_json(body))


def parse_object(body: Any) -> Request:
    """The request in a parsed JSON body. Raises UsageError."""
    if not isinstance(body, dict):
        raise UsageError(f"the body must be a JSON object, not {_json_type(body)}")
    for key, read in FORMS.items():
        if key in body:
            return read(body)
    raise UsageError(
        "the body has none of 'text' or 'inputs' (fill-mask), 'sentence_a' and 'sentence_b', or 'pairs' (next-sentence)"
    )


def _text_form(body: dict[str, Any]) -> Request:
    """`{"text": str or list of str, "top_k", "targets", "truncate"}`."""
    _require_keys(body, ("text",), ("top_k", "targets", "truncate"))
    return _fill_mask("text", body["text"], body)


def _inputs_form(body: dict[str, Any]) -> Request:
    """Hugging Face's: `{"inputs": str or list of str, "parameters": {"top_k", "targets", "truncate"}}`."""
    _require_keys(body, ("inputs",), ("parameters",))
    settings = body.get("parameters", {})
    if not isinstance(settings, dict):
        raise UsageError(f"'parameters' must be an object, not {_json_type(settings)}")
    _require_keys(settings, (), ("top_k", "targets", "truncate"), "'parameters' takes")
    request = _fill_mask("inputs", body["inputs"], settings, pipeline=True)
    # The pipeline gives a list of one text the answer of that text, not a list of one.
    return request if len(request.items) > 1 else Request(FILL_MASK, request.items, single=True)


def _pair_form(body: dict[str, Any]) -> Request:
    """`{"sentence_a": str, "sentence_b": str, "truncate"}`."""
    _require_keys(body, ("sentence_a", "sentence_b"), ("truncate",))
    return Request(NEXT_SENTENCE, [NextSentence(**body)], single=True)


def _pairs_form(body: dict[str, Any]) -> Request:
    """`{"pairs": list of {"sentence_a", "sentence_b"}, "truncate"}`."""
    _require_keys(body, ("pairs",), ("truncate",))
    items: list[Item] = []
    for number, pair in enumerate(_require_list("pairs", body["pairs"], MAX_ITEMS)):
        if not isinstance(pair, dict):
            raise UsageError(
                f"'pairs[{number}]' must be an object with sentence_a and sentence_b, not {_json_type(pair)}"
            )
        _require_keys(pair, ("sentence_a", "sentence_b"), (), f"'pairs[{number}]' takes")
        items.append(NextSentence(**pair, truncate=body.get("truncate", False), prefix=f"pairs[{number}]."))
    return Request(NEXT_SENTENCE, items, single=False)


FORMS: Mapping[str, Callable[[dict[str, Any]], Request]] = {
    "text": _text_form,
    "inputs": _inputs_form,
    "sentence_a": _pair_form,
    "sentence_b": _pair_form,
    "pairs": _pairs_form,
}


def _fill_mask(name: str, texts: Any, settings: dict[str, Any], pipeline: bool = False) -> Request:
    single = isinstance(texts, str)
    if not single and not isinstance(texts, list):
        raise UsageError(f"'{name}' must be a string or a list of strings, not {_json_type(texts)}")
    common: dict[str, Any] = {key: settings[key] for key in ("top_k", "truncate") if key in settings}
    common |= {"targets": parse_targets(settings["targets"]) if "targets" in settings else None, "pipeline": pipeline}
    named = (
        [(name, texts)]
        if single
        else [(f"{name}[{number}]", text) for number, text in enumerate(_require_list(name, texts, MAX_ITEMS))]
    )
    items: list[FillMask] = [FillMask(text, name=own, **common) for own, text in named]
    masks = [item.text.count("[MASK]") for item in items]
    if sum(masks) > MAX_MASKS:
        raise UsageError(f"'{name}' has {sum(masks)} [MASK]s; at most {MAX_MASKS} are answered in one request")
    size = sum(count * item.candidates * len(item.text) for count, item in zip(masks, items, strict=True))
    if size > MAX_ANSWER_CHARACTERS:
        raise UsageError(
            f"the answer would be too large: masks x top_k x characters of the text is {size:,}, at most {MAX_ANSWER_CHARACTERS:,} are answered in one request"
        )
    return Request(FILL_MASK, list(items), single)


def parse_targets(targets: Any) -> tuple[str, ...]:
    """The words of `targets`, each once. Raises UsageError."""
    words = [targets] if isinstance(targets, str) else targets
    if not isinstance(words, (list, tuple)):
        raise UsageError(f"'targets' must be a list of strings, not {_json_type(targets)}")
    for number, word in enumerate(_require_list("targets", words, MAX_TARGETS)):
        _require_text(f"targets[{number}]", word)
    return tuple(dict.fromkeys(words))


def _read_json(body: bytes | str) -> Any:
    try:
        text = body if isinstance(body, str) else body.decode("utf-8")
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise UsageError(f"the body is not JSON: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise UsageError("the body is not JSON that can be read: it is nested too deeply") from None
    except UsageError:
        raise
    except ValueError:  # Python's own bound on the digits of a whole number
        raise UsageError("the body is not JSON that can be read: a number in it has too many digits") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UsageError(f"the key {shown(twice)} is there more than once")
    return found


def _no_constant(name: str) -> Any:
    raise UsageError(f"the body is not JSON: {name} is not a number in JSON")


def _require_keys(
    body: dict[str, Any], needed: tuple[str, ...], allowed: tuple[str, ...], who: str = "this task takes"
) -> None:
    known = (*needed, *allowed)
    for key in body:
        if key not in known:
            raise UsageError(f"unknown key {shown(key)}; {who} {', '.join(known)}")
    for key in needed:
        if key not in body:
            raise UsageError(f"'{key}' is missing; {who} {', '.join(known)}")


def _require_list(name: str, value: Any, limit: int) -> Any:
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"'{name}' must be a list, not {_json_type(value)}")
    if not value:
        raise UsageError(f"'{name}' is an empty list")
    if len(value) > limit:
        raise UsageError(f"'{name}' is a list of {len(value):,}; at most {limit} are answered in one request")
    return value


def _require_text(name: str, value: Any) -> None:
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


def shown(value: Any) -> str:
    """What came, short and fit for any output: half characters are escaped."""
    text = (
        repr(value)
        if isinstance(value, str)
        else json.dumps(value)
        if isinstance(value, (bool, int, float, type(None)))
        else _json_type(value)
    )
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


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
