"""The order of an epoch's pairs: shuffled by (seed, epoch), and bucketed by length.

With bucketing, the order depends on the batch size. If a run is resumed within an epoch with another batch size, the
pairs that are left are dealt into batches anew. So the order is a function of the seed, the epoch, the batch size, and
the batches that the epoch had before, as a short list of `BatchSpan`. Each pair of an epoch comes exactly once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Keeps these random numbers apart from those that `pairs.py` draws with the same seed. Otherwise the first epoch would
# have the permutation that chose the negatives, and half of it would pass before the first pair of the other label.
ORDER_STREAM = 2
POOL_BATCHES = 64  # how many batches are sorted by length together: more would pad less, but shuffle less


@dataclass(frozen=True)
class BatchSpan:
    """Consecutive batches of one epoch that were made with the same settings."""

    batch_size: int
    bucketing: bool
    batches: int

    @property
    def pairs(self) -> int:
        """Pairs of these batches. They are full, because an epoch ends after a smaller one."""
        return self.batches * self.batch_size


def pairs_in_spans(spans: Sequence[BatchSpan]) -> int:
    """Return how many pairs of an epoch these batches took."""
    return sum(span.pairs for span in spans)


def batches_of(pairs: int, batch_size: int) -> int:
    """Return how many batches these pairs make; the last may be smaller."""
    return -(-pairs // batch_size)  # rounded up


def epoch_order(
    lengths: np.ndarray,
    seed: int,
    epoch: int,
    batch_size: int,
    bucketing: bool,
    earlier_spans: Sequence[BatchSpan] = (),
) -> np.ndarray:
    """Return the indices of the pairs that come after `earlier_spans`, batch by batch.

    Args:
        lengths: tokens of each pair.
        seed: with the epoch, determines the order.
        epoch: counted from 0.
        batch_size: pairs per batch.
        bucketing: make batches of pairs of similar length.
        earlier_spans: the batches that the epoch had with other settings.
    """
    rng = np.random.default_rng((seed, ORDER_STREAM, epoch))
    rows = rng.permutation(len(lengths))
    for span in earlier_spans:
        rows = _deal(rows, lengths, span.batch_size, span.bucketing, rng)[span.pairs :]
    return _deal(rows, lengths, batch_size, bucketing, rng)


def _deal(
    rows: np.ndarray, lengths: np.ndarray, batch_size: int, bucketing: bool, rng: np.random.Generator
) -> np.ndarray:
    """Put `rows` into the order of their batches. A last, smaller batch has the pairs that are left."""
    if not bucketing:
        return rows
    full_batches = len(rows) // batch_size
    bucketed = rows[: full_batches * batch_size]
    rest = rows[full_batches * batch_size :]
    pools = np.arange(len(bucketed)) // (POOL_BATCHES * batch_size)
    bucketed = bucketed[np.lexsort((lengths[bucketed], pools))]  # by pool, and in a pool by length
    batches = bucketed.reshape(-1, batch_size)
    return np.concatenate([batches[rng.permutation(full_batches)].ravel(), rest])
