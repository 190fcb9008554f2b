"""Tokenize with the `basic_english` rules and count words, in one pass over the corpus.

Several processes can share the work: each has a `BasicEnglishTokenizer` of its own, and `merge` puts what they counted
together. Their provisional ids differ, but the final ids do not.

`tokenizers` needs two passes, one to count the words and one to look up their ids, and records where in the text each
token was, which pretraining does not use. Here a document takes a few `bytes` methods and one dictionary look-up per
word; a word's id is provisional until `finish` sorts the vocabulary.

The result must equal that of `tokenizers`. So lower case and white space outside ASCII are determined by `tokenizers`
itself, once per character, and cached.
"""

import itertools
import re
from collections import defaultdict

import numpy as np
from tokenizers import normalizers, pre_tokenizers

from babybert.data.sentence_ends import ASCII_SENTENCE_ENDS, OTHER_SENTENCE_ENDS, SENTENCE_ENDS
from babybert.data.sentence_splitter import SentenceSplitter
from babybert.data.sentences import TokenizedText, ends_after
from babybert.data.tokenizer import FIRST_ORDINARY, MAX_WORD_CHARACTERS, RULES, UNK, Tokenizer

NON_ASCII = re.compile(r"[^\x00-\x7f]")
BYTE_RULES = tuple((old.encode(), new.encode()) for old, new in RULES)
LONG_WORD = b"[UNK]"  # stands for each word of more than MAX_WORD_CHARACTERS; real words are in lower case
PART_END = b"\xff"  # does not occur in UTF-8
SPLITTER = SentenceSplitter([*SENTENCE_ENDS, "'", '"', ")"])  # `"` is no token but is dropped
INITIAL_CAPACITY = 1024  # words; the array of counts grows as needed


class BasicEnglishTokenizer:
    """The words seen so far, with a provisional id (the order of first occurrence) and a count each."""

    def __init__(self) -> None:
        self._ids: defaultdict[bytes, int] = defaultdict()
        self._ids.default_factory = self._ids.__len__  # looking up a new word gives it the next id
        self._counts = np.zeros(INITIAL_CAPACITY, np.int64)
        self._folded: dict[str, str] = {}
        self._sentence_ends = [end.encode() for end in ASCII_SENTENCE_ENDS]  # `_fold` adds others that it meets
        self._lowercase = normalizers.Lowercase()
        self._split_white_space = pre_tokenizers.WhitespaceSplit()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, text: str) -> np.ndarray:
        """Count the words of one document and return their provisional ids (int32)."""
        return self._count(self.split(text))

    def add_sentences(self, text: str) -> TokenizedText:
        """Do what `add` does, and find out where the sentences end in the text."""
        parts = self._split(SPLITTER.split(text))
        return TokenizedText(self._count(list(itertools.chain(*parts))), ends_after(parts))

    def _count(self, words: list[bytes]) -> np.ndarray:
        if max(map(len, words), default=0) > MAX_WORD_CHARACTERS:
            words = [LONG_WORD if len(word.decode()) > MAX_WORD_CHARACTERS else word for word in words]
        ids = np.fromiter(map(self._ids.__getitem__, words), np.int32, len(words))
        self._make_room()
        np.add.at(self._counts, ids, 1)
        return ids

    def _make_room(self) -> None:
        if len(self._ids) > len(self._counts):
            self._counts = np.append(self._counts, np.zeros(len(self._ids), np.int64))

    def split(self, text: str) -> list[bytes]:
        """Split a text into tokens (UTF-8) by the rules of `tokenizer.py`."""
        (words,) = self._split([text])
        return words

    def _split(self, parts: list[str]) -> list[list[bytes]]:
        """Split each part of a text into tokens. All parts are split together, which is faster."""
        parts = [part if part.isascii() else NON_ASCII.sub(self._fold, part) for part in parts]
        # bytes.lower changes only A to Z; `_fold` has done the rest.
        folded = PART_END.join(map(str.encode, parts)).lower()
        for old, new in BYTE_RULES:
            folded = folded.replace(old, new)
        return [part.split() for part in folded.split(PART_END)]  # bytes.split splits only at ASCII white space

    def _fold(self, match: re.Match[str]) -> str:
        """Return a character in lower case, a line feed if it is white space, a sentence end between spaces."""
        character = match[0]
        if character not in self._folded:
            is_white_space = not self._split_white_space.pre_tokenize_str(character)
            # Not a space: `<br`, a no-break space and `/>` are two words and no `<br />`.
            self._folded[character] = "\n" if is_white_space else self._lowercase.normalize_str(character)
            if character in OTHER_SENTENCE_ENDS:
                self._folded[character] = f" {character} "
                self._sentence_ends.append(character.encode())
        return self._folded[character]

    def sentence_end_ids(self) -> np.ndarray:
        """Return the provisional ids (int32) of the sentence ends that have been seen."""
        return np.array([self._ids[end] for end in self._sentence_ends if end in self._ids], np.int32)

    def share_seen_once(self) -> float:
        """Return the share of the tokens so far, sentence ends left out, whose word occurs only once."""
        counts = np.delete(self._counts[: len(self._ids)], self.sentence_end_ids())
        return float(np.count_nonzero(counts == 1) / max(counts.sum(), 1))

    @property
    def long_words(self) -> int:
        """How many words had more than `MAX_WORD_CHARACTERS` characters."""
        return int(self._counts[self._ids[LONG_WORD]]) if LONG_WORD in self._ids else 0

    @property
    def words(self) -> list[bytes]:
        """The words so far (UTF-8), in the order of their provisional ids."""
        return list(self._ids)

    @property
    def counts(self) -> np.ndarray:
        """How often each word has occurred (int64)."""
        return self._counts[: len(self._ids)]

    @property
    def other_sentence_ends(self) -> list[bytes]:
        """The sentence ends outside ASCII that have been seen."""
        return self._sentence_ends[len(ASCII_SENTENCE_ENDS) :]

    def merge(self, words: list[bytes], counts: np.ndarray, other_sentence_ends: list[bytes]) -> np.ndarray:
        """Add what another `BasicEnglishTokenizer` has counted. Return the provisional ids (int32) of its words."""
        ids = np.fromiter(map(self._ids.__getitem__, words), np.int32, len(words))
        self._make_room()
        self._counts[ids] += counts  # its words are distinct
        self._sentence_ends += [end for end in other_sentence_ends if end not in self._sentence_ends]
        return ids

    def finish(self, min_frequency: int, vocab_size: int | None) -> tuple[Tokenizer, np.ndarray]:
        """Make the vocabulary: the most frequent words first, equally frequent ones sorted by spelling.

        Args:
            min_frequency: rarer words become `[UNK]`.
            vocab_size: the most tokens to keep, special tokens included; None keeps all.

        Returns:
            the tokenizer, and an array (int32) from provisional id to final id.
        """
        words = list(self._ids)
        counts = self._counts[: len(words)]
        frequent = np.flatnonzero(counts >= min_frequency).tolist()
        candidates = [word_id for word_id in frequent if words[word_id] != LONG_WORD]
        # UTF-8 sorts as code points do. No word equals a special token: words are lowercase.
        by_spelling = np.array(sorted(candidates, key=words.__getitem__), np.int64)
        order = by_spelling[np.argsort(-counts[by_spelling], kind="stable")].tolist()
        if vocab_size is not None:
            order = order[: vocab_size - FIRST_ORDINARY]
        final_ids = np.full(len(words), UNK, np.int32)
        final_ids[order] = np.arange(FIRST_ORDINARY, FIRST_ORDINARY + len(order), dtype=np.int32)
        splits_other_ends = len(self._sentence_ends) > len(ASCII_SENTENCE_ENDS)
        return Tokenizer.of_words([words[word_id].decode() for word_id in order], splits_other_ends), final_ids
