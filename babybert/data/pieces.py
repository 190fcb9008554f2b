"""Tokenized documents as jobs pass them on: flat arrays, cut into pieces, each with its place in the corpus.

The split of a document and its place come from a digest of its text and the seed. So copies of a text are in the same
split, neighbours in the order are a random sample of the corpus, and the order in which an archive or a folder is read
has no influence.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from babybert.data.pairs import ranges

PIECE_TOKENS = 1 << 16  # longer documents (books) are cut into pieces, so that a block always has many documents


# The arrays of `Pieces` with one value a piece.
PIECE_TYPE = [("lengths", "i4"), ("keys", "u8"), ("texts", "u8"), ("digests", "u8"), ("held_out", "?")]


class Digest(NamedTuple):
    """The digest of a text and the seed, as two numbers of 64 bits.

    Attributes:
        split: decides which split the document is in.
        text: stands for the text; copies have the same.
    """

    split: int
    text: int

    def is_held_out(self, validation_fraction: float) -> bool:
        """Whether a document is in the validation split."""
        return self.split / 2**64 < validation_fraction


def digest_of(text: str, seed: int) -> Digest:
    """Return the digest of a document."""
    digest = hashlib.blake2b(text.encode(), digest_size=16, salt=seed.to_bytes(16, "little")).digest()
    return Digest(int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"))


class Pieces(NamedTuple):
    """Documents, one after the other. A long one is several pieces, of which only the first has `keys == texts`.

    Attributes:
        tokens: the token ids of all pieces (int32).
        is_end: which of them are sentence ends (bool); see `TokenizedText`.
        lengths: how many tokens each piece has (int32).
        keys: the place of each piece in the order of its split (uint64).
        texts: a number for the text of its document, `Digest.text` (uint64).
        digests: `Digest.split` of its document (uint64); orders texts that have one number by accident.
        held_out: whether it is in the validation split.
    """

    tokens: np.ndarray
    is_end: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray
    texts: np.ndarray
    digests: np.ndarray
    held_out: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Where in `tokens` each piece starts (int64)."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])[:-1]

    @property
    def is_first(self) -> np.ndarray:
        """Which pieces are the first of their document."""
        return np.asarray(self.keys == self.texts)

    def take(self, order: np.ndarray) -> "Pieces":
        """Return the pieces with these indices, in this order."""
        taken = ranges(self.starts[order], self.lengths[order].astype(np.int64))
        return Pieces(self.tokens[taken], self.is_end[taken], *(array[order] for array in self[2:]))


def join(all_pieces: Sequence[Pieces]) -> Pieces:
    """Put the pieces of several jobs one after the other. There must be at least one."""
    return Pieces(*(np.concatenate(arrays) for arrays in zip(*all_pieces, strict=True)))


class PiecesBuilder:
    """Collects the documents of one batch.

    Args:
        seed: see `PrepareConfig`.
        validation_fraction: see `PrepareConfig`.
        end_ids: returns the ids of the sentence ends (int32); None if each document comes with its sentence ends.
    """

    def __init__(self, seed: int, validation_fraction: float, end_ids: Callable[[], np.ndarray] | None = None) -> None:
        self._seed = seed
        self._validation_fraction = validation_fraction
        self._end_ids = end_ids
        self._tokens = [np.zeros(0, np.int32)]
        self._is_end = [np.zeros(0, bool)]
        self._pieces: list[tuple[int, int, int, int, bool]] = []
        self.fingerprint = 0

    def add(self, text: str, ids: np.ndarray, is_end: np.ndarray | None = None) -> None:
        """Add a document.

        Args:
            text: its text, which determines its split and its place.
            ids: its token ids (int32).
            is_end: after which of them a sentence ends (bool), if there are no `end_ids`.
        """
        digest = digest_of(text, self._seed)
        held_out = digest.is_held_out(self._validation_fraction)
        for piece, length in enumerate(self._cut(ids, is_end)):
            key = digest.text if piece == 0 else _piece_key(digest, piece)
            self._pieces.append((length, key, digest.text, digest.split, held_out))
        self._tokens.append(ids)
        if is_end is not None:
            self._is_end.append(is_end)
        self.fingerprint = add_fingerprints(self.fingerprint, digest.split << 64 | digest.text)

    def finish(self) -> Pieces:
        """Return all documents as arrays."""
        tokens = np.concatenate(self._tokens)
        # Once for all documents: a call for each would take a third of the time of tokenizing them.
        is_end = np.isin(tokens, self._end_ids()) if self._end_ids else np.concatenate(self._is_end)
        columns = np.array(self._pieces, PIECE_TYPE)
        return Pieces(tokens, is_end, *(np.ascontiguousarray(columns[name]) for name in columns.dtype.names or ()))

    def _cut(self, ids: np.ndarray, is_end: np.ndarray | None) -> Iterator[int]:
        """Yield lengths of at most `PIECE_TOKENS` tokens that end with a sentence, if a sentence ends in them."""
        start = 0
        while len(ids) - start > PIECE_TOKENS:
            if is_end is None:
                assert self._end_ids is not None
                is_end = np.isin(ids, self._end_ids())
            sentence_ends = np.flatnonzero(is_end[start : start + PIECE_TOKENS])
            length = int(sentence_ends[-1]) + 1 if len(sentence_ends) else PIECE_TOKENS
            yield length
            start += length
        yield len(ids) - start


def add_fingerprints(first: int, second: int) -> int:
    """Return the fingerprint of two sets of documents together: the sum of their digests, whatever their order."""
    return (first + second) % (1 << 128)


def _piece_key(digest: Digest, piece: int) -> int:
    """The place of another piece than the first: unrelated, so that the pieces are spread over the blocks."""
    content = b"".join(number.to_bytes(8, "little") for number in digest) + piece.to_bytes(4, "little")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
