import numpy as np
import pytest

from babybert.data import spool as module
from babybert.data.spool import Spool

END = np.array([9], np.int32)
TEXTS = [f"text {i}" for i in range(200)]


def fill(path, texts=TEXTS, seed=0, fraction=0.25, length=10):
    spool = Spool(path, seed, fraction)
    with spool:
        for text in texts:
            spool.add(text, np.full(length, int(text.split()[1]), np.int32), END)
        blocks = {held_out: list(spool.blocks(held_out, None)) for held_out in (False, True)}
    return spool, blocks


def documents(blocks):
    return [
        block.tokens[i:j].tolist() for block in blocks for i, j in zip(block.offsets, block.offsets[1:], strict=False)
    ]


def test_every_document_comes_once_on_one_side(tmp_path):
    spool, blocks = fill(tmp_path / "tokens")
    train, held_out = documents(blocks[False]), documents(blocks[True])
    assert sorted(train + held_out) == [[i] * 10 for i in range(200)]
    assert spool.documents == {False: len(train), True: len(held_out)}
    assert spool.tokens == 2000
    assert 25 < len(held_out) < 75  # five standard deviations about 50
    assert not (tmp_path / "tokens").exists()


def test_order_and_sides_do_not_depend_on_the_order_of_the_source(tmp_path):
    assert documents(fill(tmp_path / "a")[1][False]) == documents(fill(tmp_path / "b", TEXTS[::-1])[1][False])
    assert documents(fill(tmp_path / "a")[1][False]) != documents(fill(tmp_path / "b", seed=1)[1][False])
    order = [ids[0] for ids in documents(fill(tmp_path / "a")[1][False])]
    assert order != sorted(order)


def test_blocks_are_even_and_of_the_size_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_TOKENS", 300)
    _, blocks = fill(tmp_path / "a")
    sizes = [len(block.tokens) for block in blocks[False]]
    assert len(sizes) == round(sum(sizes) / 300)
    assert max(sizes) - min(sizes) <= 20


def test_copies_share_a_side_and_a_number(tmp_path):
    _, blocks = fill(tmp_path / "a", TEXTS * 2)
    for side in (False, True):
        numbers = {}
        for block in blocks[side]:
            for ids, text in zip(documents([block]), block.texts, strict=True):
                numbers.setdefault(ids[0], []).append(text)
        assert all(len(found) == 2 and found[0] == found[1] for found in numbers.values())
        assert len({found[0] for found in numbers.values()}) == len(numbers)


def test_ids_are_mapped(tmp_path):
    with Spool(tmp_path / "a", 0, 0.5) as spool:
        spool.add("x", np.array([0, 2, 1], np.int32), END)
        (block,) = [
            *spool.blocks(False, np.array([7, 8, 9], np.int32)),
            *spool.blocks(True, np.array([7, 8, 9], np.int32)),
        ]
    assert block.tokens.tolist() == [7, 9, 8]


def test_a_long_document_comes_in_pieces_that_end_with_a_sentence(tmp_path, monkeypatch):
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
def test_nothing_and_next_to_nothing(tmp_path, count):
    _, blocks = fill(tmp_path / "a", TEXTS[:count])
    assert len(documents(blocks[False]) + documents(blocks[True])) == count
