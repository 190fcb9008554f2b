"""Tokenized documents on disk, read back in an order that has forgotten where they came from.

Pairs need all of a corpus twice: once to know the vocabulary, once to draw second sentences from other documents. So
the ids lie in one file (4 bytes a token), and only 29 bytes a document stay in memory, twice that while they are sorted. A document's place is decided by
a digest of its text and the seed: which split it is in, and when it comes. So copies of a text share a split, blocks
are random samples of the whole corpus, and the order in which an archive or a folder is read changes nothing.
"""

import hashlib
import itertools
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from babybert.data.sentences import TokenizedDocuments

BLOCK_TOKENS = 1 << 21  # the tokens that are in memory at once, with the pairs that are made of them
PIECE_TOKENS = 1 << 16  # a longer document (a book) comes in pieces, so that a block is never of one document alone


class Spool:
    """Append documents, then read them in blocks. Use as a context manager; the file is deleted at the end."""

    def __init__(self, path: Path, seed: int, validation_fraction: float) -> None:
        self._path, self._salt, self._fraction = path, seed.to_bytes(16, "little"), validation_fraction
        self._starts, self._lengths, self._texts, self._places, self._held_out = (
            array("q"),
            array("i"),
            array("Q"),
            array("Q"),
            array("b"),
        )
        self.documents, self.tokens_of = {False: 0, True: 0}, {False: 0, True: 0}

    def __enter__(self) -> "Spool":
        self._file = self._path.open("w+b")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def add(self, text: str, ids: np.ndarray, end_ids: np.ndarray) -> None:
        """Append a document's `ids` (int32); `end_ids` are those of sentence ends, where a long one may be cut."""
        digest = hashlib.blake2b(text.encode(), digest_size=16, salt=self._salt).digest()
        side, text_digest = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
        held_out = side / 2**64 < self._fraction
        start = self.tokens
        self.documents[held_out] += 1
        self.tokens_of[held_out] += len(ids)
        for number, (first, last) in enumerate(_pieces(ids, end_ids)):
            self._starts.append(start + first)
            self._lengths.append(last - first)
            self._texts.append(text_digest)
            self._places.append(text_digest if number == 0 else _place(digest, number))
            self._held_out.append(held_out)
        self._file.write(ids.data)

    @property
    def tokens(self) -> int:
        """How many tokens there are in all."""
        return sum(self.tokens_of.values())

    def blocks(self, held_out: bool, to_id: np.ndarray | None) -> Iterator[TokenizedDocuments]:
        """The documents of one split, `BLOCK_TOKENS` at a time; `to_id` maps the ids that were added to those to give."""
        self._file.flush()
        places = np.frombuffer(self._places, np.uint64)
        chosen = np.flatnonzero(np.frombuffer(self._held_out, np.int8) == held_out)
        chosen = chosen[np.argsort(places[chosen], kind="stable")]
        lengths = np.frombuffer(self._lengths, np.int32)[chosen].astype(np.int64)
        starts, texts = np.frombuffer(self._starts, np.int64)[chosen], np.frombuffer(self._texts, np.uint64)[chosen]
        ends = np.cumsum(lengths)
        # Even blocks: a small last one would have few documents to draw second sentences from.
        count = max(1, round(int(ends[-1]) / BLOCK_TOKENS)) if len(ends) else 0
        cuts = (
            [0, *np.searchsorted(ends, np.arange(1, count) * (ends[-1] / count)).tolist(), len(ends)] if count else []
        )
        for first, last in itertools.pairwise(cuts):
            if first < last:
                tokens = self._read(starts[first:last], lengths[first:last])
                offsets = np.concatenate([[0], np.cumsum(lengths[first:last])])
                yield TokenizedDocuments(tokens if to_id is None else to_id[tokens], offsets, texts[first:last])

    def _read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        pieces = []
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            self._file.seek(4 * start)
            pieces.append(self._file.read(4 * length))
        return np.frombuffer(b"".join(pieces), np.int32)


def _place(digest: bytes, piece: int) -> int:
    return int.from_bytes(hashlib.blake2b(digest + piece.to_bytes(4, "little"), digest_size=8).digest(), "little")


def _pieces(ids: np.ndarray, end_ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """Index ranges of at most `PIECE_TOKENS` that end where a sentence does, if one ends in them at all."""
    first = 0
    while len(ids) - first > PIECE_TOKENS:
        ends = np.flatnonzero(np.isin(ids[first : first + PIECE_TOKENS], end_ids))
        last = first + (int(ends[-1]) + 1 if len(ends) else PIECE_TOKENS)
        yield first, last
        first = last
    yield first, len(ids)
