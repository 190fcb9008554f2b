"""How the documents of a split become blocks, and blocks become shards.

A *block* is a range of places in the order of a split, of about two million tokens. It is the unit of pair making:
pairs and masks are functions of the seed, the split, the number of the block, and its documents. The ranges are chosen
from a histogram: how many tokens have which top bits of their place. It is a sum over documents and takes 16 MB,
whatever the size of the corpus. The blocks do not depend on the format or the size of the files.

A *shard* is one file: some blocks that follow one another, about as many as fit into `--shard-mb`. The size of the file
is estimated, so that all shards can be written at the same time. A small corpus becomes several files too, because a
file is written by one process.
"""

import itertools
from typing import NamedTuple

import numpy as np

from babybert.data.pieces import Pieces

BLOCK_TOKENS = 1 << 21  # tokens that are in memory at once, with the pairs made of them
FEWEST_SHARDS = 8  # of a split that has so many blocks
BIN_BITS = 20
BINS = 1 << BIN_BITS
# Bytes in the file per token of the documents, measured with IMDB's words.
FILE_BYTES_PER_TOKEN = {"csv": 8.1, "csv.gz": 2.0, "csv.zst": 2.2, "parquet": 2.4}


class BlockRange(NamedTuple):
    """Bins of the histogram whose tokens make one block; several if one bin has the tokens of several.

    Attributes:
        first_bin: the first bin.
        end_bin: the bin after the last one.
        blocks: how many blocks. More than one where a text has so many copies that they fill blocks.
        first_block: the number of the first of these blocks in its split.
    """

    first_bin: int
    end_bin: int
    blocks: int
    first_block: int


class PlannedShard(NamedTuple):
    """The blocks of one shard.

    Attributes:
        held_out: whether it is of the validation split.
        number: its number in the split, which is in the name of its file.
        ranges: its blocks.
        tokens: how many tokens they have.
    """

    held_out: bool
    number: int
    ranges: tuple[BlockRange, ...]
    tokens: int


class Histogram:
    """How many tokens have which place, by split: a sum over all documents."""

    def __init__(self) -> None:
        self.tokens = np.zeros((2, BINS), np.int64)

    def add(self, bins: np.ndarray, tokens: np.ndarray) -> None:
        """Add counts; `bins` are distinct indices into the flat array."""
        self.tokens.reshape(-1)[bins] += tokens


def bins_of(keys: np.ndarray) -> np.ndarray:
    """Return the bin of each place (int64)."""
    return (keys >> np.uint64(64 - BIN_BITS)).astype(np.int64)


def count_bins(pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
    """Return the bins in which pieces are, as indices into the flat histogram, and the tokens in each (int64)."""
    bins, indices = np.unique(bins_of(pieces.keys) + BINS * pieces.held_out, return_inverse=True)
    return bins, np.bincount(indices, pieces.lengths, len(bins)).astype(np.int64)


def plan_blocks(tokens: np.ndarray) -> list[BlockRange]:
    """Cut the bins of a split, which have this many tokens each, into blocks of about equal size.

    A small last block would have few documents to draw second sentences from.
    """
    ends = np.cumsum(tokens)
    total = int(ends[-1])
    blocks = max(1, round(total / BLOCK_TOKENS))
    cuts = (np.searchsorted(ends, np.arange(1, blocks) * (total / blocks)) + 1).tolist()
    block_ranges: list[BlockRange] = []
    for block, (first, end) in enumerate(itertools.pairwise([0, *cuts, BINS])):
        if first < end:
            block_ranges.append(BlockRange(first, end, 1, block))
        else:  # another block of the bin that ends here
            last = block_ranges.pop()
            block_ranges.append(last._replace(blocks=last.blocks + 1))
    return block_ranges


def plan_shards(histogram: Histogram, file_format: str, shard_bytes: int, duplicates: int) -> list[PlannedShard]:
    """Return the shards of both splits, those of the training split first.

    Args:
        histogram: the tokens of the corpus by place.
        file_format: see `FILE_BYTES_PER_TOKEN`.
        shard_bytes: about how large a file is to be, if there are many.
        duplicates: how many times training pairs are written.
    """
    shards = []
    for held_out, copies in ((False, duplicates), (True, 1)):
        tokens = histogram.tokens[int(held_out)]
        block_ranges = plan_blocks(tokens)
        file_bytes = int(tokens.sum()) * FILE_BYTES_PER_TOKEN[file_format] * copies
        count = min(max(FEWEST_SHARDS, round(file_bytes / shard_bytes)), len(block_ranges))
        bounds = [index * len(block_ranges) // count for index in range(count + 1)]
        for number, (first, last) in enumerate(itertools.pairwise(bounds)):
            blocks = tuple(block_ranges[first:last])
            shard_tokens = int(tokens[blocks[0].first_bin : blocks[-1].end_bin].sum())
            shards.append(PlannedShard(held_out, number, blocks, shard_tokens))
    return shards
