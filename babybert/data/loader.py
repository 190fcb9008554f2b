"""Examples to batches of tensors: shuffled by (seed, epoch), bucketed by length, and with new masks if asked to.

The content of batch k of epoch e is a function of (seed, e, k) alone. So a resumed run continues with exactly the
batch that comes next, however many readers share the batches. With another batch size it continues with the pairs that
are left of the epoch (see `epoch_order.py`). Making a batch takes a few numpy calls over flat arrays, well under a
millisecond, so no worker processes are needed. `device_loader.py` does the same with arrays on a GPU.

Shapes: B pairs, T positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from babybert.data.epoch_order import BatchSpan, epoch_order
from babybert.data.masking import MASKED_SHARE, mask_tokens
from babybert.data.pairs import ranges
from babybert.data.table import Examples

NO_LABEL = -1  # in `is_next_B`: the pair only fills a place and has no loss


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
        share: the probability with which an ordinary token is chosen for MLM, in epoch 0.
        share_end: the same in the last of `epochs`, linear in between; None is `share`.
        epochs: of the run.
        continues_V: for whole-word masking, whether each token continues a word (bool); None masks single tokens.
    """

    vocab_size: int
    seed: int
    share: float = MASKED_SHARE
    share_end: float | None = None
    epochs: int = 1
    continues_V: np.ndarray | None = None

    def share_in(self, epoch: int) -> float:
        """The share in this epoch, which is counted from 0."""
        if self.share_end is None or self.epochs < 2:
            return self.share
        done = min(epoch / (self.epochs - 1), 1.0)
        return self.share + done * (self.share_end - self.share)


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

    def order(self, epoch: int, earlier_spans: Sequence[BatchSpan] = ()) -> np.ndarray:
        """Return the indices of the pairs, batch by batch. A last, smaller batch has the pairs that are left.

        `earlier_spans` are the batches that the epoch had with other settings; their pairs are left out.
        """
        lengths = np.diff(self.examples.offsets)
        return epoch_order(lengths, self.seed, epoch, self.batch_size, self.bucketing, earlier_spans)

    def epoch(
        self, epoch: int, start: int = 0, reader: int = 0, readers: int = 1, earlier_spans: Sequence[BatchSpan] = ()
    ) -> Iterator[Batch]:
        """Yield the batches of one epoch, from batch number `start` after `earlier_spans` on.

        Of `readers` that share the batches, each takes every `readers`-th pair of a batch, from pair `reader` on. A
        reader for whom the last batch has no pair gets the batch's first pair, without labels: in distributed training
        all ranks must take the same number of steps.
        """
        order = self.order(epoch, earlier_spans)
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
        share = masking.share_in(epoch)
        ids, labels = mask_tokens(
            original_ids, offsets, masking.vocab_size, masking.seed, epoch, rows, share, masking.continues_V
        )
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
