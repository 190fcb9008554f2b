"""The one-pass tokenizer gives the words, ids and vocabulary of the `tokenizers` library."""

import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from babybert.data.basic_english import BasicEnglishTokenizer
from babybert.data.sentence_ends import OTHER_SENTENCE_ENDS
from babybert.data.tokenizer import RULES, SPECIAL_TOKENS, UNK

TEXT = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(["<br />", "it's", '"no"', "?!", "...", "İ", "ΣΑΣ", "\x1c", "\x85", "\u2003", "[MASK]"]),
        st.sampled_from(["\u3000", "<br\xa0/>"]),
        st.sampled_from(OTHER_SENTENCE_ENDS),
    )
).map("".join)


def train_with_library(texts: list[str], min_frequency: int = 1, vocab_size: int = 2**31 - 1) -> tokenizers.Tokenizer:
    """The oracle: the library's tokenizer with these rules, and its training."""
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    rules = [*((end, f" {end} ") for end in OTHER_SENTENCE_ENDS), *RULES]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *(normalizers.Replace(a, b) for a, b in rules)])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


@settings(max_examples=300)
@given(TEXT)
def test_words_are_those_of_the_library(text: str) -> None:
    backend = train_with_library([])
    expected = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]
    assert [word.decode() for word in BasicEnglishTokenizer().split(text)] == expected


@given(st.lists(TEXT, max_size=6), st.integers(1, 3), st.one_of(st.none(), st.integers(6, 20)))
def test_vocabulary_and_ids_are_those_of_the_library(
    texts: list[str], min_frequency: int, vocab_size: int | None
) -> None:
    words = BasicEnglishTokenizer()
    provisional = [words.add(text) for text in texts]
    tokenizer, to_id = words.finish(min_frequency, vocab_size)
    backend = train_with_library(texts, min_frequency, vocab_size or 2**31 - 1)
    backend.encode_special_tokens = True
    assert tokenizer.tokens(range(tokenizer.size)) == [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    for text, ids in zip(texts, provisional, strict=True):
        assert to_id[ids].tolist() == backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode_documents([text])[0].tolist() == to_id[ids].tolist()


def test_special_tokens_come_first_and_words_by_frequency_then_spelling() -> None:
    words = BasicEnglishTokenizer()
    for text in ("b a b", "b a d c"):
        words.add(text)
    assert words.finish(1, None)[0].tokens(range(9)) == [*SPECIAL_TOKENS, "b", "a", "c", "d"]
    assert words.finish(1, 7)[0].tokens(range(7)) == [*SPECIAL_TOKENS, "b", "a"]
    tokenizer, to_id = words.finish(2, None)
    assert tokenizer.size == 7
    assert to_id.tolist() == [5, 6, UNK, UNK]


def test_the_ids_of_sentence_ends_that_were_seen() -> None:
    words = BasicEnglishTokenizer()
    words.add("one . two ?")
    assert words.sentence_end_ids().tolist() == [1, 3]
    words.add("\u4e00\u3002\u4e8c\u3002")
    assert words.sentence_end_ids().tolist() == [1, 3, 5]


def test_the_share_of_tokens_seen_once() -> None:
    words = BasicEnglishTokenizer()
    assert words.share_seen_once() == 0
    words.add("a b. a c. a!")
    assert words.share_seen_once() == 2 / 5  # b and c


def test_counts_grow_with_the_words() -> None:
    words = BasicEnglishTokenizer()
    text = " ".join(f"w{i}" for i in range(5000))
    words.add(text)
    words.add(text + " w4999")
    tokenizer, _ = words.finish(3, None)
    assert tokenizer.tokens([5]) == ["w4999"]
    assert tokenizer.size == 6


@pytest.mark.parametrize("text", ["", " \n ", '""'])
def test_nothing_gives_nothing(text: str) -> None:
    assert BasicEnglishTokenizer().add(text).tolist() == []
    assert BasicEnglishTokenizer().add(text).dtype == np.int32


def encode_both_ways(text: str) -> tuple[list[str], list[str]]:
    """The tokens of a document in training, and those of the same text with the tokenizer that training made."""
    words = BasicEnglishTokenizer()
    provisional = words.add(text)
    tokenizer, to_id = words.finish(1, None)
    return tokenizer.tokens(to_id[provisional]), tokenizer.tokens(tokenizer.encode_documents([text])[0])


def test_every_white_space_separates_words_in_training_and_in_requests() -> None:
    """Also inside `<br />`, which is a line break only with a space."""
    spaces = [
        chr(code) for code in range(sys.maxunicode) if unicodedata.category(chr(code)) in ("Zs", "Zl", "Zp", "Cc")
    ]
    for space in [*spaces, "\u200b", "\u2060", "\ufeff"]:
        for text in (f"good{space}bad", f"good<br{space}/>bad", f"good<br{space} />bad", f'<{space}br />a "{space}" b'):
            in_training, in_requests = encode_both_ways(text)
            assert in_training == in_requests, ascii(text)
    assert encode_both_ways("good<br\u3000/>bad")[0] == ["good<br", "/>bad"]
    assert encode_both_ways("good<br />bad")[0] == ["good", "bad"]


@settings(max_examples=200)
@given(TEXT)
def test_training_and_requests_give_the_same_tokens(text: str) -> None:
    in_training, in_requests = encode_both_ways(text)
    assert in_training == in_requests


@pytest.mark.parametrize("word", ["a" * 101, "İ" * 51, "é" * 101, "x" * 1_000_000])
def test_a_long_word_is_unknown_in_training_and_in_requests(word: str) -> None:
    words = BasicEnglishTokenizer()
    provisional = words.add(f"one {word} two {word}")
    tokenizer, to_id = words.finish(1, None)
    assert words.long_words == 2
    assert tokenizer.size == 7
    assert to_id[provisional].tolist() == tokenizer.encode(f"one {word} two {word}") == [5, UNK, 6, UNK]


def test_words_of_100_characters_are_kept() -> None:
    words = BasicEnglishTokenizer()
    words.add(f"{'a' * 100} {'é' * 100} {'b' * 101}")
    assert words.finish(1, None)[0].tokens(range(5, 7)) == ["a" * 100, "é" * 100]
    assert words.long_words == 1
