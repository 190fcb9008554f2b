"""Jobs that make blocks: find out which documents have pairs, write a shard.

The tokens of a batch may have provisional ids. `FinalIds` makes them final.
"""

import itertools
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from babybert.data.block_plan import PlannedShard, bins_of, count_bins
from babybert.data.engine import Arrays
from babybert.data.masking import mask_tokens
from babybert.data.pairs import SPECIALS_IN_A_PAIR, assemble, make_pairs
from babybert.data.pieces import Pieces, join
from babybert.data.runs import make_runs
from babybert.data.sentences import TokenizedDocuments, split_after
from babybert.data.shard_upload import ShardUpload, UploadedShard
from babybert.data.shards import Shard
from babybert.data.split_statistics import SplitStatistics
from babybert.data.table import Examples
from babybert.data.tokenize_batch import count_documents
from babybert.data.tokenizer import UNK

ROWS_OF_A_BLOCK = 1 << 32  # the rows of block b are numbered from b times this, for their masks


class MovedText(NamedTuple):
    """A text that is, with all its copies, in another split than its digest says.

    Attributes:
        text: its number in `Pieces.texts`.
        held_out: where it is.
    """

    text: int
    held_out: bool


class PairSurvey(NamedTuple):
    """Which texts of a split have sentence pairs.

    Attributes:
        first: place and number of the first text that has; None if there is none.
        has_another: whether another text has.
    """

    first: tuple[int, int] | None = None
    has_another: bool = False

    def merge(self, other: "PairSurvey") -> "PairSurvey":
        """Return the survey of both sets of documents together."""
        firsts = [survey.first for survey in (self, other) if survey.first is not None]
        texts = {text for _, text in firsts}
        return PairSurvey(min(firsts, default=None), self.has_another or other.has_another or len(texts) > 1)


class BatchSurvey(NamedTuple):
    """What the sentences of a batch are like.

    Attributes:
        pairs: the texts that have pairs, by split (training, held out).
        unknown: how many tokens are `[UNK]`.
        ends: how many tokens are sentence ends that are in the vocabulary.
    """

    pairs: tuple[PairSurvey, PairSurvey]
    unknown: int
    ends: int


def final_pieces(arrays: Arrays, word_ids: Arrays | None, final_ids: Arrays | None) -> Pieces:
    """Return the pieces of a batch with final ids.

    Args:
        arrays: the batch's `Pieces`.
        word_ids: for each provisional id of the batch, that of the merged vocabulary; None if the ids are final.
        final_ids: the final id of each provisional id of the merged vocabulary; None if the ids are final.
    """
    pieces = Pieces(*arrays)
    if word_ids is None or final_ids is None:
        return pieces
    tokens = final_ids[0][word_ids[0]][pieces.tokens]
    return pieces._replace(tokens=tokens, is_end=pieces.is_end & (tokens != UNK))


def survey(arrays: Arrays, word_ids: Arrays | None, final_ids: Arrays | None) -> tuple[BatchSurvey, list[Arrays]]:
    """Find out which documents of a batch have sentence pairs."""
    pieces = final_pieces(arrays, word_ids, final_ids)
    sentences = split_after(_documents(pieces), pieces.is_end)
    has_next = sentences.document[1:] == sentences.document[:-1]
    with_pairs = np.unique(sentences.document[1:][has_next])
    surveys = []
    for held_out in (False, True):
        in_split = with_pairs[pieces.held_out[with_pairs] == held_out]
        places = zip(pieces.keys[in_split].tolist(), pieces.texts[in_split].tolist(), strict=True)
        surveys.append(PairSurvey(min(places, default=None), len(np.unique(pieces.texts[in_split])) > 1))
    unknown = int(np.count_nonzero(pieces.tokens == UNK))
    return BatchSurvey((surveys[0], surveys[1]), unknown, int(np.count_nonzero(pieces.is_end))), []


def _documents(pieces: Pieces) -> TokenizedDocuments:
    return TokenizedDocuments(pieces.tokens, np.append(pieces.starts, len(pieces.tokens)), pieces.texts)


def count_after_move(arrays: Arrays, moved: MovedText) -> tuple[tuple[np.ndarray, ...], list[Arrays]]:
    """Count documents, tokens, and the tokens in bins, as in `BatchSummary`, after a text has moved."""
    pieces = move_text(Pieces(*arrays), moved)
    return (*count_documents(pieces), *count_bins(pieces)), []


def move_text(pieces: Pieces, moved: MovedText | None) -> Pieces:
    """Return the pieces with `moved` in the split in which it has to be."""
    if moved is None:
        return pieces
    return pieces._replace(held_out=np.where(pieces.texts == np.uint64(moved.text), moved.held_out, pieces.held_out))


class ShardJob(NamedTuple):
    """What a shard is made with, besides its documents.

    Attributes:
        shard: its blocks.
        folder: where its file is written, under a name that no other job uses; None for a temporary file.
        file_format: one of `FORMATS`.
        seed: see `PrepareConfig`.
        duplicates: how often each training pair is written; see `PrepareConfig`.
        max_positions: see `PrepareConfig`.
        segments: see `PrepareConfig`.
        vocab_size: the size of the vocabulary.
        upload: uploads the file, which is then deleted; None to leave it in the folder or, without one, to return it.
    """

    shard: PlannedShard
    folder: Path | None
    file_format: str
    seed: int
    duplicates: int
    max_positions: int
    segments: str
    vocab_size: int
    upload: ShardUpload | None = None


class WrittenShard(NamedTuple):
    """A shard that a job has made.

    Attributes:
        written: its file, or the object that was uploaded; None if the content is returned as data.
        facts: what `Shard.close` returned.
        statistics: the counts over its pairs.
    """

    written: Path | UploadedShard | None
    facts: dict[str, Any]
    statistics: SplitStatistics


def write_shard(job: ShardJob, *parts: Arrays) -> tuple[WrittenShard, list[Arrays]]:
    """Make the pairs of a shard and write them.

    Args:
        job: what to make.
        parts: the `Pieces` of all batches for this shard.

    Returns:
        what was made. The data is the content of the file (uint8), if there is neither a folder nor an upload.
    """
    folder = job.folder or Path(tempfile.gettempdir())
    path = folder / f".{uuid.uuid4().hex}"
    statistics = SplitStatistics(job.vocab_size)
    is_left = False
    try:
        shard = Shard(path, job.file_format, job.vocab_size)
        for examples in _make_examples(job, join([Pieces(*part) for part in parts]), statistics):
            shard.add(examples)
            statistics.add(examples)
        facts = shard.close()
        if job.upload is not None:
            return WrittenShard(job.upload.put(path), facts, statistics), []
        if job.folder is None:
            return WrittenShard(None, facts, statistics), [[np.fromfile(path, np.uint8)]]
        is_left = True
        return WrittenShard(path, facts, statistics), []
    finally:
        if not is_left:
            path.unlink(missing_ok=True)


def _make_examples(job: ShardJob, pieces: Pieces, statistics: SplitStatistics) -> Iterator[Examples]:
    """Yield the masked pairs of each block. Training pairs come `duplicates` times, with other masks each time.

    Counts sentences and pairs without a negative in `statistics`.
    """
    split_index = int(job.shard.held_out)
    for block_index, block_pieces in _blocks(job.shard, pieces):
        block = _documents(block_pieces)
        sentences = split_after(block, block_pieces.is_end)
        if job.segments == "runs":
            runs = make_runs(sentences, job.max_positions - SPECIALS_IN_A_PAIR, job.seed, split_index, block_index)
            spans, formats = runs.segments, runs.formats
        else:
            spans, formats = sentences, None
        pairs = make_pairs(block, spans, job.seed, split_index, block_index, formats)
        ids, segments, offsets = assemble(block, spans, pairs, job.max_positions)
        rows = np.arange(len(pairs)) + block_index * ROWS_OF_A_BLOCK
        for copy in range(1 if job.shard.held_out else job.duplicates):
            # Even epochs for training pairs, odd ones for held-out pairs: equal rows get different masks.
            epoch = 2 * copy + split_index
            masked_ids, labels = mask_tokens(ids, offsets, job.vocab_size, job.seed, epoch, rows)
            yield Examples(masked_ids, labels, segments, offsets, pairs.is_next)
        statistics.sentences += len(sentences)
        statistics.without_negative += pairs.without_negative


def _blocks(shard: PlannedShard, pieces: Pieces) -> Iterator[tuple[int, Pieces]]:
    """Yield the number and the documents of each block of a shard."""
    order = np.lexsort((pieces.digests, pieces.texts, pieces.keys))
    bins = bins_of(pieces.keys[order])
    for block_range in shard.ranges:
        first, end = np.searchsorted(bins, [block_range.first_bin, block_range.end_bin]).tolist()
        in_range = order[first:end]
        cuts = block_bounds(pieces.lengths[in_range], block_range.blocks)
        for block, (start, stop) in enumerate(itertools.pairwise(cuts)):
            yield block_range.first_block + block, pieces.take(in_range[start:stop])


def block_bounds(lengths: np.ndarray, blocks: int) -> list[int]:
    """Return where blocks begin in pieces of these lengths, and where the last one ends. They have about equal size."""
    if blocks == 1:
        return [0, len(lengths)]
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(1, blocks) * (total / blocks)).tolist()
    return [0, *cuts, len(ends)]
