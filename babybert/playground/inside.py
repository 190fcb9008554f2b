"""What a checkpoint does with a text on its way in: tokens, segments, attention, and the neighbours of a word.

Shapes: T positions, L layers, H heads.
"""

from typing import Any

import torch

from babybert.config import LookConfig
from babybert.data.tokenizer import UNK
from babybert.errors import UsageError
from babybert.evaluation.look import attention_weights, encode, neighbours
from babybert.serving.predictor import Predictor
from babybert.serving.request_schema import NextSentence, shown

MOST_POSITIONS = 64  # of a heat map: 4,096 cells are as many as anybody reads
AMONG = LookConfig().among


def facts(predictor: Predictor) -> dict[str, Any]:
    """The sizes that a page names."""
    sizes = predictor.model.config
    names = ("vocab_size", "width", "layers", "heads", "max_positions")
    return {**{name: getattr(sizes, name) for name in names}, "tokenizer": predictor.tokenizer.kind, "among": AMONG}


def look_inside(predictor: Predictor, sentence_a: Any, sentence_b: Any, layer: Any, head: Any) -> dict[str, Any]:
    """Tokens of `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`, and the attention (T, T) of one head, counted from 0.

    A text of more than MOST_POSITIONS has no attention, but a line that says why. Raises UsageError.
    """
    _require_texts(sentence_a, sentence_b)
    for name, value, count in (
        ("layer", layer, predictor.model.config.layers),
        ("head", head, predictor.model.config.heads),
    ):
        if type(value) is not int or not 0 <= value < count:
            raise UsageError(f"'{name}' is {shown(value)}; it must be a whole number from 0 to {count - 1}")
    tokenizer, parts = predictor.tokenizer, [sentence_a]
    if sentence_b.strip():
        parts.append(sentence_b)
        encoded = predictor.encode(NextSentence(sentence_a, sentence_b))
        ids_1T, segments_1T = torch.tensor([encoded.ids]), torch.tensor([encoded.segments])
    else:
        ids_1T, segments_1T = encode(predictor.model, tokenizer, sentence_a)
    sources = [source for part in parts for source in ("", *tokenizer.sources(part))] + [""]
    rows = zip(ids_1T[0].tolist(), segments_1T[0].tolist(), sources, strict=True)
    tokens = [
        {"token": tokenizer.token(i), "id": i, "segment": segment, "source": source, "unknown": i == UNK}
        for i, segment, source in rows
    ]
    found: dict[str, Any] = {"tokens": tokens, "layer": layer, "head": head, "attention": None, "reason": ""}
    if len(tokens) > MOST_POSITIONS:
        found["reason"] = (
            f"the text is {len(tokens)} tokens long, [CLS] and [SEP] included; attention is drawn for up to {MOST_POSITIONS}: shorten it"
        )
    else:
        weights_LBHTT = attention_weights(predictor.model, ids_1T, segments_1T)
        found["attention"] = [[round(weight, 4) for weight in row] for row in weights_LBHTT[layer, 0, head].tolist()]
    return found


def near(predictor: Predictor, word: Any) -> dict[str, Any]:
    """The nearest neighbours of one word. Raises UsageError."""
    _require_texts(word, "")
    (found,) = neighbours(predictor.model, predictor.tokenizer, (word,), AMONG)
    return found


def _require_texts(*texts: Any) -> None:
    if not all(isinstance(text, str) for text in texts):
        raise UsageError("each text must be a string")
    if not texts[0].strip():
        raise UsageError("the text is empty")
