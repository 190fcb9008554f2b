"""One pass or two, few batches a job or many: each shard gets the same documents."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_blocks import batch_of, shards_of

from babybert.data import block_plan, shuffle
from babybert.data.local_engine import InProcessEngine
from babybert.data.pieces import Pieces, join
from babybert.data.shuffle import ShufflePlan, plan_shuffle
from babybert.data.tokenize_corpus import TokenizedBatch, TokenizedCorpus
from babybert.data.tokenizer import Tokenizer

BATCHES = [batch_of([f"text {batch} {index}" for index in range(50)]) for batch in range(9)]


def documents_of_shards(folder: Path, shards: list[Any]) -> list[list[tuple[int, bool]]]:
    """The documents (text number, split) that each shard gets, sorted; and nothing may be left in the engine."""
    tokenized = TokenizedCorpus(Tokenizer.of_words(()))
    found = []
    with InProcessEngine(folder) as engine:
        for batch in BATCHES:
            tokenized.batches.append(TokenizedBatch(engine.put(batch), None))
        for parts in shuffle.shuffle(tokenized, None, shards, engine):
            pieces = join([Pieces(*engine.get(part)) for part in parts])
            found.append(sorted(zip(pieces.texts.tolist(), pieces.held_out.tolist(), strict=True)))
            for part in parts:
                engine.drop(part)
        assert not shards or not list(folder.iterdir())
    return found


def test_shards_get_the_same_documents_in_one_pass_and_in_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_plan, "BLOCK_TOKENS", 100)
    shards = shards_of(BATCHES, shard_bytes=1000)
    assert len(shards) > 10
    assert plan_shuffle(len(BATCHES), len(shards)) == ShufflePlan(1, 1)
    expected = documents_of_shards(tmp_path, shards)
    assert sorted(itertools.chain.from_iterable(expected)) == sorted(
        pair for batch in BATCHES for pair in zip(batch.texts.tolist(), batch.held_out.tolist(), strict=True)
    )
    for jobs, handles in ((64, 20), (4, 20), (4, 1), (1, 10**6)):
        monkeypatch.setattr(shuffle, "JOBS", jobs)
        monkeypatch.setattr(shuffle, "MOST_HANDLES", handles)
        assert documents_of_shards(tmp_path, shards) == expected
        # Shards that an earlier command has finished are left out.
        assert documents_of_shards(tmp_path, shards[2:9:3]) == expected[2:9:3]
    assert documents_of_shards(tmp_path, []) == []


def test_the_number_of_handles_is_bounded() -> None:
    for batches in (1, 100, 16_384, 62_500):
        for shards in (1, 100, 2_750, 28_000):
            plan = plan_shuffle(batches, shards)
            jobs = -(-batches // plan.batches_per_job)
            assert jobs * plan.groups <= 200_000
            jobs_of_group, shards_of_group = -(-jobs // plan.groups), -(-shards // plan.groups)
            assert jobs_of_group * shards_of_group <= 2 * shuffle.MOST_HANDLES
            assert plan.groups == 1 or jobs * shards > shuffle.MOST_HANDLES


def test_ranges_may_have_gaps() -> None:
    pieces = BATCHES[0]
    bins = block_plan.bins_of(pieces.keys) + block_plan.BINS * pieces.held_out
    ranges = [
        shuffle.BinRange(1000, 2 * 10**5),
        shuffle.BinRange(3 * 10**5, 3 * 10**5 + 1),
        shuffle.BinRange(10**6, 2**21),
    ]
    _, parts = shuffle.partition_again(ranges, pieces)
    for bin_range, part in zip(ranges, parts, strict=True):
        expected = pieces.texts[(bins >= bin_range.first) & (bins < bin_range.end)]
        assert np.array_equal(Pieces(*part).texts, expected)
