"""Looks into a model: words it puts near each other, what it fills in, and where its attention goes.

None of them is a score; they show what the scores are of. The sentences and the words that would be sensible in them
are fixed, written for film reviews, so that two models can be compared.

Shapes: B texts, T positions, D width, V vocabulary, L layers, H heads, N masks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from babybert.data.tokenizer import CLS, FIRST_ORDINARY, MASK, PAD, SEP, SPECIAL_TOKENS, UNK, Tokenizer
from babybert.errors import UsageError
from babybert.model.bert import BabyBert
from babybert.serving.predictor import FillMask, Predictor

NEIGHBOURS = 6
SHOWN = 5  # of the model's own words at a mask

# Each with words that a reader would accept; the set is ours.
SENTENCES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("this is one of the [MASK] movies i have ever seen .", ("best", "worst", "greatest", "funniest", "finest")),
    ("the acting was [MASK] .", ("good", "great", "bad", "terrible", "awful", "superb", "excellent")),
    ("i did not [MASK] this film at all .", ("like", "enjoy", "understand")),
    ("the film was directed [MASK] a young woman .", ("by",)),
    ("he plays the [MASK] of a small town .", ("sheriff", "mayor", "doctor", "priest", "king")),
    ("she is married [MASK] a rich man .", ("to",)),
    ("it is a complete waste of [MASK] .", ("time", "money", "film", "talent")),
    ("the special [MASK] look cheap .", ("effects",)),
    ("i would [MASK] this movie to anyone .", ("recommend", "show")),
    ("the story takes [MASK] in new york .", ("place",)),
    ("the plot makes no [MASK] .", ("sense",)),
    ("this film is based on a true [MASK] .", ("story", "event")),
    ("i laughed out [MASK] several times .", ("loud",)),
    ("i give it eight out of [MASK] .", ("ten", "10")),
    ("the two of them fall in [MASK] .", ("love",)),
    ("he wants to kill his own [MASK] .", ("brother", "father", "wife", "mother", "son", "sister", "family")),
    ("the main [MASK] is not believable .", ("character", "plot", "story", "actor")),
    ("don ' [MASK] bother to watch it .", ("t",)),
    ("i have read the [MASK] and the film is not as good .", ("book", "novel", "story", "script")),
    (
        "the music , the [MASK] and the acting are all wonderful .",
        ("story", "script", "photography", "cinematography", "direction", "plot", "scenery"),
    ),
)


@torch.inference_mode()
def fill_ins(
    predictor: Predictor, sentences: tuple[tuple[str, tuple[str, ...]], ...] = SENTENCES
) -> list[dict[str, Any]]:
    """For each sentence: what the model would put there, and the rank (from 1) and probability of each sensible word.

    A sensible word that is no token of its own in the vocabulary has rank None.
    """
    found = []
    for text, sensible in sentences:
        probability_V = mask_probabilities(predictor.model, predictor.tokenizer, text)
        best = probability_V.topk(min(SHOWN, len(probability_V))).indices.tolist()
        words = []
        for word in sensible:
            token = predictor.tokenizer.id_of(word)
            rank = None if token is None else int((probability_V > probability_V[token]).sum()) + 1
            words.append(
                {
                    "word": word,
                    "rank": rank,
                    "probability": None if token is None else probability_V[token].item(),
                    "vocabulary_place": token,
                }
            )
        found.append({"text": text, "fills": predictor.tokenizer.tokens(best), "sensible": words})
    return found


def mask_probabilities(model: BabyBert, tokenizer: Tokenizer, text: str) -> Tensor:
    """What the model gives each word (V, fp32) at the first `[MASK]` of a text. Raises UsageError."""
    FillMask(text)
    ids_1T, segments_1T = encode(model, tokenizer, text)
    hidden_1TD = model(ids_1T, segments_1T)
    position = (ids_1T[0] == MASK).nonzero()[0, 0]
    return model.mlm_logits(hidden_1TD[0, position : position + 1])[0].float().softmax(0)


def encode(model: BabyBert, tokenizer: Tokenizer, text: str) -> tuple[Tensor, Tensor]:
    """Ids and segments (1, T) of `[CLS] text [SEP]`. Raises UsageError for a text that is empty or too long."""
    tokens = tokenizer.encode(text)
    if not tokens:
        raise UsageError("the text has no words in it")
    ids_1T = torch.tensor([[CLS, *tokens, SEP]])
    if ids_1T.shape[1] > model.config.max_positions:
        raise UsageError(
            f"the text is {ids_1T.shape[1]} tokens long, [CLS] and [SEP] included; the model takes at most {model.config.max_positions}: shorten it"
        )
    return ids_1T, torch.ones_like(ids_1T)


@torch.inference_mode()
def neighbours(model: BabyBert, tokenizer: Tokenizer, words: tuple[str, ...], among: int) -> list[dict[str, Any]]:
    """The tokens whose input vectors point most nearly where each word's does (cosine), among the vocabulary's first `among`.

    Vocabularies of words are in the order of frequency: rare words, whose vectors have hardly moved, are left out so.
    A word that the vocabulary lacks has none.
    """
    table_VD = F.normalize(model.embedding.token_embedding.embedding.weight.float(), dim=1)
    last = min(FIRST_ORDINARY + among, len(table_VD))
    found = []
    for word in words:
        tokens = tokenizer.encode(word)
        if len(tokens) != 1 or tokens[0] == UNK:
            found.append({"word": word, "known": False, "neighbours": []})
            continue
        cosine_V = table_VD[FIRST_ORDINARY:last] @ table_VD[tokens[0]]
        best = cosine_V.topk(min(NEIGHBOURS + 1, len(cosine_V)))
        near = [
            {"word": tokenizer.token(index + FIRST_ORDINARY), "cosine": cosine}
            for index, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if index + FIRST_ORDINARY != tokens[0]
        ]
        found.append({"word": word, "known": True, "neighbours": near[:NEIGHBOURS]})
    return found


@torch.inference_mode()
def attention_weights(model: BabyBert, ids_BT: Tensor, segments_BT: Tensor) -> Tensor:
    """How much each position looks at each other one: (L, B, H, T, T), rows sum to one, in evaluation mode.

    The layers run one after the other in PyTorch's own form, which gives the weights when it is asked for them.
    """
    assert not model.training
    padding_BT = ids_BT == PAD
    x_BTD = model.embedding(ids_BT, segments_BT, torch.arange(ids_BT.shape[1], device=ids_BT.device))
    weights = []
    for layer in model.encoder.layers:
        _, own = layer.self_attn(
            x_BTD, x_BTD, x_BTD, key_padding_mask=padding_BT, need_weights=True, average_attn_weights=False
        )
        weights.append(own)
        x_BTD = layer(x_BTD, src_key_padding_mask=padding_BT)
    return torch.stack(weights)


def look(predictor: Predictor, words: tuple[str, ...], among: int) -> dict[str, Any]:
    """Fill-ins and neighbours, as JSON has them."""
    fills = fill_ins(predictor)
    best = [min((word["rank"] for word in fill["sensible"] if word["rank"]), default=None) for fill in fills]
    known = sorted(rank for rank in best if rank)
    return {
        "sentences": len(fills),
        "sensible_first": sum(rank == 1 for rank in known),
        "sensible_in_10": sum(rank <= 10 for rank in known),
        "median_best_rank": known[len(known) // 2] if known else None,
        "ordered_by_frequency": predictor.tokenizer.kind == "basic-english",
        "fill_ins": fills,
        "neighbours": neighbours(predictor.model, predictor.tokenizer, words, among),
    }


def show(found: dict[str, Any]) -> str:
    """The looks for people."""
    lines = [
        f"fill-ins: a sensible word comes first in {found['sensible_first']} of {found['sentences']} sentences, among the first ten in {found['sensible_in_10']};"
        f" the median of the best ranks is {found['median_best_rank']}"
    ]
    if found["ordered_by_frequency"]:
        lines.append("In brackets: the rank that the word's frequency alone would give it.")
    for fill in found["fill_ins"]:
        words = [_sensible(word, found["ordered_by_frequency"]) for word in fill["sensible"]]
        lines += [
            "",
            f"  {fill['text']}",
            f"    the model:  {' '.join(fill['fills'])}",
            f"    sensible:   {', '.join(words)}",
        ]
    lines += ["", "nearest token vectors (cosine):"]
    for entry in found["neighbours"]:
        near = (
            ", ".join(f"{near['word']} {near['cosine']:.2f}" for near in entry["neighbours"])
            if entry["known"]
            else "not one token of the vocabulary"
        )
        lines.append(f"  {entry['word']:<12}{near}")
    return "\n".join(lines)


def _sensible(word: dict[str, Any], ordered: bool) -> str:
    if word["rank"] is None:
        return f"{word['word']}: not in the vocabulary"
    by_frequency = f" ({word['vocabulary_place'] - len(SPECIAL_TOKENS) + 1:,})" if ordered else ""
    return f"{word['word']} {word['rank']:,}{by_frequency}"
