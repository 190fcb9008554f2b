"""Pseudo-log-likelihoods against a reference that makes one masked copy at a time, and against sums by hand."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import wordpiece_of

from babybert.config import ModelConfig
from babybert.data.tokenizer import CLS, FIRST_ORDINARY, MASK, SEP, Tokenizer
from babybert.errors import DataError
from babybert.evaluation.pseudo_log_likelihood import SentenceScores, score_sentences
from babybert.model.bert import BabyBert

CPU = torch.device("cpu")
TEXTS = (
    "The unbreakable movies were wonderful.",
    "She sleeps.",
    "unbreakable unbreakable",
    "Why?",
    "the cat sees cats.",
)


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    """A vocabulary with hardly any whole words, so that words have several pieces."""
    return wordpiece_of(*TEXTS, vocab_size=50)


def make_model(vocab_size: int, layers: int = 2, width: int = 16) -> BabyBert:
    torch.manual_seed(0)
    model = BabyBert(ModelConfig(vocab_size=vocab_size, width=width, heads=2, layers=layers, feed_forward=32))
    with torch.no_grad():
        model.mlm_decoder.bias.normal_()
    return model


def log_probability(model: BabyBert, ids: Sequence[int], masked: Sequence[int], position: int) -> float:
    """ln p(the token at `position` | the tokens at all positions that are not masked), from one pass in fp64."""
    shown = [MASK if index in masked else token_id for index, token_id in enumerate(ids)]
    with torch.no_grad():
        hidden_1TD = model(torch.tensor([shown]), torch.ones(1, len(shown), dtype=torch.int64))
        logits_V = model.mlm_logits(hidden_1TD[0, position : position + 1])[0].double()
    return float(torch.log_softmax(logits_V, 0)[ids[position]])


def scores_one_at_a_time(model: BabyBert, tokenizer: Tokenizer, text: str) -> tuple[list[float], list[float]]:
    """The scores of each token of a text: plain, and of the within-word variant. Words are found by their spelling."""
    ids = [CLS, *tokenizer.encode(text), SEP]
    tokens = tokenizer.tokens(ids)
    plain, within_word = [], []
    for position in range(1, len(ids) - 1):
        end = position + 1
        while tokenizer.kind == "wordpiece" and tokens[end].startswith("##"):
            end += 1
        plain.append(log_probability(model, ids, [position], position))
        within_word.append(log_probability(model, ids, range(position, end), position))
    return plain, within_word


def score(model: BabyBert, tokenizer: Tokenizer, texts: Sequence[str], **settings: int) -> list[SentenceScores]:
    sentences = tokenizer.encode_documents(texts)
    flags_V = tokenizer.continuation_flags()
    return score_sentences(model, sentences, flags_V, CPU, show_progress=False, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("batch_positions", [1, 40, 4096])
def test_batches_equal_one_masked_copy_at_a_time(pieces: Tokenizer, kernels: str, batch_positions: int) -> None:
    model = make_model(pieces.size).set_kernels(kernels)  # type: ignore[arg-type]
    scores = score(model, pieces, TEXTS, batch_positions=batch_positions)
    assert model.training  # the mode is restored
    model.eval()
    several_pieces = 0
    for text, of_sentence in zip(TEXTS, scores, strict=True):
        plain, within_word = scores_one_at_a_time(model, pieces, text)
        assert of_sentence.plain == pytest.approx(plain, abs=1e-5)
        assert of_sentence.within_word == pytest.approx(within_word, abs=1e-5)
        assert of_sentence.plain_sum == pytest.approx(sum(plain), abs=1e-4)
        assert of_sentence.within_word_sum == pytest.approx(sum(within_word), abs=1e-4)
        several_pieces += sum(a != b for a, b in zip(plain, within_word, strict=True))
    assert several_pieces > 10


def test_with_whole_words_both_variants_are_equal() -> None:
    tokenizer = Tokenizer.of_words(["the", "cat", "##s", "sees", "."])  # "##s" is a word here
    model = make_model(tokenizer.size)
    (of_sentence,) = score(model, tokenizer, ["The ##s ##s sees the cat."])
    assert len(of_sentence.plain) == 7
    assert (of_sentence.plain == of_sentence.within_word).all()
    assert of_sentence.plain == pytest.approx(
        scores_one_at_a_time(model.eval(), tokenizer, "The ##s ##s sees the cat.")[0]
    )


def test_a_model_that_knows_only_frequencies_scores_by_hand() -> None:
    """Without weights before it, the decoder's bias decides: a unigram model with shares of 1/2, 1/4 and 1/4."""
    tokenizer = Tokenizer.of_words(["a", "b", "c"])
    model = make_model(tokenizer.size)
    with torch.no_grad():
        model.mlm_decoder.weight.zero_()
        model.mlm_decoder.bias.fill_(-1e4)
        model.mlm_decoder.bias[FIRST_ORDINARY:] = torch.tensor([0.5, 0.25, 0.25]).log()
    first, second, third = score(model, tokenizer, ["a b a", "b a a", "a c"])
    assert first.plain == pytest.approx([math.log(0.5), math.log(0.25), math.log(0.5)])
    assert first.plain_sum == second.plain_sum == pytest.approx(math.log(1 / 16))
    assert third.within_word_sum == pytest.approx(math.log(1 / 8))


def test_the_order_of_the_sentences_and_the_batch_do_not_matter(pieces: Tokenizer) -> None:
    model = make_model(pieces.size)
    forwards = score(model, pieces, TEXTS)
    backwards = score(model, pieces, TEXTS[::-1], batch_positions=30)[::-1]
    again = score(model, pieces, TEXTS)
    for first, second, third in zip(forwards, backwards, again, strict=True):
        assert first.plain == pytest.approx(second.plain, abs=1e-5)
        assert (first.within_word == third.within_word).all()


def test_bf16_is_close(pieces: Tokenizer) -> None:
    model = make_model(pieces.size)
    for exact, fast in zip(score(model, pieces, TEXTS), score(model, pieces, TEXTS, bf16=True), strict=True):
        assert fast.plain == pytest.approx(exact.plain, abs=0.1)


def test_scores_that_are_not_finite_are_an_error(pieces: Tokenizer) -> None:
    model = make_model(pieces.size)
    with torch.no_grad():
        model.mlm_decoder.bias[7] = math.nan
    with pytest.raises(DataError, match="no finite score"):
        score(model, pieces, TEXTS)


def test_hidden_states_do_not_depend_on_whether_full_rows_are_known_to_be_full() -> None:
    for width in (8, 48):  # the kernels differ by the width of a head
        model = make_model(30, width=width).eval()
        ids_BT = torch.from_numpy(np.random.default_rng(0).integers(5, 30, (3, 7)))
        query_M = torch.tensor([2, 9, 20])
        for kernels in ("auto", "plain"):
            model.set_kernels(kernels)
            with torch.inference_mode():
                padded, full = (
                    model.hidden_at(ids_BT, torch.ones_like(ids_BT), query_M, flag) for flag in (True, False)
                )
            assert torch.allclose(padded, full, atol=1e-6)
