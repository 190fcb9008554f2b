"""Tokenize and count in one pass: `basic_english` word by word, with ids in the order of first sight.

`tokenizers` needs two passes over the text, one to count words and one to give them ids, and tracks where in the text
each token was. Training needs neither: here a document is a chain of `bytes` methods and one dictionary look-up a word.
It must be *the same* tokenizer, so all that is not
plain ASCII (lower case and white space of Unicode) is asked of `tokenizers` itself, once a character, and remembered.
"""

import re
from collections import defaultdict

import numpy as np
from tokenizers import normalizers, pre_tokenizers

from babybert.data.tokenizer import FIRST_ORDINARY, RULES, UNK, Tokenizer

NOT_ASCII = re.compile(r"[^\x00-\x7f]")
BYTE_RULES = tuple((old.encode(), new.encode()) for old, new in RULES)


class BasicEnglishTokenizer:
    """The words seen so far, with a provisional id and a count each."""

    def __init__(self) -> None:
        self._ids: defaultdict[bytes, int] = defaultdict()
        self._ids.default_factory = self._ids.__len__  # a word that is new gets the next number
        self._counts = np.zeros(1024, np.int64)
        self._folded: dict[str, str] = {}
        self._lowercase = normalizers.Lowercase()
        self._split = pre_tokenizers.WhitespaceSplit()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, text: str) -> np.ndarray:
        """Count the words of one document and return their provisional ids (int32)."""
        words = self.split(text)
        ids = np.fromiter(map(self._ids.__getitem__, words), np.int32, len(words))
        if len(self._ids) > len(self._counts):
            self._counts = np.append(self._counts, np.zeros(len(self._ids), np.int64))
        np.add.at(self._counts, ids, 1)
        return ids

    def split(self, text: str) -> list[bytes]:
        """The tokens of a text by the rules of `tokenizer.py`, in UTF-8."""
        if not text.isascii():
            text = NOT_ASCII.sub(self._fold, text)
        folded = text.encode().lower()  # of bytes: only A to Z
        for old, new in BYTE_RULES:
            folded = folded.replace(old, new)
        return folded.split()  # of bytes: only at ASCII white space

    def _fold(self, match: re.Match[str]) -> str:
        """A character that is not ASCII in lower case, or a blank if it is white space."""
        character = match[0]
        if character not in self._folded:
            blank = not self._split.pre_tokenize_str(character)
            self._folded[character] = " " if blank else self._lowercase.normalize_str(character)
        return self._folded[character]

    def provisional_ids(self, tokens: tuple[str, ...]) -> np.ndarray:
        """The provisional ids of those of `tokens` that have been seen."""
        return np.array([self._ids[token.encode()] for token in tokens if token.encode() in self._ids], np.int32)

    def finish(self, min_frequency: int, vocab_size: int | None) -> tuple[Tokenizer, np.ndarray]:
        """The tokenizer of these words, most frequent first and equally frequent ones by their spelling.

        Returns:
            it, and an int32 array from provisional id to id, `[UNK]` for words that are too rare or too many.
        """
        words = list(self._ids)
        counts = self._counts[: len(words)]
        often = counts.tolist()
        # UTF-8 sorts as the code points do. No word is spelled like a special token: those have capital letters.
        order = sorted(np.flatnonzero(counts >= min_frequency).tolist(), key=lambda i: (-often[i], words[i]))
        order = order[: None if vocab_size is None else vocab_size - FIRST_ORDINARY]
        to_id = np.full(len(words), UNK, np.int32)
        to_id[order] = np.arange(FIRST_ORDINARY, FIRST_ORDINARY + len(order), dtype=np.int32)
        return Tokenizer.of_words([words[i].decode() for i in order]), to_id
