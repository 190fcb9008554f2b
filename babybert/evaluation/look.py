"""Looks into a model: what it fills in, which words its token embeddings hold for similar, and where it attends.

None of this is a score; it shows what stands behind the scores. The sentences, and the words that are sensible in them,
are fixed and written for film reviews, so that two models can be compared.

Shapes: B texts, T positions, D width, V vocabulary, L layers, H heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from babybert.data.tokenizer import CLS, FIRST_ORDINARY, MASK, PAD, SEP, UNK, Tokenizer
from babybert.errors import UsageError
from babybert.model.bert import BabyBert
from babybert.serving.request_schema import FillMask, require_text
from babybert.tables import escape_control_characters

NEIGHBOURS = 6  # shown for each word
FILL_INS = 5  # of the model's own words, shown for each mask

# Each sentence has words that a reader would accept at its mask, chosen by hand.
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
    model: BabyBert, tokenizer: Tokenizer, sentences: tuple[tuple[str, tuple[str, ...]], ...] = SENTENCES
) -> list[dict[str, Any]]:
    """For each sentence: the words the model fills in, and the rank (from 1) and probability of each sensible word.

    A sensible word that is not one token of the vocabulary has rank None. Sets the model to evaluation mode and to
    PyTorch's own operations: compiling kernels would take longer than these few sentences.
    """
    model = model.eval().set_kernels("plain")
    results = []
    for text, sensible in sentences:
        probability_V = mask_probabilities(model, tokenizer, text)
        top_ids = probability_V.topk(min(FILL_INS, len(probability_V))).indices.tolist()
        words = [_score_word(word, tokenizer.id_of(word), probability_V) for word in sensible]
        results.append({"text": text, "fills": tokenizer.tokens(top_ids), "sensible": words})
    return results


def _score_word(word: str, token_id: int | None, probability_V: Tensor) -> dict[str, Any]:
    if token_id is None:
        return {"word": word, "rank": None, "probability": None, "vocabulary_place": None}
    return {
        "word": word,
        "rank": int((probability_V > probability_V[token_id]).sum()) + 1,
        "probability": probability_V[token_id].item(),
        "vocabulary_place": token_id,
    }


def mask_probabilities(model: BabyBert, tokenizer: Tokenizer, text: str) -> Tensor:
    """The probability of each word (V, fp32) at the first `[MASK]` of a text. Raises UsageError for a bad text."""
    FillMask(text)  # raises UsageError for a text without [MASK]
    ids_1T, segments_1T = encode(model, tokenizer, text)
    hidden_1TD = model(ids_1T, segments_1T)
    position = (ids_1T[0] == MASK).nonzero()[0, 0]
    return model.mlm_logits(hidden_1TD[0, position : position + 1])[0].float().softmax(0)


def encode(model: BabyBert, tokenizer: Tokenizer, text: str) -> tuple[Tensor, Tensor]:
    """Ids and segments (1, T) of `[CLS] text [SEP]`. Raises UsageError for a text that is empty or too long."""
    require_text("text", text)
    tokens = tokenizer.encode(text)
    if not tokens:
        raise UsageError("the text has no words in it")
    ids_1T = torch.tensor([[CLS, *tokens, SEP]])
    length, limit = ids_1T.shape[1], model.config.max_positions
    if length > limit:
        raise UsageError(
            f"the text is {length} tokens long, [CLS] and [SEP] included; "
            f"the model supports at most {limit}: shorten it"
        )
    return ids_1T, torch.ones_like(ids_1T)


@torch.inference_mode()
def neighbours(model: BabyBert, tokenizer: Tokenizer, words: tuple[str, ...], among: int) -> list[dict[str, Any]]:
    """For each word, the tokens with the most similar embeddings (cosine) among the first `among` ordinary tokens.

    Vocabularies of words are ordered by frequency. A small `among` leaves out rare words, whose embeddings have hardly
    moved since their initialisation. A word that is not one token of the vocabulary has no neighbours.

    Raises UsageError for a word that is not text.
    """
    embedding_VD = F.normalize(model.embedding.token_embedding.embedding.weight.float(), dim=1)
    end = min(FIRST_ORDINARY + among, len(embedding_VD))
    results = []
    for word in words:
        require_text("word", word)
        token_ids = tokenizer.encode(word)
        if len(token_ids) != 1 or token_ids[0] == UNK:
            results.append({"word": word, "known": False, "neighbours": []})
            continue
        cosine_V = embedding_VD[FIRST_ORDINARY:end] @ embedding_VD[token_ids[0]]
        top = cosine_V.topk(min(NEIGHBOURS + 1, len(cosine_V)))  # one more: the word may be its own nearest neighbour
        near = [
            {"word": tokenizer.token(FIRST_ORDINARY + index), "cosine": cosine}
            for index, cosine in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            if FIRST_ORDINARY + index != token_ids[0]
        ]
        results.append({"word": word, "known": True, "neighbours": near[:NEIGHBOURS]})
    return results


@torch.inference_mode()
def attention_weights(model: BabyBert, ids_BT: Tensor, segments_BT: Tensor) -> Tensor:
    """How much each position attends to each other one: (L, B, H, T, T), rows sum to one.

    The model must be in evaluation mode. Its layers run one after the other in PyTorch's own operations, because the
    compiled kernels never hold these weights.
    """
    assert not model.training
    padding_BT = ids_BT == PAD
    x_BTD = model.embedding(ids_BT, segments_BT, torch.arange(ids_BT.shape[1], device=ids_BT.device))
    layer_weights = []
    for layer in model.encoder.layers:
        input_BTD = layer.norm1(x_BTD) if layer.norm_first else x_BTD
        _, weights_BHTT = layer.self_attn(
            input_BTD, input_BTD, input_BTD, key_padding_mask=padding_BT, need_weights=True, average_attn_weights=False
        )
        layer_weights.append(weights_BHTT)
        x_BTD = layer(x_BTD, src_key_padding_mask=padding_BT)
    return torch.stack(layer_weights)


def look(model: BabyBert, tokenizer: Tokenizer, words: tuple[str, ...], among: int) -> dict[str, Any]:
    """Fill-ins of SENTENCES and neighbours of `words`, as `babybert look --json` prints them.

    Sets the model's mode and operations as `fill_ins` does.
    """
    sentences = fill_ins(model, tokenizer)
    best_ranks = []
    for sentence in sentences:
        ranks = [word["rank"] for word in sentence["sensible"] if word["rank"] is not None]
        if ranks:
            best_ranks.append(min(ranks))
    best_ranks.sort()
    return {
        "sentences": len(sentences),
        "sensible_first": sum(rank == 1 for rank in best_ranks),
        "sensible_in_10": sum(rank <= 10 for rank in best_ranks),
        "median_best_rank": best_ranks[len(best_ranks) // 2] if best_ranks else None,
        "ordered_by_frequency": tokenizer.kind == "basic-english",
        "fill_ins": sentences,
        "neighbours": neighbours(model, tokenizer, words, among),
    }


def format_look(results: dict[str, Any]) -> str:
    """The results of `look` as text."""
    ordered_by_frequency = results["ordered_by_frequency"]
    lines = [
        f"fill-ins: a sensible word is ranked first in {results['sensible_first']} of {results['sentences']} "
        f"sentences and among the first ten in {results['sensible_in_10']}; "
        f"the median of the best ranks is {results['median_best_rank']}",
    ]
    if ordered_by_frequency:
        lines.append("In brackets: the word's rank by frequency, which is its rank under the unigram baseline.")
    for sentence in results["fill_ins"]:
        words = [_format_word(word, ordered_by_frequency) for word in sentence["sensible"]]
        lines += [
            "",
            f"  {sentence['text']}",
            f"    the model:  {' '.join(sentence['fills'])}",
            f"    sensible:   {', '.join(words)}",
        ]
    lines += ["", "nearest token embeddings (cosine):"]
    for entry in results["neighbours"]:
        near = [f"{neighbour['word']} {neighbour['cosine']:.2f}" for neighbour in entry["neighbours"]]
        text = ", ".join(near) if entry["known"] else "not one token of the vocabulary"
        lines.append(f"  {entry['word']:<12}{text}")
    return "\n".join(map(escape_control_characters, lines))


def _format_word(word: dict[str, Any], ordered_by_frequency: bool) -> str:
    if word["rank"] is None:
        return f"{word['word']}: not in the vocabulary"
    text = f"{word['word']} {word['rank']:,}"
    if ordered_by_frequency:
        text += f" ({word['vocabulary_place'] - FIRST_ORDINARY + 1:,})"
    return text
