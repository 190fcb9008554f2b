"""Tokenized documents in a file on disk, read back in blocks and in an order that does not depend on their source.

Pair making needs the whole corpus twice: the vocabulary must be complete before ids are final, and second sentences
come from other documents. So the ids are written to one file (4 bytes per token). Memory holds 29 bytes per document,
and twice that while they are sorted.

The split of a document and its place in the order come from a digest of its text and the seed. So copies of a text are
in the same split, each block is a random sample of the corpus, and the order in which an archive or a folder is read
has no influence. `move` corrects the splits of a corpus that is too small for chance.
"""

import hashlib
import itertools
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from babybert.data.sentences import TokenizedDocuments

BLOCK_TOKENS = 1 << 21  # tokens that are in memory at once, with the pairs made of them
PIECE_TOKENS = 1 << 16  # longer documents (books) are cut into pieces, so that a block always has many documents
ID_BYTES = 4


class Spool:
    """Append documents, then read them in blocks. A context manager; the file is deleted on exit.

    Attributes:
        documents: how many documents were added, by split (False: training, True: held out).
        tokens_of: how many tokens were added, by split.
    """

    def __init__(self, path: Path, seed: int, validation_fraction: float) -> None:
        self._path = path
        self._salt = seed.to_bytes(16, "little")
        self._validation_fraction = validation_fraction
        # One entry per piece of a document. Arrays of machine integers: lists would take several times the memory.
        self._starts = array("q")
        self._lengths = array("i")
        self._texts = array("Q")
        self._sort_keys = array("Q")
        self._held_out = array("b")
        self.documents = {False: 0, True: 0}
        self.tokens_of = {False: 0, True: 0}

    def __enter__(self) -> "Spool":
        self._file = self._path.open("w+b")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def add(self, text: str, ids: np.ndarray, end_ids: np.ndarray) -> None:
        """Append a document.

        Args:
            text: its text, which determines its split and its place.
            ids: its token ids (int32).
            end_ids: the ids of sentence ends, after which a long document may be cut.
        """
        digest = hashlib.blake2b(text.encode(), digest_size=16, salt=self._salt).digest()
        split_digest = int.from_bytes(digest[:8], "little")
        text_digest = int.from_bytes(digest[8:], "little")
        held_out = split_digest / 2**64 < self._validation_fraction
        start = self.tokens
        self.documents[held_out] += 1
        self.tokens_of[held_out] += len(ids)
        for piece, (piece_start, piece_end) in enumerate(_cut(ids, end_ids)):
            self._starts.append(start + piece_start)
            self._lengths.append(piece_end - piece_start)
            self._texts.append(text_digest)
            # The other pieces of a document get unrelated keys, so that they are spread over the blocks.
            self._sort_keys.append(text_digest if piece == 0 else _piece_key(digest, piece))
            self._held_out.append(held_out)
        self._file.write(ids.data)

    def move(self, text: int, held_out: bool) -> None:
        """Move a text, given by its number in `TokenizedDocuments.texts`, and all its copies from the other split."""
        pieces = np.flatnonzero(np.frombuffer(self._texts, np.uint64) == text)
        np.frombuffer(self._held_out, np.int8)[pieces] = held_out
        copies = int(np.count_nonzero(np.frombuffer(self._sort_keys, np.uint64)[pieces] == text))  # their first pieces
        tokens = int(np.frombuffer(self._lengths, np.int32)[pieces].sum())
        for split, sign in ((held_out, 1), (not held_out, -1)):
            self.documents[split] += sign * copies
            self.tokens_of[split] += sign * tokens

    @property
    def tokens(self) -> int:
        """How many tokens were added in total."""
        return sum(self.tokens_of.values())

    def blocks(self, held_out: bool, final_ids: np.ndarray | None) -> Iterator[TokenizedDocuments]:
        """Yield the documents of one split, about `BLOCK_TOKENS` at a time.

        `final_ids` maps the ids that were added to those that are returned; None leaves them as they are.
        """
        self._file.flush()
        in_split = np.flatnonzero(np.frombuffer(self._held_out, np.int8) == held_out)
        sort_keys = np.frombuffer(self._sort_keys, np.uint64)[in_split]
        order = in_split[np.argsort(sort_keys, kind="stable")]
        starts = np.frombuffer(self._starts, np.int64)[order]
        lengths = np.frombuffer(self._lengths, np.int32)[order].astype(np.int64)
        texts = np.frombuffer(self._texts, np.uint64)[order]
        for first, last in itertools.pairwise(_block_bounds(lengths)):
            if first == last:
                continue
            tokens = self._read(starts[first:last], lengths[first:last])
            offsets = np.concatenate([[0], np.cumsum(lengths[first:last])])
            yield TokenizedDocuments(tokens if final_ids is None else final_ids[tokens], offsets, texts[first:last])

    def _read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        contents = []
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            self._file.seek(ID_BYTES * start)
            contents.append(self._file.read(ID_BYTES * length))
        return np.frombuffer(b"".join(contents), np.int32)


def _block_bounds(lengths: np.ndarray) -> list[int]:
    """Return where blocks of documents of these lengths begin, and where the last one ends.

    Blocks have about equally many tokens: a small last one would have few documents to draw second sentences from.
    """
    if not len(lengths):
        return []
    ends = np.cumsum(lengths)
    total = ends[-1]
    blocks = max(1, round(int(total) / BLOCK_TOKENS))
    cuts = np.searchsorted(ends, np.arange(1, blocks) * (total / blocks)).tolist()
    return [0, *cuts, len(ends)]


def _piece_key(digest: bytes, piece: int) -> int:
    return int.from_bytes(hashlib.blake2b(digest + piece.to_bytes(4, "little"), digest_size=8).digest(), "little")


def _cut(ids: np.ndarray, end_ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield index ranges of at most `PIECE_TOKENS` tokens that end with a sentence, if a sentence ends in them."""
    start = 0
    while len(ids) - start > PIECE_TOKENS:
        sentence_ends = np.flatnonzero(np.isin(ids[start : start + PIECE_TOKENS], end_ids))
        end = start + (int(sentence_ends[-1]) + 1 if len(sentence_ends) else PIECE_TOKENS)
        yield start, end
        start = end
    yield start, len(ids)
