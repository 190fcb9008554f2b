"""Where sentences end, in several languages, for both tokenizers; the tokens are those of the whole text."""

import itertools
import time
import unicodedata

import numpy as np
import pytest
from conftest import tokenizer_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_sentences import flat_documents

from babybert.data.basic_english import BasicEnglishTokenizer
from babybert.data.sentence_ends import OTHER_SENTENCE_ENDS, SENTENCE_ENDS
from babybert.data.sentence_splitter import CASED_BLOCKS, CLOSERS, SentenceSplitter
from babybert.data.sentences import split_sentences
from babybert.data.tokenizer import Tokenizer
from babybert.data.wordpiece_trainer import ChunkCounts, WordPieceTrainer

# `|` is where one sentence ends and the next begins. The texts were written for this table.
CASES = {
    "English": [
        'He said "no." |Then he left.',
        "(Really?) |Yes, [she was.] |Good.",
        "It took 3.5 hours and cost 1.000 euros. |So what?",
        "Mr. Smith and Dr. Jones met Mrs. Hill vs. St. John. |They talked.",
        "J. R. R. Tolkien wrote it, not J.K. Rowling. |So did I. |And you?",
        "Bring fruit, e.g. apples, i.e. Bramleys. |Cats, dogs, etc. are fine.",
        "We left at 5 p.m. and came to the U.S. army base. |It was closed.",
        "Robert Downey Jr. is in it. |Is that Robert Downey Jr.? |Yes.",
        '"Why?" she asked. |"Because!" |He laughed (badly!) and left.',
        "What?! |Well... |no!!! |Wait . . . |Go.",
        "See imdb.com for No. 5 or vol. 2, p. 7. |No. |Fine.",
        "no capitals here. |it works! |does it? |yes.",
        "He waited\u2026 and waited\u2026 |Nothing came.",
        "No space.|After it!|Or here?|Yes.",
        "... and so it goes. |The end",
        "Good.<br /><br />|Bad.<br />|Ugly.",
        "\u201cFine.\u201d |\u2018Good.\u2019 |Done.",
    ],
    "German": [
        "Das kostet 3.50 Euro, z. B. hier, d. h. in Bonn. |Teuer!",
        "Er sagte: \u201eNein.\u201c |Dann ging er.",
        "Dr. Meyer und Prof. Schulz kamen, usw. und so fort. |\u00c4rger gab es nicht.",
    ],
    "French": [
        "M. Dupont dit : \u00ab Non. \u00bb |Puis il partit.",
        "Mme. Martin est l\u00e0. |\u00c9tait-elle malade ? |Oui !",
    ],
    "Spanish": [
        "\u00bfQu\u00e9 dijo la Sra. Garc\u00eda? |\u00a1Nada! |El Dr. P\u00e9rez se fue.",
        "\u00abNo.\u00bb |Luego se fue.",
    ],
    "Russian": [
        "\u0410. \u0421. \u041f\u0443\u0448\u043a\u0438\u043d \u0436\u0438\u043b \u0442\u0430\u043c. "
        "|\u042d\u0442\u043e \u0431\u044b\u043b\u043e \u0434\u0430\u0432\u043d\u043e.",
        "\u041e\u043d \u0443\u0448\u0451\u043b, \u0442. \u0435. \u0441\u0431\u0435\u0436\u0430\u043b. "
        "|\u00ab\u041d\u0435\u0442!\u00bb |\u042f \u0437\u043d\u0430\u044e.",
    ],
    "Chinese": [
        "\u6211\u559c\u6b22\u8fd9\u90e8\u7535\u5f71\u3002|\u4f60\u5462\uff1f\uff01|\u4ed6\u8d70\u4e863.5\u516c\u91cc\u3002"
    ],
    "Japanese": ["\u6620\u753b\u306f\u826f\u3044\u3002|\u97f3\u697d\u306f\uff1f|\u60aa\u3044\uff61"],
    "Hindi": [
        "\u092b\u093f\u0932\u094d\u092e \u0905\u091a\u094d\u091b\u0940 \u0939\u0948\u0964 "
        "|\u0915\u094d\u092f\u094b\u0902? |3.5 \u0930\u0941\u092a\u092f\u0947\u0964"
    ],
    "Arabic": [
        "\u0647\u0644 \u0627\u0644\u0641\u064a\u0644\u0645 \u062c\u064a\u062f\u061f "
        "|\u0627\u0644\u0645\u0648\u0633\u064a\u0642\u0649 \u0633\u064a\u0626\u0629."
    ],
}
WORDPIECE_CASES = [
    "\u4ed6\u8bf4\uff1a\u201c\u4e0d\u3002\u201d|\u7136\u540e\u4ed6\u8d70\u4e86\u3002",
    "\u300c\u306f\u3044\u3002\u300d|\u300c\u3044\u3044\u3048\uff01\u300d",
]
# The rules cannot tell these; `|` is where a reader would end a sentence, and `~` where the rules do so wrongly.
KNOWN_ERRORS = [
    "That was plan B. |It failed.",
    "She lives in the U.S. |He does not.",
    "Am 3. ~Oktober kam er.",
    "He gave it away.then he left.",
]


def wordpiece_of(*texts: str) -> Tokenizer:
    counts = ChunkCounts()
    for text in texts:
        counts.add(text, 0)
    trainer = WordPieceTrainer()
    trainer.merge(counts)
    return trainer.finish(1, 5000)


def split(tokenizer: Tokenizer, text: str) -> list[str]:
    """The tokens of each sentence."""
    (document,) = tokenizer.encode_sentences([text])
    cuts = [0, *(np.flatnonzero(document.is_end) + 1).tolist(), len(document.ids)]
    return [tokenizer.join(tokenizer.tokens(document.ids[a:b])) for a, b in itertools.pairwise(cuts) if b > a]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{language}-{i}") for language in CASES for i, case in enumerate(CASES[language])]
)
def test_sentences_end_where_a_reader_ends_them(case: str) -> None:
    text = case.replace("|", "")
    for tokenizer in (tokenizer_of(text), wordpiece_of(text)):
        expected = [tokenizer.join(tokenizer.tokens(ids)) for ids in tokenizer.encode_documents(case.split("|"))]
        assert split(tokenizer, text) == expected


@pytest.mark.parametrize("case", WORDPIECE_CASES)
def test_closing_quotes_without_a_space_after_them_need_a_tokenizer_that_splits_them_off(case: str) -> None:
    text = case.replace("|", "")
    tokenizer = wordpiece_of(text)
    expected = [tokenizer.join(tokenizer.tokens(ids)) for ids in tokenizer.encode_documents(case.split("|"))]
    assert split(tokenizer, text) == expected
    assert len(split(tokenizer_of(text), text)) == len(expected)


@pytest.mark.parametrize("case", KNOWN_ERRORS)
def test_what_the_rules_cannot_tell(case: str) -> None:
    text = case.replace("|", "").replace("~", "")
    parts = case.replace("|", "").split("~")
    assert len(split(wordpiece_of(text), text)) == len(parts)


def share_found(sentences: list[tuple[list[str], list[str]]]) -> float:
    """The share of expected sentences that were found, with exactly the same words."""
    found = sum(len(set(expected) & set(actual)) for expected, actual in sentences)
    return found / sum(len(expected) for expected, _ in sentences)


def test_most_sentences_of_all_cases_are_found() -> None:
    """How well both rules do, with `wordpiece`. The rule of `--segments sentences` knows tokens only."""
    by_text, by_tokens = [], []
    for case in [*itertools.chain.from_iterable(CASES.values()), *WORDPIECE_CASES, *KNOWN_ERRORS]:
        text = case.replace("|", "").replace("~", "")
        tokenizer = wordpiece_of(text)
        parts = tokenizer.encode_documents(case.replace("~", "").split("|"))
        expected = [tokenizer.join(tokenizer.tokens(ids)) for ids in parts]
        by_text.append((expected, split(tokenizer, text)))
        corpus = flat_documents(tokenizer.encode_documents([text]))
        sentences = split_sentences(corpus, tokenizer.sentence_end_ids())
        spans = zip(sentences.start, sentences.end, strict=True)
        by_tokens.append((expected, [tokenizer.join(tokenizer.tokens(corpus.tokens[a:b])) for a, b in spans]))
    print(f"sentences found: {share_found(by_text):.0%} in the text, {share_found(by_tokens):.0%} in the tokens")
    assert share_found(by_text) > 0.9
    assert share_found(by_tokens) < 0.7


PARTS = st.one_of(
    st.text(max_size=4),
    st.sampled_from([*SENTENCE_ENDS[:8], *CLOSERS, "\u2026", "\uff0e", " ", "\n", "<br />", "\x1c", "\x85", "\u3000"]),
    st.sampled_from(["Mr.", "e.g.", "A.", "z. B.", "3.5", "word", "Word", "\u3002", "\U0001da88", "[MASK]", "\u0301"]),
    st.sampled_from(OTHER_SENTENCE_ENDS),
)
TEXT = st.lists(PARTS, max_size=12).map("".join)


@settings(deadline=None)
@given(TEXT)
@example('a\u2026"b')
@example('one.\u201d"b')
@example(".\u201d\x1cb .\u201d\x85b")
def test_the_tokens_are_those_of_the_whole_text(text: str) -> None:
    for tokenizer in (tokenizer_of(text, "one word"), tokenizer_of("one word."), wordpiece_of(text, "one word.")):
        (whole,) = tokenizer.encode_documents([text])
        (document,) = tokenizer.encode_sentences([text])
        assert document.ids.tolist() == whole.tolist()
        assert document.is_end.shape == whole.shape


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=4))
def test_a_vocabulary_in_the_making_ends_sentences_as_the_finished_one_does(texts: list[str]) -> None:
    words = BasicEnglishTokenizer()
    added = [words.add_sentences(text) for text in texts]
    tokenizer, to_id = words.finish(1, None)
    for first, second in zip(added, tokenizer.encode_sentences(texts), strict=True):
        assert to_id[first.ids].tolist() == second.ids.tolist()
        assert first.is_end.tolist() == second.is_end.tolist()


def test_ascii_and_other_texts_have_the_same_rules() -> None:
    splitter = SentenceSplitter([*SENTENCE_ENDS, *CLOSERS])
    for case in CASES["English"]:
        text = case.replace("|", "")
        ends = [end for end in splitter.ends(text + " \u00c9") if end <= len(text)]
        assert ends == splitter.ends(text)


@pytest.mark.parametrize("last", ["x", ",", " "])
@pytest.mark.parametrize(
    "unit", [".", "]", "\u201d", "\u2026", ".\u201d", "? ", " ", "A.", ". ]", " \u00bb", "\u3002'"]
)
def test_the_time_is_linear(unit: str, last: str) -> None:
    """If it were quadratic, each text would take minutes."""
    for text in ("." + 100_000 * unit + last, "\u3002" + 100_000 * unit + last):
        for isolated in (["."], [*SENTENCE_ENDS, *CLOSERS]):
            start = time.process_time()
            SentenceSplitter(isolated).ends(text)
            assert time.process_time() - start < 5


def test_closers_close_and_the_case_of_letters_is_known() -> None:
    assert {unicodedata.category(closer) for closer in CLOSERS} <= {"Po", "Pe", "Pf", "Pi"}
    letters = [chr(code) for block in CASED_BLOCKS for code in block]
    assert all(
        letter.islower() or letter.isupper() for letter in letters if unicodedata.category(letter) in ("Lu", "Ll")
    )
