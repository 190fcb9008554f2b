"""How a checkpoint reads a text: tokens, segments and attention; the score of each token; the neighbours of a word.

Shapes: T positions, L layers, B texts, H heads.
"""

from typing import Any

import torch

from babybert.config import LookConfig
from babybert.data.tokenizer import UNK
from babybert.errors import UsageError
from babybert.evaluation.look import attention_weights, encode, neighbours
from babybert.evaluation.preference import compare_sentences, verdict
from babybert.serving.predictor import Predictor
from babybert.serving.request_schema import NextSentence, quoted

MAX_MAP_POSITIONS = 64  # of a heat map: nobody reads more than 4,096 cells
MAX_SCORED_TOKENS = 64  # of a sentence: each token takes a pass of the model
NEIGHBOUR_CANDIDATES = LookConfig().among  # neighbours are searched among so many of the most frequent tokens


def model_facts(predictor: Predictor) -> dict[str, Any]:
    """The sizes of the model that the page names."""
    sizes = predictor.model.config
    return {
        "vocab_size": sizes.vocab_size,
        "width": sizes.width,
        "layers": sizes.layers,
        "heads": sizes.heads,
        "max_positions": sizes.max_positions,
        "tokenizer": predictor.tokenizer.kind,
        "among": NEIGHBOUR_CANDIDATES,
    }


def inspect_text(predictor: Predictor, sentence_a: Any, sentence_b: Any, layer: Any, head: Any) -> dict[str, Any]:
    """Tokens of `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`, and the attention (T, T) of one head.

    `layer` and `head` count from 0. If the text has more than MAX_MAP_POSITIONS tokens, "attention" is None and
    "reason" says why. Raises UsageError.
    """
    _require_texts(sentence_a, sentence_b)
    _require_index("layer", layer, predictor.model.config.layers)
    _require_index("head", head, predictor.model.config.heads)
    if sentence_b.strip():
        sentences = [sentence_a, sentence_b]
        encoded = predictor.encode(NextSentence(sentence_a, sentence_b))
        ids_1T = torch.tensor([encoded.ids])
        segments_1T = torch.tensor([encoded.segments])
    else:
        sentences = [sentence_a]
        ids_1T, segments_1T = encode(predictor.model, predictor.tokenizer, sentence_a)
    tokens = _describe_tokens(predictor, sentences, ids_1T[0].tolist(), segments_1T[0].tolist())
    result: dict[str, Any] = {"tokens": tokens, "layer": layer, "head": head, "attention": None, "reason": ""}
    if len(tokens) > MAX_MAP_POSITIONS:
        result["reason"] = (
            f"the text is {len(tokens)} tokens long, [CLS] and [SEP] included; "
            f"attention is drawn for up to {MAX_MAP_POSITIONS}: shorten it"
        )
        return result
    weights_LBHTT = attention_weights(predictor.model, ids_1T, segments_1T)
    weights_TT = weights_LBHTT[layer, 0, head]
    result["attention"] = [[round(weight, 4) for weight in row] for row in weights_TT.tolist()]
    return result


def nearest_words(predictor: Predictor, word: Any) -> dict[str, Any]:
    """The nearest neighbours of one word by its token embedding. Raises UsageError."""
    _require_texts(word)
    (result,) = neighbours(predictor.model, predictor.tokenizer, (word,), NEIGHBOUR_CANDIDATES)
    return result


def preferred_sentence(predictor: Predictor, sentence_a: Any, sentence_b: Any) -> dict[str, Any]:
    """The comparison of two sentences by `compare_sentences`, and its `verdict` in words. Raises UsageError."""
    _require_texts(sentence_a, sentence_b)
    comparison = compare_sentences(predictor.model, predictor.tokenizer, sentence_a, sentence_b, MAX_SCORED_TOKENS)
    return {**comparison, "verdict": verdict(comparison)}


def _describe_tokens(
    predictor: Predictor, sentences: list[str], ids: list[int], segments: list[int]
) -> list[dict[str, Any]]:
    """Each token with its id, its segment and the part of the text that it was made from ("" for [CLS] and [SEP])."""
    sources = []
    for sentence in sentences:
        sources += ["", *predictor.tokenizer.sources(sentence)]
    sources.append("")
    return [
        {
            "token": predictor.tokenizer.token(token_id),
            "id": token_id,
            "segment": segment,
            "source": source,
            "unknown": token_id == UNK,
        }
        for token_id, segment, source in zip(ids, segments, sources, strict=True)
    ]


def _require_texts(first: Any, *others: Any) -> None:
    if not all(isinstance(text, str) for text in (first, *others)):
        raise UsageError("each text must be a string")
    if not first.strip():
        raise UsageError("the text is empty")


def _require_index(name: str, value: Any, count: int) -> None:
    if type(value) is not int or not 0 <= value < count:  # `type`, because a bool is an int
        raise UsageError(f"'{name}' is {quoted(value)}; it must be a whole number from 0 to {count - 1}")
