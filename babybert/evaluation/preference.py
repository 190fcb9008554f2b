"""Which of two sentences a model prefers, and where: `babybert explain "A" "B" --preference`, and the playground.

The sentences are two versions of one, such as a minimal pair of BLiMP. Each is read alone. Its score is its
pseudo-log-likelihood, in the within-word variant (`pseudo_log_likelihood.py`), which is a sum over its tokens.
"""

import math
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from babybert.data.tokenizer import UNK, Tokenizer
from babybert.errors import UsageError
from babybert.evaluation.look import encode
from babybert.evaluation.pseudo_log_likelihood import score_sentences
from babybert.model.bert import BabyBert
from babybert.serving.request_schema import require_text
from babybert.tables import format_table

NAMES = ("a", "b")


def compare_sentences(
    model: BabyBert, tokenizer: Tokenizer, sentence_a: str, sentence_b: str, most_tokens: int | None = None
) -> dict[str, Any]:
    """The score of each token of both sentences, their sums, and the `preferred` sentence: "a", "b" or None.

    `other` of a token is its score in the other sentence, if it is there as well at a corresponding place. Raises
    UsageError for a sentence that has no words, has special tokens such as `[MASK]`, is too long for the model, or has
    more than `most_tokens` tokens.
    """
    texts = (sentence_a, sentence_b)
    ids = [_encode(model, tokenizer, name, text, most_tokens) for name, text in zip(NAMES, texts, strict=True)]
    device = next(model.parameters()).device
    arrays = [np.array(of_sentence) for of_sentence in ids]
    scores = score_sentences(model, arrays, tokenizer.continuation_flags(), device, show_progress=False)
    sentences: list[dict[str, Any]] = [
        {
            "text": text,
            "score": score.within_word_sum,
            "tokens": [
                {
                    "token": tokenizer.token(token_id),
                    "source": source,
                    "unknown": token_id == UNK,
                    "log_probability": log_probability,
                    "other": None,
                }
                for token_id, source, log_probability in zip(
                    of_sentence, tokenizer.sources(text), score.within_word.tolist(), strict=True
                )
            ],
        }
        for text, of_sentence, score in zip(texts, ids, scores, strict=True)
    ]
    _align(sentences[0]["tokens"], sentences[1]["tokens"])
    a, b = (sentence["score"] for sentence in sentences)
    preferred = None if a == b else NAMES[b > a]
    return {"sentences": sentences, "preferred": preferred, "difference": abs(a - b)}


def _encode(model: BabyBert, tokenizer: Tokenizer, name: str, text: str, most_tokens: int | None) -> list[int]:
    """The ids of a sentence, without `[CLS]` and `[SEP]`. Raises UsageError."""
    require_text(f"sentence_{name}", text)
    special = [token_id for token_id in tokenizer.encode(text) if token_id < UNK]
    if special:
        raise UsageError(f"'sentence_{name}' has the special token {tokenizer.token(special[0])}: replace it by a word")
    try:
        ids_1T, _ = encode(model, tokenizer, text)
    except UsageError as error:
        raise UsageError(f"sentence {name.upper()}: {error}") from error
    ids: list[int] = ids_1T[0, 1:-1].tolist()
    if most_tokens is not None and len(ids) > most_tokens:
        raise UsageError(f"sentence {name.upper()} has {len(ids)} tokens; at most {most_tokens} are scored: shorten it")
    return ids


def _align(tokens_a: list[dict[str, Any]], tokens_b: list[dict[str, Any]]) -> None:
    """Set `other` of the tokens that both sentences have in the same order."""
    names_a, names_b = ([token["token"] for token in tokens] for tokens in (tokens_a, tokens_b))
    for first_a, first_b, size in SequenceMatcher(None, names_a, names_b, autojunk=False).get_matching_blocks():
        for token_a, token_b in zip(
            tokens_a[first_a : first_a + size], tokens_b[first_b : first_b + size], strict=True
        ):
            token_a["other"], token_b["other"] = token_b["log_probability"], token_a["log_probability"]


def format_preference(comparison: dict[str, Any], model_name: str) -> str:
    """The comparison as text: a table for each sentence, and the verdict."""
    sections = [
        f"Model: {model_name}.",
        "Each token is masked in turn; ln p is the logarithm of the probability that the model gives to it. Later\n"
        "pieces of the same word are masked with it. The score of a sentence is the sum of its ln p.",
    ]
    for name, other, sentence in zip("AB", "BA", comparison["sentences"], strict=True):
        title = f"sentence {name}"
        rows = [_row(token) for token in sentence["tokens"]]
        table = format_table((title, "ln p", "p", f"ln p in {other}"), rows, text_headers=(title,))
        sections.append(f"{table}\nscore of {name}: {sentence['score']:.4f}")
    return "\n\n".join([*sections, verdict(comparison)])


def _row(token: dict[str, Any]) -> tuple[str, ...]:
    log_probability, other = token["log_probability"], token["other"]
    name = f"{token['token']} ({token['source']})" if token["unknown"] else token["token"]
    return (
        name,
        f"{log_probability:z.4f}",
        f"{math.exp(log_probability):.3g}",
        "" if other is None else f"{other:z.4f}",
    )


def verdict(comparison: dict[str, Any]) -> str:
    """Which sentence the model prefers, in words."""
    if comparison["preferred"] is None:
        return "The model prefers neither: both have the same score."
    return f"The model prefers {comparison['preferred'].upper()}, by {comparison['difference']:.4f} nats."
