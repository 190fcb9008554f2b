"""`babybert explain --preference`: token scores of two sentences, the verdict, and what is refused."""

import json

import pytest
import torch
from conftest import tokenizer_of, wordpiece_of

from babybert.cli import main
from babybert.config import ModelConfig
from babybert.data.tokenizer import Tokenizer
from babybert.errors import UsageError
from babybert.evaluation.preference import compare_sentences, format_preference
from babybert.evaluation.pseudo_log_likelihood import score_sentences
from babybert.model.bert import BabyBert

A, B = "The cats see the cat.", "The cats sees the cat."


@pytest.fixture
def tokenizer() -> Tokenizer:
    return tokenizer_of(f"{A} {B}")


@pytest.fixture
def bert(tokenizer: Tokenizer) -> BabyBert:
    torch.manual_seed(0)
    return BabyBert(
        ModelConfig(vocab_size=tokenizer.size, width=8, heads=2, layers=2, feed_forward=16, max_positions=8)
    )


def test_tokens_sums_and_verdict(bert: BabyBert, tokenizer: Tokenizer) -> None:
    comparison = compare_sentences(bert, tokenizer, A, B)
    scores = score_sentences(
        bert, tokenizer.encode_documents([A, B]), tokenizer.continuation_flags(), torch.device("cpu")
    )
    for sentence, score, text in zip(comparison["sentences"], scores, (A, B), strict=True):
        assert sentence["text"] == text
        assert sentence["score"] == pytest.approx(score.plain_sum, abs=1e-4)
        tokens = sentence["tokens"]
        assert [token["token"] for token in tokens] == tokenizer.tokens(tokenizer.encode(text))
        assert [token["log_probability"] for token in tokens] == pytest.approx(score.plain.tolist(), abs=1e-5)
    a, b = (sentence["tokens"] for sentence in comparison["sentences"])
    for index, (token_a, token_b) in enumerate(zip(a, b, strict=True)):
        if index == 2:  # the only token that differs
            assert token_a["other"] is None and token_b["other"] is None
        else:
            assert (token_a["other"], token_b["other"]) == (token_b["log_probability"], token_a["log_probability"])
    score_a, score_b = (sentence["score"] for sentence in comparison["sentences"])
    assert comparison["preferred"] == ("a" if score_a > score_b else "b")
    assert comparison["difference"] == abs(score_a - score_b)
    swapped = compare_sentences(bert, tokenizer, B, A)
    assert {comparison["preferred"], swapped["preferred"]} == {"a", "b"}
    text = format_preference(comparison, "m")
    assert f"The model prefers {comparison['preferred'].upper()}, by {comparison['difference']:.4f} nats." in text
    assert f"score of A: {score_a:.4f}" in text and "ln p in B" in text


def test_equal_sentences_are_a_tie_and_unknown_words_are_shown(bert: BabyBert, tokenizer: Tokenizer) -> None:
    comparison = compare_sentences(bert, tokenizer, "the zebra", "The ZEBRA")
    assert comparison["preferred"] is None and comparison["difference"] == 0
    assert comparison["sentences"][1]["tokens"][1]["unknown"]
    text = format_preference(comparison, "m")
    assert "[UNK] (ZEBRA)" in text and text.endswith("The model prefers neither: both have the same score.")


def test_pieces_of_a_word_do_not_give_each_other_away() -> None:
    tokenizer = wordpiece_of("unbreakable movies", vocab_size=40)
    torch.manual_seed(0)
    bert = BabyBert(ModelConfig(vocab_size=tokenizer.size, width=8, heads=2, layers=1, feed_forward=16))
    sentence = compare_sentences(bert, tokenizer, "unbreakable", "movies")["sentences"][0]
    flags_V = tokenizer.continuation_flags()
    (score,) = score_sentences(bert, tokenizer.encode_documents(["unbreakable"]), flags_V, torch.device("cpu"))
    assert len(sentence["tokens"]) > 1 and score.within_word_sum != score.plain_sum
    assert sentence["score"] == pytest.approx(score.within_word_sum, abs=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("", "cat", "'sentence_a' is empty"),
        ("cat", '""', "sentence B: the text has no words in it"),
        ("cat", "the [MASK]", r"'sentence_b' has the special token \[MASK\]: replace it by a word"),
        ("the cat the cat the cat the", "cat", "sentence A: the text is 9 tokens long.*at most 8"),
        ("cat cat cat cat", "cat", "sentence A has 4 tokens; at most 3 are scored"),
    ],
)
def test_sentences_that_cannot_be_compared(bert: BabyBert, tokenizer: Tokenizer, a: str, b: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare_sentences(bert, tokenizer, a, b, most_tokens=3 if "at most 3" in message else None)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", A, B, "--preference"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Model: untrained") and "sentence B" in out and "The model prefers" in out
    assert main(["explain", A, B, "--preference", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [sentence["text"] for sentence in report["sentences"]] == [A, B]
    assert report["preferred"] in ("a", "b")
    assert main(["explain", A, "[MASK]", "--preference"]) == 2
