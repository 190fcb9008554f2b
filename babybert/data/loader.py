"""Examples to batches of tensors: shuffled by (seed, epoch), padded to the longest pair of the batch.

The order is a function of the seed and the epoch, so a resumed run goes on with the very batch that would have come
next. A batch is made with a few numpy calls, in well under a millisecond; no worker processes are needed.

Shapes: B pairs, T positions.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from babybert.data.table import Examples

# Names this use of a seed. Without it, the first epoch's permutation would be the one that `pairs.py` drew its
# negatives with, and half an epoch would pass before the first pair of the other label.
ORDER_STREAM = 2


class Batch(NamedTuple):
    """B pairs, padded with 0 to the longest of them; the arguments of `PretrainingModel.forward`, in order."""

    ids_BT: Tensor
    labels_BT: Tensor
    segments_BT: Tensor
    is_next_B: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def batches_in_epoch(pairs: int, batch_size: int) -> int:
    """How many batches it takes; the last may be smaller."""
    return -(-pairs // batch_size)


def pairs_before(step: int, epoch_batches: int, pairs: int, batch_size: int) -> int:
    """How many pairs the steps before `step` take, each epoch's last and smaller batch counted as it is."""
    epochs, batches = divmod(step, epoch_batches)
    return epochs * pairs + min(batches * batch_size, pairs)


def shuffled_batches(examples: Examples, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
    """The batches of one epoch from number `start` on."""
    order = np.random.default_rng((seed, ORDER_STREAM, epoch)).permutation(len(examples))
    for first in range(start * batch_size, len(order), batch_size):
        yield collate(examples, order[first : first + batch_size])


def ordered_batches(examples: Examples, batch_size: int) -> Iterator[Batch]:
    """All pairs once, in their order."""
    for first in range(0, len(examples), batch_size):
        yield collate(examples, np.arange(first, min(first + batch_size, len(examples))))


def collate(examples: Examples, rows: np.ndarray) -> Batch:
    """Make one batch of the pairs with these indices."""
    start = examples.offsets[rows]
    lengths = examples.offsets[rows + 1] - start
    position = np.arange(lengths.max())
    real = position < lengths[:, None]
    index = np.where(real, start[:, None] + position, 0)
    columns = (np.where(real, flat[index], 0).astype(np.int64) for flat in (examples.ids, examples.labels, examples.segments))
    ids_BT, labels_BT, segments_BT = map(torch.from_numpy, columns)
    return Batch(ids_BT, labels_BT, segments_BT, torch.from_numpy(examples.is_next[rows].astype(np.int64)))
