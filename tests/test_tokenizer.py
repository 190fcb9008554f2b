"""The tokenizer follows torchtext's `basic_english` rules; WordPiece, special tokens, and the file format."""

import re
from pathlib import Path

import pytest
from conftest import tokenizer_of, wordpiece_of
from hypothesis import example, given
from hypothesis import strategies as st

from babybert.data.sentence_ends import OTHER_SENTENCE_ENDS
from babybert.data.tokenizer import MASK, SPECIAL_TOKENS, UNK, Tokenizer
from babybert.errors import DataError


def basic_english(text: str) -> list[str]:
    """The rules of torchtext's tokenizer of that name, one regular expression after the other."""
    text = text.lower()
    for pattern, replacement in [
        (r"\'", " '  "), (r"\"", ""), (r"\.", " . "), (r"<br \/>", " "), (r",", " , "), (r"\(", " ( "), (r"\)", " ) "),
        (r"\!", " ! "), (r"\?", " ? "), (r"\;", " "), (r"\:", " "), (r"\s+", " "),
    ]:  # fmt: skip
        text = re.sub(pattern, replacement, text)
    return text.split()


# Without the characters at which Rust and Python differ: separators 0x1C to 0x1F, final sigma, and letters that are
# newer than one of the two. Without sentence ends that torchtext does not know.
ALPHABET = st.characters(
    max_codepoint=0x1C7F,
    blacklist_characters="\x1c\x1d\x1e\x1fΣ" + "".join(OTHER_SENTENCE_ENDS),
    blacklist_categories=("Cs", "Cn"),
)
TEXT = st.lists(
    st.one_of(
        st.text(ALPHABET, max_size=8),
        st.sampled_from(["<br />", "it's", '"no"', "(ok)", "?!", "...", " ", ";:", "[MASK]"]),
    )
).map("".join)


@given(TEXT)
def test_tokens_are_those_of_basic_english(text: str) -> None:
    tokenizer = tokenizer_of(text, "one word")
    (ids,) = tokenizer.encode_documents([text])
    assert tokenizer.tokens(ids) == basic_english(text)


@given(st.lists(st.one_of(TEXT, st.sampled_from(OTHER_SENTENCE_ENDS))).map("".join))
@example("[SEP]")
def test_sentence_ends_outside_ascii_are_separate_tokens_too(text: str) -> None:
    tokenizer = tokenizer_of(text, "one word")
    (ids,) = tokenizer.encode_documents([text])
    separated = "".join(f" {character} " if character in OTHER_SENTENCE_ENDS else character for character in text)
    assert tokenizer.tokens(ids) == basic_english(separated)
    if not any(token in text for token in SPECIAL_TOKENS):  # in a request, these are no ordinary text
        assert tokenizer.encode(text) == ids.tolist()


def test_a_tokenizer_keeps_the_rules_that_it_was_made_with(tmp_path: Path) -> None:
    """The tokenizer of a corpus without such sentence ends, or of an earlier version, does not split them off."""
    plain = tokenizer_of("one two.")
    assert plain.digest == Tokenizer.of_words([".", "one", "two"]).digest
    assert plain.tokens(plain.encode("one\u3002two.")) == ["[UNK]", "."]
    for corpus, expected in (("one two.", ["[UNK]"]), ("one\u3002 two.", ["one", "\u3002", "two"])):
        tokenizer_of(corpus).save(tmp_path / "tokenizer.json")
        tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
        assert tokenizer.tokens(tokenizer.encode("one\u3002two")) == expected
        assert tokenizer.digest == tokenizer_of(corpus).digest


def test_the_parts_of_the_text_around_a_sentence_end() -> None:
    assert tokenizer_of("\u4e00\u3002\u4e8c").sources("\u4e00\u3002\u3002\u4e8c") == [
        "\u4e00",
        "\u3002",
        "\u3002",
        "\u4e8c",
    ]


def test_the_tokens_of_a_review() -> None:
    tokenizer = tokenizer_of('It\'s "great"!<br /><br />Really (yes): see it; now.')
    tokens = tokenizer.tokens(tokenizer.encode("It's great!<br />See (it)."))
    assert tokens == ["it", "'", "s", "great", "!", "see", "(", "it", ")", "."]


def test_special_tokens_are_words_in_documents_and_special_in_requests() -> None:
    tokenizer = tokenizer_of("a [MASK] here")
    (ids,) = tokenizer.encode_documents(["a [MASK] here"])
    assert tokenizer.tokens(ids) == ["a", "[mask]", "here"]
    assert tokenizer.tokens(tokenizer.encode("a [MASK] here")) == ["a", "[MASK]", "here"]
    assert tokenizer.encode("unheard") == [UNK]


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("some words, and 'more'")
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.digest == tokenizer.digest
    assert loaded.encode("some 'words'") == tokenizer.encode("some 'words'")


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=re.escape(str(path))):
        Tokenizer.load(path)


PIECES = [
    f"{a}{b}{c}" for a in ("un", "") for b in ("happy", "walk", "watch", "kind") for c in ("ing", "ed", "ness", "")
]


def test_wordpiece_encodes_new_words_by_their_pieces(tmp_path: Path) -> None:
    tokenizer = wordpiece_of(*[" ".join(PIECES) + " . ! ?"] * 3, vocab_size=60)
    assert tokenizer.tokens(range(5)) == list(SPECIAL_TOKENS)
    assert tokenizer.size <= 60
    tokens = tokenizer.tokens(tokenizer.encode("Unwatching<br />KIND! [MASK]"))
    assert tokenizer.join(tokens) == "unwatching kind ! [MASK]"
    assert len(tokens) > 4
    assert tokenizer.encode("[MASK]") == [MASK]
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").kind == "wordpiece"


def test_words_are_joined_as_they_are() -> None:
    tokenizer = tokenizer_of("a ##b")
    assert tokenizer.kind == "basic-english"
    assert tokenizer.join(["a", "##b"]) == "a ##b"


def test_sources_are_the_text_of_each_token() -> None:
    words = Tokenizer.of_words(["don", "'", "t", "the", "."])
    assert words.sources("Don't<br />ZXQV \"the [MASK].") == ["Don", "'", "t", "ZXQV", "the", "[MASK]", "."]
    pieces = wordpiece_of("aab aac aad", vocab_size=20)
    assert "".join(pieces.sources("aabaad Aac")) == "aabaadAac"
    assert len(pieces.sources("aabaad Aac")) == len(pieces.encode("aabaad Aac"))


@pytest.mark.parametrize("kind", ["basic-english", "wordpiece"])
@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("a" * 100, 0),
        ("a" * 101 + " b", 1),
        ("x " + "İ" * 51 + " y<br />" + "b" * 120, {"basic-english": 2, "wordpiece": 1}),  # BERT drops the dots
        ("각" * 40, {"basic-english": 0, "wordpiece": 1}),  # BERT splits a syllable into three
        ("a" * 60 + "\x0b" + "a" * 60, {"basic-english": 0, "wordpiece": 1}),  # BERT drops the control character
    ],
)
def test_long_words_are_counted(kind: str, text: str, count: int | dict[str, int]) -> None:
    tokenizer = Tokenizer.of_words(["b"]) if kind == "basic-english" else Tokenizer.of_pieces(["a", "##a", "b", "##b"])
    assert tokenizer.count_long_words(text) == (count if isinstance(count, int) else count[kind])


def test_a_long_word_of_an_earlier_vocabulary_is_not_counted() -> None:
    tokenizer = Tokenizer.of_words(["a" * 200_000])
    assert tokenizer.encode("a" * 200_000) == [5]
    assert tokenizer.count_long_words("a" * 200_000) == 0
