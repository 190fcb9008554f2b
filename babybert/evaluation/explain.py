"""`babybert explain "A" "B"`: one example from two sentences to the two losses, with every number in between.

The example is made by the functions that `prepare` and training use. The losses are worked out here from the logits,
step by step in fp64, so that a reader can check them with a pocket calculator; a test holds them to be what
`objectives.py` gives.

Shapes: T positions, N chosen positions, D width, V vocabulary.
"""

import io
import math
import shutil
from typing import Any

import numpy as np
import torch
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from babybert.config import model_config
from babybert.data.basic_english import BasicEnglishTokenizer
from babybert.data.masking import mask_tokens
from babybert.data.pairs import Pairs, assemble
from babybert.data.sentences import Sentences, TokenizedDocuments
from babybert.data.tokenizer import FIRST_ORDINARY, MASK, Tokenizer
from babybert.errors import UsageError
from babybert.model.bert import BabyBert
from babybert.serving.predictor import NextSentence

LIKELIEST = 3
WIDTH = 100  # of the text, where there is no terminal to ask
NARROWEST = 78  # the numbers of a table need as much
SHORTEST = 9  # of a column of words that has to be narrow


def untrained(sentence_a: str, sentence_b: str, seed: int) -> tuple[BabyBert, Tokenizer]:
    """A model of the reference's sizes with random weights, and a vocabulary of just these sentences' words."""
    NextSentence(sentence_a, sentence_b)  # it refuses what is no text
    words = BasicEnglishTokenizer()
    for sentence in (sentence_a, sentence_b):
        words.add(sentence)
    tokenizer = words.finish(min_frequency=1, vocab_size=None)[0]
    if tokenizer.size == FIRST_ORDINARY:
        raise UsageError("the sentences have no words in them")
    torch.manual_seed(seed)
    return BabyBert(model_config("baby", tokenizer.size)), tokenizer


def make_example(
    tokenizer: Tokenizer, sentence_a: str, sentence_b: str, max_positions: int, seed: int
) -> tuple[np.ndarray, ...]:
    """Original ids, segments, ids after masking and labels of `[CLS] A [SEP] B [SEP]` (T each). Raises UsageError."""
    NextSentence(sentence_a, sentence_b)
    encoded = tokenizer.encode_documents([sentence_a, sentence_b])
    for name, ids in zip(("sentence_a", "sentence_b"), encoded, strict=True):
        if not len(ids):
            raise UsageError(f"'{name}' has no words in it")
    offsets = np.array([0, len(encoded[0]), len(encoded[0]) + len(encoded[1])])
    corpus = TokenizedDocuments(np.concatenate(encoded), offsets, np.arange(2))
    sentences = Sentences(offsets[:-1], offsets[1:], np.arange(2), np.arange(2))
    ids, segments, ends = assemble(
        corpus, sentences, Pairs(np.array([0]), np.array([1]), np.ones(1, np.int8)), max_positions
    )
    masked, labels = mask_tokens(ids, ends, tokenizer.size, seed, 0, np.zeros(1, np.int64))
    return ids, segments, masked, labels


@torch.inference_mode()
def explain(
    model: BabyBert, tokenizer: Tokenizer, sentence_a: str, sentence_b: str, is_next: bool, seed: int
) -> dict[str, Any]:
    """The example and its losses, as JSON has them. Raises UsageError for a sentence without words."""
    ids, segments, masked, labels = make_example(tokenizer, sentence_a, sentence_b, model.config.max_positions, seed)
    model = model.eval().set_kernels("plain")
    hidden_BTD = model(
        torch.from_numpy(masked.astype(np.int64))[None], torch.from_numpy(segments.astype(np.int64))[None]
    )
    chosen = np.flatnonzero(labels)
    logits_NV = model.mlm_logits(hidden_BTD[0, chosen]).double()
    targets = [
        _target(int(t), int(labels[t]), logits_V, tokenizer) for t, logits_V in zip(chosen, logits_NV, strict=True)
    ]
    mlm_loss = -math.fsum(target["log_probability"] for target in targets) / max(len(targets), 1)
    next_sentence = _next_sentence(model.nsp_logits(hidden_BTD)[0].double().tolist(), is_next)
    return {
        "sentence_a": sentence_a,
        "sentence_b": sentence_b,
        "vocabulary": tokenizer.size,
        "seed": seed,
        "tokens": [_token(t, tokenizer, ids, segments, masked, labels) for t in range(len(ids))],
        "targets": targets,
        "mlm_loss": mlm_loss,
        "next_sentence": next_sentence,
        "nsp_loss": next_sentence["loss"],
        "loss": mlm_loss + next_sentence["loss"],
    }


def _token(
    t: int, tokenizer: Tokenizer, ids: np.ndarray, segments: np.ndarray, masked: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
    fate = "" if not labels[t] else "masked" if masked[t] == MASK else "kept" if masked[t] == ids[t] else "other word"
    return {
        "position": t,
        "segment": int(segments[t]),
        "token": tokenizer.token(int(ids[t])),
        "id": int(ids[t]),
        "chosen": bool(labels[t]),
        "fate": fate,
        "input": tokenizer.token(int(masked[t])),
        "input_id": int(masked[t]),
        "label": int(labels[t]),
    }


def _target(position: int, target: int, logits_V: torch.Tensor, tokenizer: Tokenizer) -> dict[str, Any]:
    logit, log_sum = logits_V[target].item(), logits_V.logsumexp(0).item()
    best = logits_V.topk(min(LIKELIEST, len(logits_V))).indices.tolist()
    return {
        "position": position,
        "target": tokenizer.token(target),
        "target_id": target,
        "logit": logit,
        "log_sum_exp": log_sum,
        "log_probability": logit - log_sum,
        "probability": math.exp(logit - log_sum),
        "rank": int((logits_V > logits_V[target]).sum()) + 1,
        "likeliest": [tokenizer.token(word) for word in best],
    }


def _next_sentence(logits: list[float], is_next: bool) -> dict[str, Any]:
    top = max(logits)
    exponentials = [math.exp(logit - top) for logit in logits]
    probabilities = [value / sum(exponentials) for value in exponentials]
    log_sum = top + math.log(sum(exponentials))
    return {
        "is_next": int(is_next),
        "logits": logits,
        "log_sum_exp": log_sum,
        "probabilities": probabilities,
        "loss": log_sum - logits[is_next],
    }


def show(found: dict[str, Any], whose: str, width: int | None = None) -> str:
    """The explanation as text, wrapped to the terminal (or to `width`)."""
    output = io.StringIO()
    console = Console(
        file=output,
        width=max(NARROWEST, width or shutil.get_terminal_size((WIDTH, 24)).columns),
        highlight=False,
        color_system=None,
    )

    def say(text: str) -> None:
        console.print(Text(text))

    say(f"Model: {whose}. Vocabulary: {found['vocabulary']:,} tokens.")
    say("\n1. Tokens. [CLS] A [SEP] is segment 1, B [SEP] is segment 2. Each position has its own sines and cosines.")
    say(
        f"2. Masks (seed {found['seed']}). 15% of the words are chosen; of those 80% become [MASK], 10% another word, 10% stay. The label is the original id.\n"
    )
    columns = ("position", "segment", "token", "id", "chosen", "input", "its id", "label")
    rows = [
        (*(str(t[key]) for key in ("position", "segment", "token", "id", "fate", "input", "input_id")), str(t["label"]))
        for t in found["tokens"]
    ]
    _print_table(console, columns, rows, text_columns=("token", "chosen", "input"))
    say(
        f"\n3. Masked language model. At each chosen position the model gives every one of the {found['vocabulary']:,} tokens a logit z."
    )
    say("   ln p(target) = z(target) - ln(sum of e^z)\n")
    columns = ("position", "target", "z(target)", "ln(sum e^z)", "ln p", "p", "rank", "likeliest")
    rows = [
        (
            str(t["position"]),
            t["target"],
            *(f"{t[key]:.4f}" for key in ("logit", "log_sum_exp", "log_probability")),
            f"{t['probability']:.3g}",
            f"{t['rank']:,}",
            " ".join(t["likeliest"]),
        )
        for t in found["targets"]
    ]
    if rows:
        _print_table(console, columns, rows, text_columns=("target", "likeliest"))
        terms = " + ".join(f"{-t['log_probability']:.4f}" for t in found["targets"])
        say(f"\n   MLM loss = mean of -ln p = ({terms}) / {len(rows)} = {found['mlm_loss']:.4f}")
    else:
        say("   No word of these sentences is in the vocabulary: nothing is chosen, and the loss is 0.")
    _show_next_sentence(say, found["next_sentence"])
    say(f"\n5. The objective is the sum: {found['mlm_loss']:.4f} + {found['nsp_loss']:.4f} = {found['loss']:.4f} nats.")
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def _show_next_sentence(say: Any, answer: dict[str, Any]) -> None:
    (z0, z1), (p0, p1), truth = answer["logits"], answer["probabilities"], answer["is_next"]
    log_sum = f"{answer['log_sum_exp']:.4f}"
    say(
        '\n4. Next sentence. From the state at [CLS] come two logits; is_next 1 is "B follows A" (Google\'s BERT has it the other way round).\n'
    )
    say(f"   z(0) = {z0:.4f}, z(1) = {z1:.4f}, ln(e^z(0) + e^z(1)) = {log_sum}")
    say(f"   p(0) = e^({z0:.4f} - {log_sum}) = {p0:.4f}, p(1) = {p1:.4f}")
    say(
        f"   The label is {truth}: NSP loss = -ln p({truth}) = {log_sum} - ({answer['logits'][truth]:.4f}) = {answer['loss']:.4f}"
    )


def _print_table(
    console: Console, columns: tuple[str, ...], rows: list[tuple[str, ...]], text_columns: tuple[str, ...]
) -> None:
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        text, longest = name in text_columns, max((cell_len(row[number]) for row in rows), default=0)
        # BasicEnglishTokenizer are broken where they must be; numbers never are.
        table.add_column(
            name,
            justify="left" if text else "right",
            overflow="fold",
            no_wrap=not text,
            min_width=max(cell_len(name), min(longest, SHORTEST)) if text else longest,
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(Padding(table, (0, 0, 0, 3)))
