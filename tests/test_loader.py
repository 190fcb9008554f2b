"""Batches: their content, their order, and that both are functions of (seed, epoch, index) alone."""

import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from babybert.data.dataset import Dataset
from babybert.data.device_loader import DeviceLoader
from babybert.data.epoch_order import BatchSpan, batches_of
from babybert.data.loader import NO_LABEL, DynamicMasking, Loader, collate, ordered_batches
from babybert.data.masking import mask_tokens
from babybert.data.table import Examples
from babybert.data.tokenizer import FIRST_ORDINARY, MASK


@pytest.fixture
def examples(demo: Dataset) -> Examples:
    return demo.examples("train")


def are_equal(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_batch_is_the_pairs_padded_with_zeros(examples: Examples) -> None:
    rows = np.array([3, 0, 7])
    batch = collate(examples, rows)
    longest = max(examples.offsets[r + 1] - examples.offsets[r] for r in rows)
    for index, row in enumerate(rows):
        start, end = examples.offsets[row : row + 2]
        padding = [0] * (longest - (end - start))
        assert batch.ids_BT[index].tolist() == examples.ids[start:end].tolist() + padding
        assert batch.labels_BT[index].tolist() == examples.labels[start:end].tolist() + padding
        assert batch.segments_BT[index].tolist() == examples.segments[start:end].tolist() + padding
        assert batch.is_next_B[index] == examples.is_next[row]


@pytest.mark.parametrize("bucketing", [True, False])
def test_an_epoch_has_every_pair_once_and_the_smaller_batch_last(examples: Examples, bucketing: bool) -> None:
    loader = Loader(examples, 8, seed=0, bucketing=bucketing)
    assert sorted(loader.order(0)) == list(range(len(examples)))
    batches = list(loader.epoch(0))
    assert len(batches) == batches_of(len(examples), 8)
    assert [len(batch.is_next_B) for batch in batches[:-1]] == [8] * (len(batches) - 1)
    assert sum(int(batch.ids_BT.sum()) for batch in batches) == examples.ids.sum()


@pytest.mark.parametrize("bucketing", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch(examples: Examples, bucketing: bool) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return list(Loader(examples, 8, seed, bucketing).order(epoch))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_buckets_leave_little_padding(examples: Examples) -> None:
    def padding(bucketing: bool) -> int:
        batches = Loader(examples, 8, 0, bucketing).epoch(0)
        return sum(int((batch.ids_BT == 0).sum()) for batch in batches)

    assert padding(bucketing=True) < padding(bucketing=False) / 3


def test_short_batches_do_not_come_first(examples: Examples) -> None:
    """Sorted pairs in shuffled batches: lengths say nothing about when a pair comes."""
    lengths = [batch.ids_BT.shape[1] for batch in Loader(examples, 8, 0).epoch(0)][:-1]
    assert abs(np.corrcoef(lengths, np.arange(len(lengths)))[0, 1]) < 0.6
    assert lengths != sorted(lengths)


@pytest.mark.parametrize("kind", [Loader, DeviceLoader])
@pytest.mark.parametrize("masking", [None, DynamicMasking(209, 5)])
def test_starting_at_a_batch_gives_the_remaining_batches(
    examples: Examples, demo: Dataset, kind: type[Loader], masking: DynamicMasking | None
) -> None:
    masking = masking and DynamicMasking(demo.tokenizer.size, masking.seed)
    loader = kind(examples, 8, 0, True, masking)
    all_batches = [*loader.epoch(0), *loader.epoch(1)]
    per_epoch = batches_of(len(examples), 8)
    for position in (0, 5, per_epoch - 1, per_epoch, per_epoch + 3):
        resumed = kind(examples, 8, 0, True, masking)
        epoch, start = divmod(position, per_epoch)
        rest = list(resumed.epoch(epoch, start))
        if epoch == 0:
            rest += resumed.epoch(1)
        assert all(are_equal(one, other) for one, other in itertools.zip_longest(all_batches[position:], rest))


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_readers_share_the_same_batches(examples: Examples, demo: Dataset, readers: int) -> None:
    loader = Loader(examples, 8, 0, masking=DynamicMasking(demo.tokenizer.size, 1))
    shares = [list(loader.epoch(1, start=2, reader=reader, readers=readers)) for reader in range(readers)]
    for index, batch in enumerate(loader.epoch(1, start=2)):
        for reader in range(readers):
            share = shares[reader][index]
            longest = share.ids_BT.shape[1]
            assert torch.equal(share.ids_BT, batch.ids_BT[reader::readers, :longest])
            assert torch.equal(share.labels_BT, batch.labels_BT[reader::readers, :longest])
            assert not batch.ids_BT[reader::readers, longest:].any()


def test_both_labels_come_from_the_first_batches_on(examples: Examples) -> None:
    """The order must not repeat the permutation that chose the negatives with the same seed."""
    for bucketing in (True, False):
        half = list(Loader(examples, 8, 0, bucketing).epoch(0))[: len(examples) // 16]
        share = torch.cat([batch.is_next_B for batch in half]).float().mean()
        assert 0.3 < share < 0.7


def test_the_masked_share_changes_from_epoch_to_epoch(examples: Examples, demo: Dataset) -> None:
    masking = DynamicMasking(demo.tokenizer.size, 3, share=0.4, share_end=0.2, epochs=5)
    assert [masking.share_in(epoch) for epoch in (0, 1, 4, 9)] == pytest.approx([0.4, 0.35, 0.2, 0.2])
    assert DynamicMasking(209, 3, share=0.4, share_end=0.2, epochs=1).share_in(0) == 0.4
    rows = np.arange(len(examples))
    ordinary = (collate(examples, rows).ids_BT >= FIRST_ORDINARY).sum() + (collate(examples, rows).ids_BT == MASK).sum()
    for epoch, share in ((0, 0.4), (2, 0.3), (4, 0.2)):
        chosen = (Loader(examples, 8, 0, masking=masking).batch(rows, epoch).labels_BT > 0).sum()
        assert float(chosen / ordinary) == pytest.approx(share, abs=0.03)


def test_dynamic_masking_chooses_other_tokens_in_each_epoch(examples: Examples, demo: Dataset) -> None:
    loader = Loader(examples, 8, 0, masking=DynamicMasking(demo.tokenizer.size, 3))
    rows = np.array([4, 1, 9])
    first, second = loader.batch(rows, 0), loader.batch(rows, 1)
    assert not torch.equal(first.labels_BT, second.labels_BT)
    original = collate(examples, rows)
    for batch in (first, second):
        recovered = torch.where(batch.labels_BT > 0, batch.labels_BT, batch.ids_BT)
        assert torch.equal(recovered, torch.where(original.labels_BT > 0, original.labels_BT, original.ids_BT))
        assert (batch.labels_BT > 0).any(1).all()
        assert (batch.labels_BT[recovered < FIRST_ORDINARY] == 0).all()
        assert (batch.ids_BT == MASK).any()
    for index, row in enumerate(rows):
        ids = examples.original_ids()[examples.offsets[row] : examples.offsets[row + 1]]
        masked, _ = mask_tokens(ids, np.array([0, len(ids)]), demo.tokenizer.size, 3, 1, np.array([row]))
        assert second.ids_BT[index, : len(ids)].tolist() == masked.tolist()


@pytest.mark.parametrize("bucketing", [True, False])
@pytest.mark.parametrize("kind", [Loader, DeviceLoader])
def test_readers_and_batch_sizes_can_change_within_an_epoch(
    examples: Examples, kind: type[Loader], bucketing: bool
) -> None:
    """Two readers, then one, then three: together they read each pair once. The last batch has two pairs."""
    pairs = []
    spans: list[BatchSpan] = []
    last_size = (len(examples) - 3 * 8 - 5 * 16 - 1) // 2
    for batch_size, batches, readers in ((8, 3, 2), (16, 5, 1), (last_size, 3, 3)):
        loader = kind(examples, batch_size, 0, bucketing)
        for reader in range(readers):
            share = loader.epoch(1, reader=reader, readers=readers, earlier_spans=spans)
            for batch in itertools.islice(share, batches):
                pairs += [
                    tuple(ids_T[ids_T > 0].tolist())
                    for ids_T, is_next in zip(batch.ids_BT, batch.is_next_B, strict=True)
                    if is_next != NO_LABEL
                ]
        spans.append(BatchSpan(batch_size, bucketing, batches))
    rows = [examples.ids[start:end] for start, end in itertools.pairwise(examples.offsets)]
    assert Counter(pairs) == Counter(tuple(row[row > 0].tolist()) for row in rows)


def test_ordered_batches_keep_the_order(demo: Dataset) -> None:
    examples = demo.examples("validation")
    assert torch.cat([batch.is_next_B for batch in ordered_batches(examples, 7)]).tolist() == examples.is_next.tolist()
