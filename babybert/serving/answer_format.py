"""The answers of the HTTP API as JSON-ready dicts and lists: our format, and that of Hugging Face's pipeline."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from babybert.data.tokenizer import PAD, Tokenizer
from babybert.serving.item_encoder import EncodedItem
from babybert.serving.request_schema import Classify


class MaskCandidates(NamedTuple):
    """The words for one mask, best first.

    Attributes:
        scores: probability of each word over the whole vocabulary.
        ids: token id of each word.
    """

    scores: list[float]
    ids: list[int]


def format_next_sentence(probability: float) -> dict[str, Any]:
    """`{"is_next", "probability"}`: B follows A from a probability of 0.5."""
    return {"is_next": probability >= 0.5, "probability": probability}


def format_classes(classes: Sequence[str], probabilities: Sequence[float]) -> dict[str, Any]:
    """`{"label", "probability", "probabilities": {label: probability}}`: the likeliest class, and all of them."""
    best = max(range(len(classes)), key=lambda index: probabilities[index])
    return {
        "label": classes[best],
        "probability": probabilities[best],
        "probabilities": dict(zip(classes, probabilities, strict=True)),
    }


def format_class_pipeline(classes: Sequence[str], probabilities: Sequence[float], item: Classify) -> Any:
    """The answer of Hugging Face's TextClassificationPipeline: `{"label", "score"}`, or a list of them."""
    ranked = sorted(zip(classes, probabilities, strict=True), key=lambda entry: -entry[1])
    scored = [{"label": name, "score": score} for name, score in ranked]
    return scored[: item.top_k] if item.ranked else scored[0]


def format_masks(tokenizer: Tokenizer, encoded: EncodedItem, masks: Sequence[MaskCandidates]) -> dict[str, Any]:
    """`{"masks": [{"position", "candidates": [{"token", "id", "score", "sequence"}]}]}` for one text.

    `position` counts the tokens of the text from 0. `sequence` is the text as the model reads it, with the candidate in
    place of its mask; other masks stay `[MASK]`.
    """
    words = tokenizer.tokens(encoded.ids[1:-1])  # without [CLS] and [SEP]
    formatted = []
    for id_position, mask in zip(encoded.mask_positions, masks, strict=True):
        position = id_position - 1  # [CLS] is not counted
        candidates = []
        for score, token_id in zip(mask.scores, mask.ids, strict=True):
            token = tokenizer.token(token_id)
            words[position] = token
            candidates.append({"token": token, "id": token_id, "score": score, "sequence": tokenizer.join(words)})
        words[position] = "[MASK]"
        formatted.append({"position": position, "candidates": candidates})
    return {"masks": formatted}


def format_pipeline(tokenizer: Tokenizer, encoded: EncodedItem, masks: Sequence[MaskCandidates]) -> list[Any]:
    """The answer of Hugging Face's FillMaskPipeline for one text: a list of candidates, or one such list for each mask.

    As there, `sequence` has the special tokens only if the text has several masks.
    """
    formatted = []
    for position, mask in zip(encoded.mask_positions, masks, strict=True):
        candidates = []
        for score, token_id in zip(mask.scores, mask.ids, strict=True):
            ids = [*encoded.ids[:position], token_id, *encoded.ids[position + 1 :]]
            ids = [each_id for each_id in ids if each_id != PAD]  # the pipeline drops a [PAD] in the text as well
            candidates.append(
                {
                    "score": score,
                    "token": token_id,
                    "token_str": tokenizer.decode([token_id]),
                    "sequence": tokenizer.decode(ids, skip_special=len(masks) == 1),
                }
            )
        formatted.append(candidates)
    return formatted[0] if len(formatted) == 1 else formatted
