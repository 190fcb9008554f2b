"""`babybert explain "A" "B"`: one example, from two sentences to the two losses, with every number in between.

The functions that make the example are those of `prepare` and training. The losses are computed here from the logits,
step by step in fp64, so that a reader can check them with a pocket calculator; a test compares them with
`model/loss.py`.

Shapes: T positions, N masked positions, V vocabulary.
"""

import math
import shutil
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from babybert.config import model_config
from babybert.data.basic_english import BasicEnglishTokenizer
from babybert.data.masking import mask_tokens
from babybert.data.pairs import Pairs, assemble
from babybert.data.sentences import Sentences, TokenizedDocuments
from babybert.data.tokenizer import FIRST_ORDINARY, MASK, Tokenizer
from babybert.errors import UsageError
from babybert.model.bert import BabyBert
from babybert.serving.request_schema import NextSentence
from babybert.tables import make_table, plain_console, strip_lines

TOP_WORDS = 3  # shown for each masked position
DEFAULT_WIDTH = 100  # of the text, where there is no terminal
NARROWEST = 78  # the numbers of the tables need as much


class Example(NamedTuple):
    """`[CLS] A [SEP] B [SEP]` before and after masking (T each)."""

    original_ids: np.ndarray
    segments: np.ndarray
    ids: np.ndarray
    labels: np.ndarray


def untrained(sentence_a: str, sentence_b: str, seed: int) -> tuple[BabyBert, Tokenizer]:
    """A model of the reference's sizes with random weights, and a vocabulary of the words of these sentences only.

    Raises UsageError for sentences without words.
    """
    NextSentence(sentence_a, sentence_b)  # raises UsageError for an empty or too long sentence
    builder = BasicEnglishTokenizer()
    builder.add(sentence_a)
    builder.add(sentence_b)
    tokenizer, *_ = builder.finish(min_frequency=1, vocab_size=None)
    if tokenizer.size == FIRST_ORDINARY:
        raise UsageError("the sentences have no words in them")
    torch.manual_seed(seed)
    return BabyBert(model_config("baby", tokenizer.size)), tokenizer


def make_example(tokenizer: Tokenizer, sentence_a: str, sentence_b: str, max_positions: int, seed: int) -> Example:
    """Tokenize, assemble and mask two sentences. Raises UsageError for a sentence without words."""
    NextSentence(sentence_a, sentence_b)
    ids_a, ids_b = tokenizer.encode_documents([sentence_a, sentence_b])
    for name, ids in (("sentence_a", ids_a), ("sentence_b", ids_b)):
        if not len(ids):
            raise UsageError(f"'{name}' has no words in it")
    offsets = np.array([0, len(ids_a), len(ids_a) + len(ids_b)])
    documents = TokenizedDocuments(np.concatenate([ids_a, ids_b]), offsets, np.arange(2))
    sentences = Sentences(offsets[:-1], offsets[1:], np.arange(2), np.arange(2))
    pairs = Pairs(np.array([0]), np.array([1]), np.ones(1, np.int8))
    original_ids, segments, ends = assemble(documents, sentences, pairs, max_positions)
    ids, labels = mask_tokens(original_ids, ends, tokenizer.size, seed, 0, np.zeros(1, np.int64))
    return Example(original_ids, segments, ids, labels)


@torch.inference_mode()
def explain(
    model: BabyBert, tokenizer: Tokenizer, sentence_a: str, sentence_b: str, is_next: bool, seed: int
) -> dict[str, Any]:
    """The example and its losses, as `babybert explain --json` prints them.

    `is_next` is the label of the pair, `seed` draws its masks. Sets the model to evaluation mode and to PyTorch's own
    operations. Raises UsageError for a sentence without words.
    """
    example = make_example(tokenizer, sentence_a, sentence_b, model.config.max_positions, seed)
    model = model.eval().set_kernels("plain")
    ids_1T = torch.from_numpy(example.ids.astype(np.int64))[None]
    segments_1T = torch.from_numpy(example.segments.astype(np.int64))[None]
    hidden_1TD = model(ids_1T, segments_1T)
    masked_positions = np.flatnonzero(example.labels)
    logits_NV = model.mlm_logits(hidden_1TD[0, masked_positions]).double()
    targets = [
        _explain_target(int(position), int(example.labels[position]), logits_V, tokenizer)
        for position, logits_V in zip(masked_positions, logits_NV, strict=True)
    ]
    # 0.0 - x instead of -x: without targets the loss is 0.0, not -0.0.
    mlm_loss = (0.0 - math.fsum(target["log_probability"] for target in targets)) / max(len(targets), 1)
    next_sentence = _explain_next_sentence(model.nsp_logits(hidden_1TD)[0].double().tolist(), is_next)
    return {
        "sentence_a": sentence_a,
        "sentence_b": sentence_b,
        "vocabulary": tokenizer.size,
        "seed": seed,
        "tokens": [_explain_token(position, example, tokenizer) for position in range(len(example.ids))],
        "targets": targets,
        "mlm_loss": mlm_loss,
        "next_sentence": next_sentence,
        "nsp_loss": next_sentence["loss"],
        "loss": mlm_loss + next_sentence["loss"],
    }


def _explain_token(position: int, example: Example, tokenizer: Tokenizer) -> dict[str, Any]:
    """What became of the token at one position."""
    original_id = int(example.original_ids[position])
    input_id = int(example.ids[position])
    label = int(example.labels[position])
    if not label:
        fate = ""
    elif input_id == MASK:
        fate = "masked"
    else:
        fate = "kept" if input_id == original_id else "other word"
    return {
        "position": position,
        "segment": int(example.segments[position]),
        "token": tokenizer.token(original_id),
        "id": original_id,
        "chosen": bool(label),
        "fate": fate,
        "input": tokenizer.token(input_id),
        "input_id": input_id,
        "label": label,
    }


def _explain_target(position: int, target: int, logits_V: torch.Tensor, tokenizer: Tokenizer) -> dict[str, Any]:
    """The cross entropy at one masked position, whose original id is `target`."""
    logit = logits_V[target].item()
    log_sum_exp = logits_V.logsumexp(0).item()
    top_ids = logits_V.topk(min(TOP_WORDS, len(logits_V))).indices.tolist()
    return {
        "position": position,
        "target": tokenizer.token(target),
        "target_id": target,
        "logit": logit,
        "log_sum_exp": log_sum_exp,
        "log_probability": logit - log_sum_exp,
        "probability": math.exp(logit - log_sum_exp),
        "rank": int((logits_V > logits_V[target]).sum()) + 1,
        "likeliest": [tokenizer.token(token_id) for token_id in top_ids],
    }


def _explain_next_sentence(logits: list[float], is_next: bool) -> dict[str, Any]:
    """The cross entropy of the pair's label."""
    largest = max(logits)  # subtracted, so that no exponential overflows
    exponentials = [math.exp(logit - largest) for logit in logits]
    probabilities = [exponential / sum(exponentials) for exponential in exponentials]
    log_sum_exp = largest + math.log(sum(exponentials))
    return {
        "is_next": int(is_next),
        "logits": logits,
        "log_sum_exp": log_sum_exp,
        "probabilities": probabilities,
        "loss": log_sum_exp - logits[is_next],
    }


def format_explanation(explanation: dict[str, Any], model_name: str, width: int | None = None) -> str:
    """The explanation as text, wrapped to `width` columns (by default the terminal's)."""
    columns = width or shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns
    console, output = plain_console(max(NARROWEST, columns))
    _print_example(console, explanation, model_name)
    _print_mlm(console, explanation)
    _print_next_sentence(console, explanation["next_sentence"])
    mlm_loss, nsp_loss = explanation["mlm_loss"], explanation["nsp_loss"]
    _print_text(
        console, f"\n5. The objective is the sum: {mlm_loss:.4f} + {nsp_loss:.4f} = {explanation['loss']:.4f} nats."
    )
    return strip_lines(output.getvalue())


def _print_example(console: Console, explanation: dict[str, Any], model_name: str) -> None:
    _print_text(console, f"Model: {model_name}. Vocabulary: {explanation['vocabulary']:,} tokens.")
    _print_text(
        console,
        "\n1. Tokens. [CLS] A [SEP] is segment 1, B [SEP] is segment 2. "
        "The model also adds sines and cosines of the position to each token.",
    )
    _print_text(
        console,
        f"2. Masks (seed {explanation['seed']}). 15% of the words are chosen. Of those 80% become [MASK], "
        "10% become another word and 10% stay. The label is the original id.\n",
    )
    headers = ("position", "segment", "token", "id", "chosen", "input", "its id", "label")
    keys = ("position", "segment", "token", "id", "fate", "input", "input_id", "label")
    rows = [[str(token[key]) for key in keys] for token in explanation["tokens"]]
    _print_table(console, headers, rows, text_headers=("token", "chosen", "input"))


def _print_mlm(console: Console, explanation: dict[str, Any]) -> None:
    targets = explanation["targets"]
    _print_text(
        console,
        "\n3. Masked language model. At each chosen position the model gives a logit z to each of the "
        f"{explanation['vocabulary']:,} tokens.",
    )
    _print_text(console, "   ln p(target) = z(target) - ln(sum of e^z)\n")
    if not targets:
        _print_text(
            console, "   No word of these sentences is in the vocabulary, so no word is chosen, and the loss is 0."
        )
        return
    headers = ("position", "target", "z(target)", "ln(sum e^z)", "ln p", "p", "rank", "likeliest")
    rows = [
        [
            str(target["position"]),
            target["target"],
            f"{target['logit']:.4f}",
            f"{target['log_sum_exp']:.4f}",
            f"{target['log_probability']:.4f}",
            f"{target['probability']:.3g}",
            f"{target['rank']:,}",
            " ".join(target["likeliest"]),
        ]
        for target in targets
    ]
    _print_table(console, headers, rows, text_headers=("target", "likeliest"))
    terms = " + ".join(f"{-target['log_probability']:z.4f}" for target in targets)
    mean = f"({terms}) / {len(targets)} = {explanation['mlm_loss']:.4f}"
    _print_text(console, f"\n   MLM loss = mean of -ln p = {mean}")


def _print_next_sentence(console: Console, next_sentence: dict[str, Any]) -> None:
    z0, z1 = next_sentence["logits"]
    p0, p1 = next_sentence["probabilities"]
    label = next_sentence["is_next"]
    log_sum_exp = f"{next_sentence['log_sum_exp']:.4f}"
    _print_text(
        console,
        "\n4. Next sentence. The hidden state at [CLS] gives two logits. "
        'is_next 1 means "B follows A" (Google\'s BERT uses 0).\n',
    )
    _print_text(console, f"   z(0) = {z0:.4f}, z(1) = {z1:.4f}, ln(e^z(0) + e^z(1)) = {log_sum_exp}")
    _print_text(
        console, f"   p(0) = e^({z0:.4f} - {log_sum_exp}) = {p0:.4f}, p(1) = e^({z1:.4f} - {log_sum_exp}) = {p1:.4f}"
    )
    label_logit = f"{next_sentence['logits'][label]:.4f}"
    difference = f"{log_sum_exp} - ({label_logit}) = {next_sentence['loss']:.4f}"
    _print_text(console, f"   The label is {label}: NSP loss = -ln p({label}) = {difference}")


def _print_text(console: Console, text: str) -> None:
    console.print(Text(text))  # as Text: in a plain string rich would read "[MASK]" as markup


def _print_table(
    console: Console, headers: tuple[str, ...], rows: list[list[str]], text_headers: tuple[str, ...]
) -> None:
    table = make_table(headers, rows, text_headers)
    console.print(Padding(table, (0, 0, 0, 3)))  # indented as the text around it
