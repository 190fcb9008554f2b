"""Send the documents of all batches to their shards.

A job takes some batches and returns one piece of data for each shard. The driver holds a handle for each piece, so one
pass needs batches x shards handles: 45 million for 100 GB of text, which no driver has room for. Therefore a job takes
several batches if there are many, and if there are also many shards, the documents are sent in two passes: first to
groups of consecutive shards, then, group by group, to the shards. The second pass costs writing and reading the tokens
once more. Which documents a shard gets does not depend on the passes.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from babybert.data.block_plan import BINS, PlannedShard, bins_of
from babybert.data.blocks import MovedText, final_pieces, move_text
from babybert.data.engine import Arrays, Engine
from babybert.data.pieces import Pieces, join
from babybert.data.tokenize_corpus import TokenizedCorpus

MOST_HANDLES = 50_000  # of one pass over all shards; with Ray, each takes 2.4 kB of the driver's memory
JOBS = 64  # among which the batches are divided, up to MOST_BATCHES_PER_JOB; each piece of data costs Ray 2 ms
MOST_BATCHES_PER_JOB = 16  # at most 256 MB of text, of which the tokens take about as much memory


class BinRange(NamedTuple):
    """Where the documents of some consecutive shards are. Bins of the validation split come after all others.

    Attributes:
        first: the first bin.
        end: the bin after the last one.
    """

    first: int
    end: int

    @classmethod
    def of(cls, shards: list[PlannedShard]) -> "BinRange":
        """Return the range from the first of these shards to the last."""
        first, last = shards[0], shards[-1]
        return cls(first.ranges[0].first_bin + BINS * first.held_out, last.ranges[-1].end_bin + BINS * last.held_out)


class ShufflePlan(NamedTuple):
    """How documents are sent.

    Attributes:
        batches_per_job: how many batches a job of the first pass takes.
        groups: how many groups of shards there are; one if a single pass is enough.
    """

    batches_per_job: int
    groups: int


def plan_shuffle(batches: int, shards: int) -> ShufflePlan:
    """Return a plan with which neither the jobs' memory nor the number of handles gets too large."""
    batches_per_job = min(MOST_BATCHES_PER_JOB, math.ceil(batches / JOBS))
    jobs = math.ceil(batches / batches_per_job)
    if jobs * shards <= MOST_HANDLES:
        return ShufflePlan(batches_per_job, 1)
    # A group has `shards / groups` shards, and `jobs / groups` jobs in the second pass.
    groups = math.ceil(math.sqrt(jobs * shards / MOST_HANDLES))
    return ShufflePlan(batches_per_job, min(groups, shards))


def partition(
    ranges: list[BinRange], moved: MovedText | None, final_ids: Arrays | None, *batches: Arrays | None
) -> tuple[None, list[Arrays]]:
    """Send the documents of some batches to ranges of bins. The data is the `Pieces` for each range.

    Args:
        ranges: the ranges, which do not overlap, in ascending order.
        moved: a text that is in the other split.
        final_ids: see `final_pieces`.
        batches: the `Pieces` and the word ids of each batch; see `final_pieces`.
    """
    all_pieces = []
    for arrays, word_ids in zip(batches[::2], batches[1::2], strict=True):
        assert arrays is not None
        all_pieces.append(final_pieces(arrays, word_ids, final_ids))
    return None, _split(move_text(join(all_pieces), moved), ranges)


def partition_again(ranges: list[BinRange], *parts: Arrays) -> tuple[None, list[Arrays]]:
    """Send documents that were sent to a group to the ranges of its shards; see `partition`."""
    return None, _split(join([Pieces(*part) for part in parts]), ranges)


def _split(pieces: Pieces, ranges: list[BinRange]) -> list[Arrays]:
    """Return the pieces in each range, in the order in which they come. Others are left out."""
    bins = bins_of(pieces.keys) + BINS * pieces.held_out
    range_of = np.searchsorted([bin_range.first for bin_range in ranges], bins, side="right") - 1
    ends = np.array([*(bin_range.end for bin_range in ranges), 0])
    range_of[bins >= ends[range_of]] = -1
    order = np.argsort(range_of, kind="stable")
    cuts = np.searchsorted(range_of[order], np.arange(len(ranges) + 1))
    return [pieces.take(order[first:end]) for first, end in itertools.pairwise(cuts.tolist())]


def shuffle(
    tokenized: TokenizedCorpus, moved: MovedText | None, shards: list[PlannedShard], engine: Engine
) -> Iterator[list[Any]]:
    """Yield the handles of the parts of each shard, in the order of the shards. The batches are deleted.

    The documents of a group are sent to its shards when the first of them is asked for.
    """
    if not shards:
        return
    plan = plan_shuffle(len(tokenized.batches), len(shards))
    bounds = [group * len(shards) // plan.groups for group in range(plan.groups + 1)]
    groups = [shards[first:end] for first, end in itertools.pairwise(bounds)]
    if plan.groups == 1:
        yield from _first_pass(tokenized, moved, [[shard] for shard in shards], plan, engine)
        return
    group_parts = _first_pass(tokenized, moved, groups, plan, engine)
    for group, parts in zip(groups, group_parts, strict=True):
        yield from _second_pass(group, parts, plan.groups, engine)


def _first_pass(
    tokenized: TokenizedCorpus,
    moved: MovedText | None,
    groups: list[list[PlannedShard]],
    plan: ShufflePlan,
    engine: Engine,
) -> list[list[Any]]:
    """Return the handles for each group."""
    ranges = list(map(BinRange.of, groups))
    jobs = _in_lists(tokenized.batches, plan.batches_per_job)
    tokenized.batches = []
    inputs = ((ranges, moved, tokenized.final_ids, *itertools.chain.from_iterable(batches)) for batches in jobs)
    parts: list[list[Any]] = [[] for _ in groups]
    for result in engine.map(partition, inputs, pieces=len(ranges)):
        for group_parts, handle in zip(parts, result.handles, strict=True):
            group_parts.append(handle)
        for batch in jobs[result.input_index]:
            engine.drop(batch.pieces)
        jobs[result.input_index] = []
    return parts


def _second_pass(shards: list[PlannedShard], parts: list[Any], parts_per_job: int, engine: Engine) -> list[list[Any]]:
    """Return the handles for each shard of a group. A job takes about as many documents as one of the first pass."""
    ranges = [BinRange.of([shard]) for shard in shards]
    jobs = _in_lists(parts, parts_per_job)
    parts.clear()
    shard_parts: list[list[Any]] = [[] for _ in shards]
    for result in engine.map(partition_again, ((ranges, *handles) for handles in jobs), pieces=len(ranges)):
        for handles_of_shard, handle in zip(shard_parts, result.handles, strict=True):
            handles_of_shard.append(handle)
        for handle in jobs[result.input_index]:
            engine.drop(handle)
        jobs[result.input_index] = []
    return shard_parts


def _in_lists(items: list[Any], length: int) -> list[list[Any]]:
    """Cut a list into lists of at most this length."""
    return [items[first : first + length] for first in range(0, len(items), length)]
