"""Examples to batches of tensors: shuffled by (seed, epoch), of pairs of near-equal length, masked anew if asked to.

What is in batch k of epoch e is a function of (seed, e, k) alone. So a resumed run goes on with the very batch that
would have come next, however many readers share the batches. A batch is a few numpy calls over flat arrays, in well
under a millisecond: no worker processes are needed. `resident.py` has the same with the arrays on a GPU.

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

# Names this use of a seed. Without it, the first epoch's permutation would be the one that `pairs.py` drew its
# negatives with, and half an epoch would pass before the first pair of the other label.
ORDER_STREAM = 2
NO_LABEL = -1  # in `is_next_B`, of a pair that only fills a place
POOL_BATCHES = 64  # so many batches' pairs are sorted by length together: more would pad less and shuffle less


class Batch(NamedTuple):
    """B pairs, padded with 0 to the longest of them; the arguments of `PretrainingModel.forward`, in order."""

    ids_BT: Tensor
    labels_BT: Tensor
    segments_BT: Tensor
    is_next_B: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def split(self, parts: int) -> list["Batch"]:
        """Every `parts`-th pair from the first, the second, ... on; parts that would be empty are left out."""
        return [Batch(*(tensor[i::parts] for tensor in self)) for i in range(min(parts, len(self.is_next_B)))]


@dataclass(frozen=True)
class DynamicMasking:
    """Dynamic masking: which masks a pair gets is a function of this seed, the epoch and the pair's index."""

    vocab_size: int
    seed: int
    share: float = MASKED_SHARE


@dataclass
class Loader:
    """The training batches of `examples`, epoch by epoch.

    `remask` draws new masks each epoch (Liu et al., 2019); None takes those of the table. `bucketing` makes batches
    of pairs of near-equal length, which leaves little padding.
    """

    examples: Examples
    batch_size: int
    seed: int
    bucketing: bool = True
    remask: DynamicMasking | None = None

    def order(self, epoch: int) -> np.ndarray:
        """The pairs' indices, batch after batch. What does not fill a batch comes last, as a smaller one."""
        rng = np.random.default_rng((self.seed, ORDER_STREAM, epoch))
        order = rng.permutation(len(self.examples))
        if not self.bucketing:
            return order
        whole = len(order) // self.batch_size * self.batch_size
        body, rest = order[:whole], order[whole:]
        lengths = np.diff(self.examples.offsets)[body]
        body = body[np.lexsort((lengths, np.arange(whole) // (POOL_BATCHES * self.batch_size)))]
        batches = body.reshape(-1, self.batch_size)
        return np.concatenate([batches[rng.permutation(len(batches))].ravel(), rest])

    def epoch(self, epoch: int, start: int = 0, reader: int = 0, readers: int = 1) -> Iterator[Batch]:
        """The batches of one epoch from number `start` on; reader r of n gets every n-th pair of each, from r on.

        A reader for whom an epoch's last batch has no pair gets its first one, with nothing in it to learn from.
        """
        order = self.order(epoch)
        for first in range(start * self.batch_size, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            own = rows[reader::readers]
            yield self.batch(own, epoch) if len(own) else _blank(self.batch(rows[:1], epoch))

    def batch(self, rows: np.ndarray, epoch: int) -> Batch:
        """One batch of the pairs with these indices, with the masks of this epoch."""
        return collate(self.examples, rows, self.remask, epoch)


def _blank(batch: Batch) -> Batch:
    return batch._replace(
        labels_BT=torch.zeros_like(batch.labels_BT), is_next_B=torch.full_like(batch.is_next_B, NO_LABEL)
    )


def batches_in_epoch(pairs: int, batch_size: int) -> int:
    """How many batches it takes; the last may be smaller."""
    return -(-pairs // batch_size)


def pairs_before(step: int, epoch_batches: int, pairs: int, batch_size: int) -> int:
    """How many pairs the steps before `step` take, each epoch's last and smaller batch counted as it is."""
    epochs, batches = divmod(step, epoch_batches)
    return epochs * pairs + min(batches * batch_size, pairs)


def ordered_batches(examples: Examples, batch_size: int) -> Iterator[Batch]:
    """All pairs once, in their order, with the masks of the table."""
    for first in range(0, len(examples), batch_size):
        yield collate(examples, np.arange(first, min(first + batch_size, len(examples))))


def collate(examples: Examples, rows: np.ndarray, remask: DynamicMasking | None = None, epoch: int = 0) -> Batch:
    """Make one batch of the pairs with these indices."""
    start = examples.offsets[rows]
    lengths = examples.offsets[rows + 1] - start
    flat = ranges(start, lengths)
    ids, labels = examples.ids[flat], examples.labels[flat]
    if remask:
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids, labels = mask_tokens(
            np.where(labels > 0, labels, ids), offsets, remask.vocab_size, remask.seed, epoch, rows, remask.share
        )
    real_BT = np.arange(lengths.max(initial=0)) < lengths[:, None]

    def padded(values: np.ndarray) -> Tensor:
        values_BT = np.zeros(real_BT.shape, np.int64)
        values_BT[real_BT] = values
        return torch.from_numpy(values_BT)

    return Batch(
        padded(ids),
        padded(labels),
        padded(examples.segments[flat]),
        torch.from_numpy(examples.is_next[rows].astype(np.int64)),
    )
