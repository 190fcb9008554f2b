"""The pieces are a function of the texts, fit the vocabulary, and are those of the library except for ties."""

import itertools
import os
import random
import subprocess
import sys
from collections import Counter

import pytest
import tokenizers
from conftest import wordpiece_of
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, trainers

from babybert.corpus.demo import generate_reviews
from babybert.data import wordpiece_trainer
from babybert.data.pieces import digest_of
from babybert.data.tokenizer import FIRST_ORDINARY, MAX_WORD_CHARACTERS, SPECIAL_TOKENS, UNK, Tokenizer
from babybert.data.wordpiece_trainer import INSIDE, ChunkCounts, WordPieceTrainer, level_of, train_pieces

# Prints the digest of a vocabulary in which many pairs are equally frequent.
PRINT_DIGEST = """
from babybert.data.wordpiece_trainer import WordPieceTrainer
trainer = WordPieceTrainer()
for index in range(2000):
    trainer.add(f"{index * 7919:x} {index * 104729:o}")
print(trainer.finish(min_frequency=1, vocab_size=900).digest)
"""
TEXT = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(["<br />", "it's", "e\u0301", "\x0b", "\x85", "\u3000", "\u200b", "中文", "각", " ", "\r\n"]),
    )
).map("".join)


@pytest.mark.slow
def test_three_processes_train_the_same_vocabulary() -> None:
    digests = set()
    for hash_seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", PRINT_DIGEST]
        digests.add(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)
    assert len(digests) == 1


def test_the_order_of_the_texts_has_no_influence() -> None:
    texts = generate_reviews(60, seed=0)
    shuffled = random.Random(0).sample(texts, len(texts))
    assert wordpiece_of(*texts, vocab_size=300).digest == wordpiece_of(*shuffled, vocab_size=300).digest


def naive_pieces(word_counts: Counter[str], most_pieces: int) -> list[str]:
    """Byte-pair encoding without an index: all pairs are counted again for each merge."""
    words = {word: [word[0], *(INSIDE + c for c in word[1:])] for word in word_counts}
    alphabet = {c for word in words for c in word} | {piece for pieces in words.values() for piece in pieces}
    result = sorted(alphabet, key=lambda piece: (piece.startswith(INSIDE), piece))
    while len(result) < most_pieces:
        counts: Counter[tuple[str, str]] = Counter()
        for word, pieces in words.items():
            for pair in itertools.pairwise(pieces):
                counts[pair] += word_counts[word]
        if not counts:
            break
        _, merged, (first, second) = min((-n, a + b.removeprefix(INSIDE), (a, b)) for (a, b), n in counts.items())
        for pieces in words.values():
            for index in itertools.count():
                if index + 1 >= len(pieces):
                    break
                if pieces[index : index + 2] == [first, second]:
                    pieces[index : index + 2] = [merged]
        if merged not in result:
            result.append(merged)
    return result


@given(st.dictionaries(st.text("abc", min_size=1, max_size=7), st.integers(1, 5), max_size=12), st.integers(6, 60))
def test_pieces_are_those_of_a_plain_implementation(words: dict[str, int], most_pieces: int) -> None:
    assert train_pieces(words, 1, most_pieces) == naive_pieces(Counter(words), most_pieces)


def test_held_out_text_has_as_many_tokens_as_with_the_library() -> None:
    texts = generate_reviews(400, seed=0)
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    empty = Tokenizer.of_pieces(())._backend
    backend.normalizer, backend.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    held_out = generate_reviews(100, seed=1)
    ours = wordpiece_of(*texts, vocab_size=250)
    assert ours.size == backend.get_vocab_size() == 250
    lengths = [sum(map(len, each.encode_documents(held_out))) for each in (ours, Tokenizer(backend))]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.005)


@given(st.lists(TEXT, max_size=5), st.sampled_from([0, 1 << 20]))
def test_the_words_that_are_counted_are_those_of_the_tokenizer(texts: list[str], chunk_characters: int) -> None:
    trainer = WordPieceTrainer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wordpiece_trainer, "CHUNK_CHARACTERS", chunk_characters)
        for text in texts:
            trainer.add(text)
    tokenizer = Tokenizer.of_pieces(())
    expected = Counter(word for text in texts for word in tokenizer.words(text) if len(word) <= MAX_WORD_CHARACTERS)
    assert trainer.word_counts() == expected


def test_min_frequency_is_that_of_a_pair() -> None:
    assert train_pieces({"ab": 2, "cd": 1}, 2, 100) == ["a", "b", "c", "d", "##b", "##d", "ab"]


def test_rare_characters_are_left_out_of_a_small_vocabulary(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["the film is good"] * 9 + [f"the film {chr(0x4E00 + index)}" for index in range(90)]
    tokenizer = wordpiece_of(*texts, vocab_size=60)
    assert FIRST_ORDINARY < tokenizer.size <= 60
    assert tokenizer.tokens(tokenizer.encode("the film")) == ["the", "film"]
    assert tokenizer.encode(chr(0x4E00 + 89)) == [UNK]
    assert "set vocab_size to more than" in caplog.text
    assert wordpiece_of(*texts, vocab_size=200).encode(chr(0x4E00 + 89)) != [UNK]


def count_in_parts(texts: list[str], parts: int) -> WordPieceTrainer:
    """Count as `parts` processes do, with a level for each text that its digest gives."""
    trainer = WordPieceTrainer()
    for part in range(parts):
        counts = ChunkCounts()
        for text in texts[part::parts]:
            counts.add(text, level_of(digest_of(text, seed=0).text))
        trainer.merge(counts)
    return trainer


@pytest.mark.parametrize("chunk_characters", [0, 1 << 26])
def test_a_large_corpus_is_sampled_by_its_digests(chunk_characters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample depends neither on the order of the texts nor on the processes that count them."""
    monkeypatch.setattr(wordpiece_trainer, "CHUNK_CHARACTERS", chunk_characters)
    monkeypatch.setattr(wordpiece_trainer, "MOST_CHARACTERS", 2000)
    texts = [f"text number {index} x{index}" for index in range(500)]
    levels = [level_of(digest_of(text, seed=0).text) for text in texts]
    first_level = next(
        first
        for first in range(64)
        if sum(len(text) for text, level in zip(texts, levels, strict=True) if level >= first) <= 2000
    )
    sample = [text for text, level in zip(texts, levels, strict=True) if level >= first_level]
    assert 0 < len(sample) < 200
    expected = Counter(word for text in sample for word in text.split())
    for order in (texts, texts[::-1]):
        for parts in (1, 7, 500):
            assert count_in_parts(order, parts).word_counts() == expected


def test_the_levels_of_digests() -> None:
    assert [level_of(digest) for digest in (2**64 - 1, 2**62, 2**62 - 1, 2**60, 2**60 - 1, 0)] == [0, 0, 1, 1, 2, 32]
