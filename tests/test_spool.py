"""Documents come back from the spool once each, in blocks, in an order that does not depend on their source."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from babybert.data import spool as module
from babybert.data.sentences import TokenizedDocuments
from babybert.data.spool import Spool

END = np.array([9], np.int32)
TEXTS = [f"text {i}" for i in range(200)]


def fill(path: Path, texts: list[str] = TEXTS, seed: int = 0) -> tuple[Spool, dict[bool, list[TokenizedDocuments]]]:
    """Write documents of ten tokens; return the blocks of both splits."""
    spool = Spool(path, seed, validation_fraction=0.25)
    with spool:
        for text in texts:
            spool.add(text, np.full(10, int(text.split()[1]), np.int32), END)
        blocks = {held_out: list(spool.blocks(held_out, None)) for held_out in (False, True)}
    return spool, blocks


def documents(blocks: list[TokenizedDocuments]) -> list[list[int]]:
    return [
        block.tokens[start:end].tolist()
        for block in blocks
        for start, end in itertools.pairwise(block.offsets.tolist())
    ]


def test_every_document_comes_once_in_one_split(tmp_path: Path) -> None:
    spool, blocks = fill(tmp_path / "tokens")
    train = documents(blocks[False])
    held_out = documents(blocks[True])
    assert sorted(train + held_out) == [[i] * 10 for i in range(200)]
    assert spool.documents == {False: len(train), True: len(held_out)}
    assert spool.tokens == 2000
    assert 25 < len(held_out) < 75  # five standard deviations about 50
    assert not (tmp_path / "tokens").exists()


def test_order_and_splits_do_not_depend_on_the_order_of_the_source(tmp_path: Path) -> None:
    _, blocks = fill(tmp_path / "a")
    _, blocks_of_reversed = fill(tmp_path / "b", TEXTS[::-1])
    _, blocks_of_other_seed = fill(tmp_path / "c", seed=1)
    assert documents(blocks[False]) == documents(blocks_of_reversed[False])
    assert documents(blocks[False]) != documents(blocks_of_other_seed[False])
    order = [ids[0] for ids in documents(blocks[False])]
    assert order != sorted(order)


def test_blocks_are_even_and_of_the_size_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_TOKENS", 300)
    _, blocks = fill(tmp_path / "a")
    sizes = [len(block.tokens) for block in blocks[False]]
    assert len(sizes) == round(sum(sizes) / 300)
    assert max(sizes) - min(sizes) <= 20


def test_copies_share_a_split_and_a_text_number(tmp_path: Path) -> None:
    _, blocks = fill(tmp_path / "a", TEXTS * 2)
    for held_out in (False, True):
        numbers: dict[int, list[int]] = {}
        for block in blocks[held_out]:
            for ids, text_number in zip(documents([block]), block.texts.tolist(), strict=True):
                numbers.setdefault(ids[0], []).append(text_number)
        assert all(len(copies) == 2 and copies[0] == copies[1] for copies in numbers.values())
        assert len({copies[0] for copies in numbers.values()}) == len(numbers)


def test_a_text_is_moved_with_its_copies_and_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_TOKENS", 4)
    with Spool(tmp_path / "a", 0, 0.25) as spool:
        for text in [*TEXTS[:20], *TEXTS[:20]]:
            spool.add(text, np.full(10, int(text.split()[1]), np.int32), END)
        before = {held_out: documents(list(spool.blocks(held_out, None))) for held_out in (False, True)}
        text_number = int(next(spool.blocks(False, None)).texts[0])
        spool.move(text_number, held_out=True)
        after = {held_out: documents(list(spool.blocks(held_out, None))) for held_out in (False, True)}
    moved = [ids for ids in after[True] if ids not in before[True]]
    assert len({ids[0] for ids in moved}) == 1
    assert sorted(map(len, moved)) == [2, 2, 4, 4, 4, 4]  # two copies in three pieces each
    assert sorted([*after[False], *moved]) == sorted(before[False])
    for held_out in (False, True):
        tokens = sum(map(len, after[held_out]))
        assert spool.tokens_of[held_out] == tokens
        assert spool.documents[held_out] == tokens / 10


def test_provisional_ids_become_final_ids(tmp_path: Path) -> None:
    with Spool(tmp_path / "a", 0, 0.5) as spool:
        spool.add("x", np.array([0, 2, 1], np.int32), END)
        final_ids = np.array([7, 8, 9], np.int32)
        (block,) = [*spool.blocks(False, final_ids), *spool.blocks(True, final_ids)]
    assert block.tokens.tolist() == [7, 9, 8]


def test_a_long_document_comes_in_pieces_that_end_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_TOKENS", 7)
    ids = np.array([1, 2, 9, 3, 9, 4, 5, 6, 9, *range(10, 30)], np.int32)
    with Spool(tmp_path / "a", 0, 0.5) as spool:
        spool.add("a book", ids, END)
        blocks = [*spool.blocks(False, None), *spool.blocks(True, None)]
        assert spool.documents[False] + spool.documents[True] == 1
    pieces = documents(blocks)
    assert sorted(pieces) == sorted(
        [[1, 2, 9, 3, 9], [4, 5, 6, 9], [*range(10, 17)], [*range(17, 24)], [*range(24, 30)]]
    )
    assert len(set(np.concatenate([block.texts for block in blocks]).tolist())) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_no_document_and_one_document(tmp_path: Path, count: int) -> None:
    _, blocks = fill(tmp_path / "a", TEXTS[:count])
    assert len(documents(blocks[False]) + documents(blocks[True])) == count
