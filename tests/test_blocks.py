"""Documents come into blocks once each, by their digests alone: not by their order, nor by the batches they came in."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from babybert.data import block_plan, pieces
from babybert.data.block_plan import BINS, Histogram, PlannedShard, count_bins, plan_blocks, plan_shards
from babybert.data.blocks import MovedText, ShardJob, count_after_move, final_pieces, write_shard
from babybert.data.pieces import Pieces, PiecesBuilder
from babybert.data.sentences import TokenizedText
from babybert.data.shuffle import BinRange, partition
from babybert.data.tokenize_batch import count_documents

END = 9
TEXTS = [f"text {i}" for i in range(200)]
CSV_BYTES = 10**9


def tokens_of(ids: list[int]) -> TokenizedText:
    return TokenizedText(np.array(ids, np.int32), np.array(ids) == END)


def batch_of(texts: list[str], seed: int = 0, validation_fraction: float = 0.25) -> Pieces:
    """Documents of ten equal tokens."""
    builder = PiecesBuilder(seed, validation_fraction)
    for text in texts:
        builder.add(text, *tokens_of([int(text.split()[1])] * 10))
    return builder.finish()


def shards_of(batches: list[Pieces], shard_bytes: int = CSV_BYTES) -> list[PlannedShard]:
    histogram = Histogram()
    for batch in batches:
        histogram.add(*count_bins(batch))
    return plan_shards(histogram, "csv", shard_bytes, duplicates=1)


def blocks_of(batches: list[Pieces], shards: list[PlannedShard], moved: MovedText | None = None) -> dict[bool, Any]:
    """The blocks of both splits, as (number, documents)."""
    from babybert.data.blocks import _blocks

    ranges = [BinRange.of([shard]) for shard in shards]
    parts = [partition(ranges, moved, None, batch, None)[1] for batch in batches]
    blocks: dict[bool, list[tuple[int, Pieces]]] = {False: [], True: []}
    for index, shard in enumerate(shards):
        joined = pieces.join([Pieces(*part[index]) for part in parts])
        blocks[shard.held_out] += _blocks(shard, joined)
    return blocks


def documents(blocks: list[tuple[int, Pieces]]) -> list[list[int]]:
    return [
        block.tokens[start:end].tolist()
        for _, block in blocks
        for start, end in itertools.pairwise([*block.starts.tolist(), len(block.tokens)])
    ]


def equal(first: dict[bool, Any], second: dict[bool, Any]) -> bool:
    return all(
        [number for number, _ in first[held_out]] == [number for number, _ in second[held_out]]
        and all(
            np.array_equal(a, b)
            for (_, x), (_, y) in zip(first[held_out], second[held_out], strict=True)
            for a, b in zip(x, y, strict=True)
        )
        for held_out in (False, True)
    )


def test_every_document_comes_once_in_one_split() -> None:
    batches = [batch_of(TEXTS[:70]), batch_of(TEXTS[70:])]
    blocks = blocks_of(batches, shards_of(batches))
    train, held_out = documents(blocks[False]), documents(blocks[True])
    assert sorted(train + held_out) == [[i] * 10 for i in range(200)]
    counts = np.array([count_documents(batch) for batch in batches]).sum(axis=0)
    assert counts.tolist() == [[len(train), len(held_out)], [10 * len(train), 10 * len(held_out)]]
    assert 25 < len(held_out) < 75  # five standard deviations about 50


@pytest.mark.parametrize("block_tokens", [1 << 21, 300])
@pytest.mark.parametrize("shard_bytes", [CSV_BYTES, 4000])
def test_blocks_depend_neither_on_the_order_nor_on_the_batches(
    block_tokens: int, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_plan, "BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(pieces, "PIECE_TOKENS", 7)
    texts = [*TEXTS, *TEXTS[:50]]
    expected = blocks_of([batch_of(texts)], shards_of([batch_of(texts)]))
    reverse = texts[::-1]
    batches = [batch_of(reverse[first : first + 30]) for first in range(0, len(texts), 30)] + [batch_of([])]
    assert equal(blocks_of(batches, shards_of(batches, shard_bytes)), expected)
    other_seed = [batch_of(texts, seed=1)]
    assert not equal(blocks_of(other_seed, shards_of(other_seed)), expected)
    order = [ids[0] for ids in documents(expected[False])]
    assert order != sorted(order)


def test_blocks_are_even_and_of_the_size_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_plan, "BLOCK_TOKENS", 300)
    batches = [batch_of(TEXTS)]
    blocks = blocks_of(batches, shards_of(batches))
    for held_out in (False, True):
        sizes = [len(block.tokens) for _, block in blocks[held_out]]
        assert len(sizes) == round(sum(sizes) / 300)
        assert max(sizes) - min(sizes) <= 20
        assert [number for number, _ in blocks[held_out]] == list(range(len(sizes)))


def test_a_text_with_more_copies_than_a_block_holds_gets_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_plan, "BLOCK_TOKENS", 300)
    batches = [batch_of([*TEXTS, *["text 7"] * 100]), batch_of(["text 7"] * 100)]
    blocks = blocks_of(batches, shards_of(batches))
    for held_out in (False, True):
        assert max(len(block.tokens) for _, block in blocks[held_out]) < 500
        assert [number for number, _ in blocks[held_out]] == list(range(len(blocks[held_out])))
    assert Counter(ids[0] for ids in documents(blocks[False] + blocks[True]))[7] == 201
    assert equal(blocks_of(batches[::-1], shards_of(batches)), blocks)


def test_a_shard_is_whole_blocks_and_about_as_large_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_plan, "BLOCK_TOKENS", 100)
    histogram = Histogram()
    histogram.tokens[:, ::1000] = 10
    total = int(histogram.tokens[0].sum())
    for shard_bytes in (2000, 3000, 10**9):
        shards = plan_shards(histogram, "csv", shard_bytes, duplicates=1)
        for held_out in (False, True):
            in_split = [shard for shard in shards if shard.held_out == held_out]
            assert [shard.number for shard in in_split] == list(range(len(in_split)))
            assert sum(shard.tokens for shard in in_split) == total
            ranges = [block_range for shard in in_split for block_range in shard.ranges]
            assert ranges == plan_blocks(histogram.tokens[0])
            assert ranges[0].first_bin == 0
            assert ranges[-1].end_bin == BINS
            assert all(first.end_bin == second.first_bin for first, second in itertools.pairwise(ranges))
            assert len(in_split) == max(8, round(total * 8.1 / shard_bytes))
    for blocks in (1, 5):  # a small corpus has a file for each block, so that several processes can write
        monkeypatch.setattr(block_plan, "BLOCK_TOKENS", total / blocks)
        assert len(plan_shards(histogram, "csv", 10**9, duplicates=1)) == 2 * blocks
    monkeypatch.setattr(block_plan, "BLOCK_TOKENS", 100)
    twice = plan_shards(histogram, "csv", 4000, duplicates=2)
    assert len([shard for shard in twice if not shard.held_out]) == round(total * 8.1 / 2000)


def test_copies_share_a_split_and_a_text_number() -> None:
    batches = [batch_of(TEXTS), batch_of(TEXTS)]
    blocks = blocks_of(batches, shards_of(batches))
    for held_out in (False, True):
        numbers: dict[int, list[int]] = {}
        for block in blocks[held_out]:
            for ids, text_number in zip(documents([block]), block[1].texts.tolist(), strict=True):
                numbers.setdefault(ids[0], []).append(text_number)
        assert all(len(copies) == 2 and copies[0] == copies[1] for copies in numbers.values())
        assert len({copies[0] for copies in numbers.values()}) == len(numbers)


def test_a_text_is_moved_with_its_copies_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_TOKENS", 4)
    batches = [batch_of(TEXTS[:20]), batch_of(TEXTS[:20])]
    before = {split: documents(found) for split, found in blocks_of(batches, shards_of(batches)).items()}
    moved = MovedText(int(batches[0].texts[~batches[0].held_out][0]), held_out=True)
    after = {split: documents(found) for split, found in blocks_of(batches, shards_of(batches), moved).items()}
    moved_pieces = [ids for ids in after[True] if ids not in before[True]]
    assert len({ids[0] for ids in moved_pieces}) == 1
    assert sorted(map(len, moved_pieces)) == [2, 2, 4, 4, 4, 4]  # two copies in three pieces each
    assert sorted([*after[False], *moved_pieces]) == sorted(before[False])
    counts = [count_after_move(batch, moved)[0] for batch in batches]
    for held_out in (False, True):
        tokens = sum(map(len, after[held_out]))
        assert sum(int(count[1][int(held_out)]) for count in counts) == tokens
        assert sum(int(count[0][int(held_out)]) for count in counts) == tokens / 10


def test_provisional_ids_become_final_ids() -> None:
    builder = PiecesBuilder(0, 0.5)
    builder.add("x", *tokens_of([0, 2, 1]))
    word_ids, final_ids = np.array([1, 0, 3], np.int32), np.array([7, 8, 9, 10], np.int32)
    assert final_pieces(builder.finish(), [word_ids], [final_ids]).tokens.tolist() == [8, 10, 7]


def test_a_long_document_comes_in_pieces_that_end_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_TOKENS", 7)
    ids = [1, 2, 9, 3, 9, 4, 5, 6, 9, *range(10, 30)]
    builder = PiecesBuilder(0, 0.5)
    builder.add("a book", *tokens_of(ids))
    batches = [builder.finish()]
    assert sum(count_documents(batches[0])[0]) == 1
    blocks = blocks_of(batches, shards_of(batches))
    found = documents(blocks[False] + blocks[True])
    assert sorted(found) == sorted(
        [[1, 2, 9, 3, 9], [4, 5, 6, 9], [*range(10, 17)], [*range(17, 24)], [*range(24, 30)]]
    )
    assert len({text for _, block in blocks[False] + blocks[True] for text in block.texts.tolist()}) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_no_document_and_one_document(count: int) -> None:
    batches = [batch_of(TEXTS[:count])]
    blocks = blocks_of(batches, shards_of(batches))
    assert len(documents(blocks[False] + blocks[True])) == count


def test_rows_of_different_blocks_get_different_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks with the same documents: the masks depend on the number of the block, too."""
    builder = PiecesBuilder(0, 0.001)
    builder.add("one", *tokens_of([*range(10, 50), END, *range(50, 90), END]))
    (shard, _) = shards_of([builder.finish()])
    (block_range,) = shard.ranges
    contents = []
    for first_block in (0, 1):
        numbered = shard._replace(ranges=(block_range._replace(first_block=first_block),))
        job = ShardJob(numbered, None, "csv", 0, 1, 128, "sentences", 100)
        (_, facts, statistics), (content,) = write_shard(job, builder.finish())
        assert facts["rows"] == statistics.pairs == 1
        assert facts["bytes"] == len(content[0])
        contents.append(content[0].tobytes())
    assert contents[0] != contents[1]
