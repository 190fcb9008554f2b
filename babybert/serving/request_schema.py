"""The request schema of the HTTP API: JSON bodies are parsed and validated here, without PyTorch.

A request is one HTTP body. It holds one item or a list of items. An item is either a text with `[MASK]`s (fill-mask)
or a pair of sentences (next-sentence), or, for a fine-tuned model, a text or pair to classify. A request with an
invalid item is refused, and so is a task that the model does not have. The error is one line that says
which value is wrong, what was sent and what the limit is. Whether a text fits into the model is checked by the
predictor, because it depends on the tokenizer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from babybert.config import ClassifierConfig
from babybert.errors import UsageError, UserError

# Re-exported: callers check values of other requests with them.
from babybert.serving.request_values import MAX_CHARACTERS as MAX_CHARACTERS
from babybert.serving.request_values import json_type, load_json, require_flag, require_keys, require_list
from babybert.serving.request_values import quoted as quoted
from babybert.serving.request_values import require_text as require_text

MAX_BODY_BYTES = 1_000_000  # also TorchServe's limit (see torchserve.py), so a longer body never reaches the handler
MAX_ITEMS = 32  # texts or pairs of one request
MAX_MASKS = 32  # of all texts of one request
MAX_TOP_K = 100
MAX_TARGETS = 100
MAX_ANSWER_CHARACTERS = 1_000_000  # candidates x characters of their text: each candidate repeats its text
DEFAULT_TOP_K = 5

FILL_MASK, NEXT_SENTENCE, CLASSIFY, UNKNOWN = "fill-mask", "next-sentence", "classify", "unknown"


NO_CLASSES = "this model is not fine-tuned to classify texts; serve one that `babybert finetune` has trained"
NOT_PRETRAINED = (
    "this model is fine-tuned to classify texts ('classify'); for masks and next sentences, serve the pretrained model"
)


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
        require_flag("truncate", self.truncate)

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
        require_flag("truncate", self.truncate)


@dataclass(frozen=True)
class Classify:
    """A text, or a pair of texts, whose class is asked for. Raises UsageError for invalid values.

    Attributes:
        text: 1 to MAX_CHARACTERS characters.
        pair: the second text; None for a single text.
        truncate: cut a text that is too long for the model, as in training, instead of refusing it.
        pipeline: answer in the format of Hugging Face's text-classification pipeline.
        top_k: for the pipeline, how many classes, the likeliest first; None for all.
        ranked: for the pipeline, answer with a list of classes, as it does if `top_k` is given.
        name: what error messages call the text, such as `classify[3]`.
    """

    text: str
    pair: str | None = None
    truncate: bool = False
    pipeline: bool = False
    top_k: int | None = 1
    ranked: bool = False
    name: str = "classify"

    def __post_init__(self) -> None:
        require_text(self.name if self.pair is None else f"{self.name}[0]", self.text)
        if self.pair is not None:
            require_text(f"{self.name}[1]", self.pair)
        require_flag("truncate", self.truncate)
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise UsageError(f"'top_k' is {quoted(self.top_k)}; it must be a whole number from 1 on, or null for all")


Item = FillMask | NextSentence | Classify


@dataclass(frozen=True)
class Request:
    """One parsed body.

    Attributes:
        task: FILL_MASK, NEXT_SENTENCE or CLASSIFY.
        items: at least one item, all of this task.
        single: whether the response is the answer to the only item, or a list of answers.
    """

    task: str
    items: list[Item]
    single: bool


def parse(
    body: bytes | str | None,
    content_type: str | None = "application/json",
    classifier: ClassifierConfig | None = None,
) -> Request:
    """Parse an HTTP body for a model, which is pretrained only without a `classifier`.

    Raises UnsupportedType for another content type, UsageError for an invalid body.
    """
    media_type = (content_type or "").split(";")[0].strip().lower()
    if (media_type or body) and media_type != "application/json":
        problem = f"is {quoted(media_type)}" if media_type else "is missing"
        raise UnsupportedType(
            f"the content type {problem}; POST a JSON object with the header 'Content-Type: application/json'"
        )
    if not body:
        raise UsageError("the request has no body; POST a JSON object with the header 'Content-Type: application/json'")
    return parse_object(load_json(body), classifier)


def parse_object(body: Any, classifier: ClassifierConfig | None = None) -> Request:
    """Validate a body that is already parsed as JSON. Raises UsageError."""
    if not isinstance(body, dict):
        raise UsageError(f"the body must be a JSON object, not {json_type(body)}")
    parsers = BODY_PARSERS
    if classifier is not None:
        parsers = {"classify": partial(_parse_classify, classifier), "inputs": partial(_parse_classes, classifier)}
    for key, parse_body in parsers.items():
        if key in body:
            return parse_body(body)
    if classifier is not None:
        is_of_pretraining = any(key in body for key in BODY_PARSERS)
        raise UsageError(NOT_PRETRAINED if is_of_pretraining else "the body has none of 'classify' and 'inputs'")
    if "classify" in body:
        raise UsageError(NO_CLASSES)
    raise UsageError(
        "the body has none of 'text' or 'inputs' (fill-mask), 'sentence_a' and 'sentence_b', or 'pairs' (next-sentence)"
    )


def _parse_classify(classifier: ClassifierConfig, body: dict[str, Any]) -> Request:
    """`{"classify": text or list of texts, "truncate"}`. If the model reads pairs, a text is a list of two strings."""
    require_keys(body, ("classify",), ("truncate",))
    values, truncate = body["classify"], body.get("truncate", False)
    if not isinstance(values, (str, list)):
        raise UsageError(f"'classify' must be a string or a list, not {json_type(values)}")
    is_pair = classifier.pairs and isinstance(values, list) and all(isinstance(value, str) for value in values)
    if isinstance(values, str) or (is_pair and values):
        return Request(CLASSIFY, [_text_to_classify("classify", values, classifier, truncate=truncate)], single=True)
    items: list[Item] = [
        _text_to_classify(f"classify[{index}]", value, classifier, truncate=truncate)
        for index, value in enumerate(require_list("classify", values, MAX_ITEMS))
    ]
    return Request(CLASSIFY, items, single=False)


def _parse_classes(classifier: ClassifierConfig, body: dict[str, Any]) -> Request:
    """Hugging Face's format for text classification: `{"inputs": text or list, "parameters": {"top_k", "truncate"}}`.

    A text is a string or, if the model reads pairs, `{"text", "text_pair"}`.
    """
    require_keys(body, ("inputs",), ("parameters",))
    parameters = _parameters(body, ("top_k", "truncate"))
    options = {**parameters, "pipeline": True, "ranked": "top_k" in parameters}
    inputs = body["inputs"]
    if not isinstance(inputs, list):
        item = _text_to_classify("inputs", _without_keys("inputs", inputs), classifier, **options)
        # The pipeline answers a string with a list, unless it was asked for several classes.
        return Request(CLASSIFY, [item], single=isinstance(inputs, dict) or "top_k" in parameters)
    items: list[Item] = [
        _text_to_classify(f"inputs[{index}]", _without_keys(f"inputs[{index}]", value), classifier, **options)
        for index, value in enumerate(require_list("inputs", inputs, MAX_ITEMS))
    ]
    return Request(CLASSIFY, items, single=False)


def _without_keys(name: str, value: Any) -> Any:
    """The texts of `{"text", "text_pair"}` as a list; another value as it is."""
    if not isinstance(value, dict):
        return value
    require_keys(value, ("text",), ("text_pair",), f"'{name}' takes")
    return [value["text"], value["text_pair"]] if "text_pair" in value else value["text"]


def _text_to_classify(name: str, value: Any, classifier: ClassifierConfig, **options: Any) -> Classify:
    """The item of a string or of a list of two strings, whichever the model reads."""
    if not classifier.pairs:
        if isinstance(value, list):
            raise UsageError(f"'{name}' is a list; this model was trained on single texts, so it must be a string")
        return Classify(value, name=name, **options)
    if not isinstance(value, list) or len(value) != 2:
        shown = f"a list of {len(value)}" if isinstance(value, list) else json_type(value)
        raise UsageError(f"'{name}' is {shown}; this model was trained on pairs, so it must be two strings")
    return Classify(value[0], value[1], name=name, **options)


def _parse_text(body: dict[str, Any]) -> Request:
    """`{"text": str or list of str, "top_k", "targets", "truncate"}`."""
    require_keys(body, ("text",), ("top_k", "targets", "truncate"))
    return _fill_mask_request("text", body["text"], body)


def _parse_inputs(body: dict[str, Any]) -> Request:
    """Hugging Face's format: `{"inputs": str or list of str, "parameters": {"top_k", "targets", "truncate"}}`."""
    require_keys(body, ("inputs",), ("parameters",))
    parameters = _parameters(body, ("top_k", "targets", "truncate"))
    request = _fill_mask_request("inputs", body["inputs"], parameters, pipeline=True)
    if len(request.items) > 1:
        return request
    # The pipeline answers a list of one text as it answers the text alone.
    return Request(FILL_MASK, request.items, single=True)


def _parameters(body: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The `parameters` of Hugging Face's format, which may have these names."""
    parameters = body.get("parameters", {})
    if not isinstance(parameters, dict):
        raise UsageError(f"'parameters' must be an object, not {json_type(parameters)}")
    require_keys(parameters, (), names, "'parameters' takes")
    return parameters


def _parse_pair(body: dict[str, Any]) -> Request:
    """`{"sentence_a": str, "sentence_b": str, "truncate"}`."""
    require_keys(body, ("sentence_a", "sentence_b"), ("truncate",))
    return Request(NEXT_SENTENCE, [NextSentence(**body)], single=True)


def _parse_pairs(body: dict[str, Any]) -> Request:
    """`{"pairs": list of {"sentence_a", "sentence_b"}, "truncate"}`."""
    require_keys(body, ("pairs",), ("truncate",))
    truncate = body.get("truncate", False)
    items: list[Item] = []
    for index, pair in enumerate(require_list("pairs", body["pairs"], MAX_ITEMS)):
        name = f"pairs[{index}]"
        if not isinstance(pair, dict):
            raise UsageError(f"'{name}' must be an object with sentence_a and sentence_b, not {json_type(pair)}")
        require_keys(pair, ("sentence_a", "sentence_b"), (), f"'{name}' takes")
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
        raise UsageError(f"'{key}' must be a string or a list of strings, not {json_type(texts)}")
    settings: dict[str, Any] = {name: options[name] for name in ("top_k", "truncate") if name in options}
    if "targets" in options:
        settings["targets"] = parse_targets(options["targets"])
    if single:
        named_texts = [(key, texts)]
    else:
        named_texts = [(f"{key}[{index}]", text) for index, text in enumerate(require_list(key, texts, MAX_ITEMS))]
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
        raise UsageError(f"'targets' must be a list of strings, not {json_type(targets)}")
    for index, word in enumerate(require_list("targets", words, MAX_TARGETS)):
        require_text(f"targets[{index}]", word)
    return tuple(dict.fromkeys(words))
