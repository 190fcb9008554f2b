"""Examples to batches of tensors: shuffled by (seed, epoch), bucketed by length, and with new masks if asked to.

The content of batch k of epoch e is a function of (seed, e, k) alone. So a resumed run continues with exactly the
batch that comes next, however many readers share the batches. Making a batch takes a few numpy calls over flat arrays,
well under a millisecond, so no worker processes are needed. `device_loader.py` does the same with arrays on a GPU.

Shapes: B pairs, T positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from babybert.data.masking import MASKED_SHARE, mask_tokens
from babybert.data.pairs import ranges
from babybert.data.table import Examples

# Keeps these random numbers apart from those that `pairs.py` draws with the same seed. Otherwise the first epoch would
# have the permutation that chose the negatives, and half of it would pass before the first pair of the other label.
ORDER_STREAM = 2
NO_LABEL = -1  # in `is_next_B`: the pair only fills a place and has no loss
POOL_BATCHES = 64  # how many batches are sorted by length together: more would pad less, but shuffle less


class Batch(NamedTuple):
    """B pairs, padded with 0 to the longest; the arguments of `PretrainingModel.forward`, in order.

    Attributes:
        ids_BT: token ids after masking (int64).
        labels_BT: the original id where a token was chosen for MLM, 0 elsewhere (int64).
        segments_BT: 1 for `[CLS] A [SEP]`, 2 for `B [SEP]`, 0 for padding (int64).
        is_next_B: 1 where B follows A, 0 where it does not, `NO_LABEL` for a pair without a loss (int64).
    """

    ids_BT: Tensor
    labels_BT: Tensor
    segments_BT: Tensor
    is_next_B: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to `device`, without waiting where the memory is pinned."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def split(self, parts: int) -> list["Batch"]:
        """Split into at most `parts` batches: the k-th has every `parts`-th pair from pair k on. None is empty."""
        return [Batch(*(tensor[first::parts] for tensor in self)) for first in range(min(parts, len(self.is_next_B)))]


@dataclass(frozen=True)
class DynamicMasking:
    """New masks in each epoch (Liu et al., 2019), as a function of the seed, the epoch and the pair's index.

    Attributes:
        vocab_size: random tokens have ids below it.
        seed: another seed gives other masks.
        share: the probability with which an ordinary token is chosen for MLM.
    """

    vocab_size: int
    seed: int
    share: float = MASKED_SHARE


@dataclass
class Loader:
    """The training batches of `examples`, epoch by epoch.

    Attributes:
        examples: the pairs, masked as in the table.
        batch_size: pairs per batch.
        seed: determines the order of the pairs, with the epoch.
        bucketing: make batches of pairs of similar length, which leaves little padding.
        masking: draw new masks in each epoch; None uses the masks of the table.
    """

    examples: Examples
    batch_size: int
    seed: int
    bucketing: bool = True
    masking: DynamicMasking | None = None

    def order(self, epoch: int) -> np.ndarray:
        """Return the indices of the pairs, batch by batch. A last, smaller batch has the pairs that are left."""
        rng = np.random.default_rng((self.seed, ORDER_STREAM, epoch))
        order = rng.permutation(len(self.examples))
        if not self.bucketing:
            return order
        full_batches = len(order) // self.batch_size
        bucketed = order[: full_batches * self.batch_size]
        rest = order[full_batches * self.batch_size :]
        lengths = np.diff(self.examples.offsets)[bucketed]
        pools = np.arange(len(bucketed)) // (POOL_BATCHES * self.batch_size)
        bucketed = bucketed[np.lexsort((lengths, pools))]  # by pool, and in a pool by length
        batches = bucketed.reshape(-1, self.batch_size)
        return np.concatenate([batches[rng.permutation(full_batches)].ravel(), rest])

    def epoch(self, epoch: int, start: int = 0, reader: int = 0, readers: int = 1) -> Iterator[Batch]:
        """Yield the batches of one epoch, from batch number `start` on.

        Of `readers` that share the batches, each takes every `readers`-th pair of a batch, from pair `reader` on. A
        reader for whom the last batch has no pair gets the batch's first pair, without labels: in distributed training
        all ranks must take the same number of steps.
        """
        order = self.order(epoch)
        for first in range(start * self.batch_size, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            reader_rows = rows[reader::readers]
            if len(reader_rows):
                yield self.batch(reader_rows, epoch)
            else:
                yield _without_labels(self.batch(rows[:1], epoch))

    def batch(self, rows: np.ndarray, epoch: int) -> Batch:
        """Make one batch of the pairs with these indices, with the masks of this epoch."""
        return collate(self.examples, rows, self.masking, epoch)


def _without_labels(batch: Batch) -> Batch:
    return batch._replace(
        labels_BT=torch.zeros_like(batch.labels_BT), is_next_B=torch.full_like(batch.is_next_B, NO_LABEL)
    )


def batches_in_epoch(pairs: int, batch_size: int) -> int:
    """Return how many batches an epoch has; the last may be smaller."""
    return -(-pairs // batch_size)  # rounded up


def pairs_before(step: int, epoch_batches: int, pairs: int, batch_size: int) -> int:
    """Return how many pairs the steps before `step` take; the last batch of an epoch may be smaller.

    Args:
        step: the number of steps.
        epoch_batches: steps per epoch, of `batches_in_epoch`.
        pairs: pairs per epoch.
        batch_size: pairs per step.
    """
    epochs, batches = divmod(step, epoch_batches)
    return epochs * pairs + min(batches * batch_size, pairs)


def ordered_batches(examples: Examples, batch_size: int) -> Iterator[Batch]:
    """Yield all pairs once, in their order, with the masks of the table."""
    for first in range(0, len(examples), batch_size):
        yield collate(examples, np.arange(first, min(first + batch_size, len(examples))))


def collate(examples: Examples, rows: np.ndarray, masking: DynamicMasking | None = None, epoch: int = 0) -> Batch:
    """Make one batch of the pairs with the indices `rows`, masked anew if `masking` is given."""
    start = examples.offsets[rows]
    lengths = examples.offsets[rows + 1] - start
    indices = ranges(start, lengths)
    ids = examples.ids[indices]
    labels = examples.labels[indices]
    if masking:
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        original_ids = np.where(labels > 0, labels, ids)
        ids, labels = mask_tokens(original_ids, offsets, masking.vocab_size, masking.seed, epoch, rows, masking.share)
    is_token_BT = np.arange(lengths.max(initial=0)) < lengths[:, None]

    def pad(values: np.ndarray) -> Tensor:
        padded_BT = np.zeros(is_token_BT.shape, np.int64)
        padded_BT[is_token_BT] = values
        return torch.from_numpy(padded_BT)

    return Batch(
        pad(ids),
        pad(labels),
        pad(examples.segments[indices]),
        torch.from_numpy(examples.is_next[rows].astype(np.int64)),
    )
