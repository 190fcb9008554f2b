import itertools

import numpy as np
import torch

from babybert.data.loader import batches_in_epoch, collate, ordered_batches, pairs_before, shuffled_batches


def test_a_batch_is_the_pairs_padded_with_zeros(demo):
    examples = demo.examples("train")
    rows = np.array([3, 0, 7])
    batch = collate(examples, rows)
    longest = max(examples.offsets[r + 1] - examples.offsets[r] for r in rows)
    for number, row in enumerate(rows):
        i, j = examples.offsets[row], examples.offsets[row + 1]
        padding = [0] * (longest - (j - i))
        assert batch.ids_BT[number].tolist() == examples.ids[i:j].tolist() + padding
        assert batch.labels_BT[number].tolist() == examples.labels[i:j].tolist() + padding
        assert batch.segments_BT[number].tolist() == examples.segments[i:j].tolist() + padding
        assert batch.is_next_B[number] == examples.is_next[row]


def rows_of(batches):
    return [row.tobytes() for batch in batches for row in batch.ids_BT.numpy().astype(np.int32)]


def test_an_epoch_has_every_pair_once(demo):
    examples = demo.examples("train")
    batches = list(shuffled_batches(examples, 8, seed=0, epoch=0))
    assert len(batches) == batches_in_epoch(len(examples), 8)
    assert sum(len(batch.is_next_B) for batch in batches) == len(examples)
    assert sum(int(batch.ids_BT.sum()) for batch in batches) == examples.ids.sum()


def test_the_order_is_a_function_of_seed_and_epoch(demo):
    examples = demo.examples("train")

    def order(seed, epoch):
        return rows_of(shuffled_batches(examples, 8, seed, epoch))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_starting_at_a_batch_gives_the_rest(demo):
    examples = demo.examples("train")
    whole = list(shuffled_batches(examples, 8, 0, 1))
    rest = list(shuffled_batches(examples, 8, 0, 1, start=5))
    for one, other in itertools.zip_longest(whole[5:], rest):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_both_labels_come_from_the_first_batches_on(demo):
    """The same seed that dealt the negatives must not put them all into the first half of the first epoch."""
    examples = demo.examples("train")
    half = list(shuffled_batches(examples, 8, seed=0, epoch=0))[: len(examples) // 16]
    share = torch.cat([batch.is_next_B for batch in half]).float().mean()
    assert 0.3 < share < 0.7


def test_pairs_are_counted_with_the_smaller_last_batches(demo):
    examples = demo.examples("train")
    sizes = [len(batch.is_next_B) for epoch in range(2) for batch in shuffled_batches(examples, 8, 0, epoch)]
    for step in range(len(sizes) + 1):
        assert pairs_before(step, batches_in_epoch(len(examples), 8), len(examples), 8) == sum(sizes[:step])


def test_in_order(demo):
    examples = demo.examples("validation")
    assert torch.cat([batch.is_next_B for batch in ordered_batches(examples, 7)]).tolist() == examples.is_next.tolist()
