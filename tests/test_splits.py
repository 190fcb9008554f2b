"""Both splits of a corpus get sentence pairs if it has two texts with pairs; if not, the error says what it has."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, normalizers

from babybert.cli import main
from babybert.config import PrepareConfig
from babybert.corpus.demo import generate_reviews
from babybert.data.dataset import Dataset, open_dataset
from babybert.data.prepare import prepare
from babybert.data.sentence_ends import SENTENCE_ENDS
from babybert.errors import DataError

KINDS = ("basic-english", "wordpiece")
# Two sentences of each language, without spaces between them.
LANGUAGES = {
    "Chinese": "我喜欢这部电影。他讨厌音乐\uff01",
    "Japanese": "この映画は良い。音楽は悪い\uff61",
    "Hindi": "फ़िल्म अच्छी है।संगीत बुरा है।",
    "Urdu": "فلم اچھی ہے۔موسیقی بری ہے۔",  # noqa: RUF001
    "Arabic": "هل الفيلم جيد؟الموسيقى سيئة.",
    "Amharic": "ፊልሙ ጥሩ ነው።ሙዚቃው መጥፎ ነው።",
    "Armenian": "Ֆիլմը լավն է։Երաժշտությունը վատն է։",  # noqa: RUF001
    "Burmese": "ရုပ်ရှင် ကောင်းတယ်။ဂီတ ဆိုးတယ်။",
}


def write_documents(folder: Path, texts: list[str]) -> str:
    source = folder / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(source)


def prepare_documents(folder: Path, texts: list[str], **settings: Any) -> Dataset:
    source = write_documents(folder, texts)
    out = folder / "data"
    prepare(PrepareConfig(**{"corpus": "jsonl", "source": (source,), "out": out, "overwrite": True, **settings}))
    return open_dataset(out)


def test_sentence_ends_are_those_of_unicode() -> None:
    """The library's regular expressions know the property, perhaps in an older version of Unicode."""
    characters = "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x110000)]))
    others = set(normalizers.Replace(Regex(r"\p{Sentence_Terminal}"), "").normalize_str(characters))
    assigned = set(normalizers.Replace(Regex(r"\p{Cn}"), "").normalize_str(characters))
    assert {end for end in SENTENCE_ENDS if end in assigned} == set(characters) - others
    assert len(set(SENTENCE_ENDS)) == len(SENTENCE_ENDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_with_sentence_ends_gives_pairs(tmp_path: Path, language: str, kind: str) -> None:
    texts = [f"{LANGUAGES[language]}{i} x{i}.{i} y{i}." for i in range(20)]
    dataset = prepare_documents(tmp_path, texts, tokenizer_kind=kind, validation_fraction=0.3)
    facts = dataset.facts
    assert facts["train"]["sentences"] + facts["validation"]["sentences"] == 4 * len(texts)
    for split in ("train", "validation"):
        assert facts[split]["pairs"] + facts[split].get("pairs_without_negative", 0) == 2 * facts[split]["documents"]
    # A request is tokenized as the documents were.
    first_sentence = re.split(f"(?<=[{''.join(SENTENCE_ENDS)}])", texts[0])[0]
    request = dataset.tokenizer.encode(first_sentence)
    assert request == dataset.tokenizer.encode_documents(texts[:1])[0][: len(request)].tolist()
    assert request[-1] in dataset.tokenizer.sentence_end_ids()
    examples = dataset.examples("train")
    ids = examples.original_ids()
    assert any(ids[first + 1 : first + 1 + len(request)].tolist() == request for first in examples.offsets[:-1])


def test_text_without_spaces_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [f"{chr(0x4E00 + i)}{chr(0x5E00 + i)}。{chr(0x6E00 + i)}{chr(0x7E00 + i)}。" for i in range(40)]
    prepare_documents(tmp_path, texts, validation_fraction=0.3)
    assert "100% of the tokens occur only once" in caplog.text
    assert "--tokenizer-kind wordpiece" in caplog.text
    caplog.clear()
    prepare_documents(tmp_path, texts, validation_fraction=0.3, tokenizer_kind="wordpiece")
    prepare_documents(tmp_path, generate_reviews(40, seed=0), validation_fraction=0.3)
    assert "occur only once" not in caplog.text


WHY_NO_PAIRS = {
    "empty": (["", " ", "\n"], "all 3 documents are empty"),
    "no end": (["one two\nthree four", "five six"], "no document has a sentence end that the tokenizer knows"),
    "one sentence": (["One two.", "Three four."], "none of the 2 documents has two sentences of at least two tokens"),
    "no sentence": (["One", "...", "?!"], "none of the 3 documents has two sentences of at least two tokens"),
    "one document": (["One two. Three four.", "Five six."], "all sentence pairs are from one text or copies of it"),
    "copies": (["One two. Three four."] * 5, "all sentence pairs are from one text or copies of it"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", WHY_NO_PAIRS)
def test_without_pairs_the_error_says_what_was_seen(
    tmp_path: Path, case: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, reason = WHY_NO_PAIRS[case]
    source = write_documents(tmp_path, texts)
    out = tmp_path / "data"
    command = ["prepare", "--corpus", "jsonl", "--source", source, "--out", str(out), "--tokenizer-kind", kind]
    assert main(command) == 3
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert source in message
    assert reason in message
    assert not out.exists()


def test_unknown_tokens_are_named_as_the_reason(tmp_path: Path, demo_folder: Path) -> None:
    texts = ["Wort eins\u3002 Wort zwei\u3002", "Wort drei\u3002 Wort vier\u3002"]
    with pytest.raises(DataError, match="all 4 tokens are unknown to the tokenizer"):
        # The demo's tokenizer knows neither these words nor this full stop, and does not split it off.
        prepare_documents(
            tmp_path, [text.replace("Wort ", "") for text in texts], tokenizer=demo_folder / "tokenizer.json"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_two_texts_are_enough_whatever_the_digests_say(tmp_path: Path, kind: str) -> None:
    texts = ["One two. Three four.", "Five six. Seven eight."]
    for seed in range(5):
        for fraction in (0.01, 0.5, 0.99):
            facts = prepare_documents(
                tmp_path, texts, tokenizer_kind=kind, seed=seed, validation_fraction=fraction
            ).facts
            assert [facts[split]["documents"] for split in ("train", "validation")] == [1, 1]
            assert [facts[split]["pairs"] for split in ("train", "validation")] == [1, 1]


def test_which_text_moves_is_a_function_of_the_digests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [f"Number {i} is good. It is a film." for i in range(12)] + ["No pair here"] * 3
    first = prepare_documents(tmp_path, texts, validation_fraction=0.001)
    assert "one was moved there" in caplog.text
    validation = first.examples("validation").original_ids().tolist()
    assert first.facts["validation"]["documents"] == 1
    shards = first.facts["shards"]
    again = prepare_documents(tmp_path, texts[::-1], validation_fraction=0.001)
    assert again.facts["shards"] == shards
    with_copies = prepare_documents(tmp_path, texts * 2, validation_fraction=0.001)
    assert with_copies.facts["validation"]["documents"] == 2
    pairs = with_copies.examples("validation")
    assert all(np.array_equal(pairs.rows(row, row + 1).original_ids(), validation) for row in range(len(pairs)))


def test_documents_without_pairs_do_not_count_as_a_split(tmp_path: Path) -> None:
    """Held out by the digests are only documents of one sentence; a document with pairs joins them."""
    texts = [f"One sentence {i}." for i in range(200)] + ["One two. Three four.", "Five six. Seven eight."]
    facts = prepare_documents(tmp_path, texts, validation_fraction=0.02).facts
    assert facts["validation"]["documents"] > 1
    assert facts["train"]["pairs"] == facts["validation"]["pairs"] == 1
