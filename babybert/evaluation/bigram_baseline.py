"""What the two neighbours of a masked word tell: an interpolated bigram, the baseline that knows a little context.

    p(w | l, r) = a u(w) + b c(l, w) / c(l) + d c(w, r) / c(r)

u is the unigram, c(l, w) how often w stands after l in the training sentences, c(w, r) how often before r. The weights
a, b, d sum to one and depend on how often l and r have been seen at all (powers of ten), because a ratio of large
counts is to be trusted more (Jelinek and Mercer, 1980). They are fitted by expectation maximisation on training pairs
that are left out of the counts meanwhile. A neighbour that is masked itself, is padding or was never seen
has no weight; `[CLS]` and `[SEP]` are neighbours like words: they say where a sentence begins and ends.

Memory: 16 bytes a distinct bigram and direction (IMDB: 2 million), and some 50 bytes for each of the CHUNK tokens that
are counted at a time. Ranks go through all words seen beside the neighbours, in a loop compiled by numba.

Shapes: N masked tokens, V vocabulary, K = 3 experts (unigram, left, right).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from babybert.data.table import Examples
from babybert.data.tokenizer import MASK, PAD, UNK
from babybert.evaluation.scores import unigram_log_probs
from babybert.jit import compile_kernels

CHUNK = 2_000_000  # tokens counted at a time
BUCKETS = 6  # of a neighbour's count: none, below 10, 100, 1,000, 10,000, and more
FITTED_SHARE = 0.05  # of the training pairs, the last: the weights are fitted on their masked tokens
MOST_FITTED = 20_000
ROUNDS = 30  # of expectation maximisation; the weights stand still long before
PRIOR = 10.0  # tokens' worth of the weights of all buckets together, for a bucket that few tokens fall into


@dataclass(frozen=True)
class Targets:
    """N chosen tokens of some pairs, and what a model is shown in their place and beside them."""

    pair_N: np.ndarray
    position_N: np.ndarray  # in the pair, 0 is `[CLS]`
    word_N: np.ndarray  # the original id
    shown_N: np.ndarray
    left_N: np.ndarray
    right_N: np.ndarray

    def __len__(self) -> int:
        return len(self.word_N)


def targets_of(examples: Examples) -> Targets:
    """The chosen tokens, in their order."""
    at = np.flatnonzero(examples.labels)
    pair = np.searchsorted(examples.offsets, at, side="right") - 1
    # A row may begin or end with a chosen token in tables of other hands; then nothing stands beside it.
    left = np.where(at > examples.offsets[pair], examples.ids[np.maximum(at - 1, 0)], PAD)
    right = np.where(at + 1 < examples.offsets[pair + 1], examples.ids[np.minimum(at + 1, len(examples.ids) - 1)], PAD)
    return Targets(
        pair, at - examples.offsets[pair], np.asarray(examples.labels[at]), np.asarray(examples.ids[at]), left, right
    )


class NeighborCounts:
    """How often each word stands beside each neighbour, on one side; sorted, so that a neighbour's words are a slice."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.code = np.zeros(0, np.int64)  # neighbour * V + word
        self.count = np.zeros(0, np.int64)

    def add(self, neighbour: np.ndarray, word: np.ndarray) -> None:
        """Count these; special tokens other than `[UNK]` are no words, `[PAD]` and `[MASK]` no neighbours."""
        keep = (word >= UNK) & (neighbour != PAD) & (neighbour != MASK)
        code, count = np.unique(neighbour[keep].astype(np.int64) * self.vocab_size + word[keep], return_counts=True)
        code, count = np.concatenate([self.code, code]), np.concatenate([self.count, count])
        order = np.argsort(code, kind="stable")
        code, count = code[order], count[order]
        first = np.flatnonzero(np.append(True, code[1:] != code[:-1])) if len(code) else np.zeros(0, np.int64)
        self.code, self.count = code[first], np.add.reduceat(count, first) if len(first) else count

    def start_of(self) -> np.ndarray:
        """Where each neighbour's slice begins (V + 1)."""
        return np.searchsorted(self.code, np.arange(self.vocab_size + 1) * self.vocab_size)

    def totals(self) -> np.ndarray:
        """How often each neighbour has a word beside it (V)."""
        return np.diff(np.append(0, np.cumsum(self.count))[self.start_of()])

    def counts(self, neighbour: np.ndarray, word: np.ndarray) -> np.ndarray:
        """How often these stand beside each other."""
        if not len(self.code):
            return np.zeros(len(word), np.int64)
        code = neighbour.astype(np.int64) * self.vocab_size + word
        at = np.minimum(np.searchsorted(self.code, code), len(self.code) - 1)
        return np.where(self.code[at] == code, self.count[at], 0)


class Bigram:
    """The baseline, fitted on training pairs; `counts_V` are their token counts."""

    def __init__(self, train: Examples, counts_V: np.ndarray) -> None:
        self.unigram_V = np.exp(unigram_log_probs(counts_V))
        self.after, self.before = NeighborCounts(len(counts_V)), NeighborCounts(len(counts_V))
        fitted = max(1, min(MOST_FITTED, round(FITTED_SHARE * len(train))))
        apart_P = _copies_of_last(train, fitted)
        self._count(train, ~apart_P)
        self.weights = np.zeros((BUCKETS, BUCKETS, 3))
        self._fit(targets_of(train.rows(len(train) - fitted, len(train))))
        self._count(train, apart_P)

    def _count(self, examples: Examples, chosen_P: np.ndarray) -> None:
        for part, keep_P in _chunks(examples, chosen_P):
            ids = part.original_ids()
            # Not over the border between two pairs; a last token has its neighbour in the next pair.
            inside = np.repeat(keep_P, np.diff(part.offsets))
            inside[part.offsets[1:] - 1] = False
            at = np.flatnonzero(inside)
            self.after.add(ids[at], ids[at + 1])
            self.before.add(ids[at + 1], ids[at])

    def _experts(self, targets: Targets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probabilities (N, K) that the experts give to the targets, and the neighbours' buckets."""
        left_total, right_total = self.after.totals()[targets.left_N], self.before.totals()[targets.right_N]
        share_left = self.after.counts(targets.left_N, targets.word_N) / np.maximum(left_total, 1)
        share_right = self.before.counts(targets.right_N, targets.word_N) / np.maximum(right_total, 1)
        return (
            np.stack([self.unigram_V[targets.word_N], share_left, share_right], 1),
            _bucket(left_total),
            _bucket(right_total),
        )

    def _fit(self, targets: Targets) -> None:
        expert_NK, left_N, right_N = self._experts(targets)
        bucket_N = left_N * BUCKETS + right_N
        has_left, has_right = np.divmod(np.arange(BUCKETS**2), BUCKETS)
        usable = np.stack([np.ones(BUCKETS**2, bool), has_left > 0, has_right > 0], 1)
        seen = np.bincount(bucket_N, minlength=BUCKETS**2)
        pooled, weights = np.full(3, 1 / 3), usable / usable.sum(1, keepdims=True)
        for _ in range(ROUNDS):
            part_NK = expert_NK * weights[bucket_N]
            part_NK /= part_NK.sum(1, keepdims=True)
            pooled = (part_NK.sum(0) + 1) / (len(targets) + 3)
            sums = np.stack([np.bincount(bucket_N, part_NK[:, k], BUCKETS**2) for k in range(3)], 1)
            weights = (sums + PRIOR * pooled) / (seen + PRIOR)[:, None] * usable
            weights /= weights.sum(1, keepdims=True)
        self.weights = weights.reshape(BUCKETS, BUCKETS, 3)

    def probabilities(self, targets: Targets) -> np.ndarray:
        """p(word | left, right) of each target (N); over the whole vocabulary these sum to one."""
        expert_NK, left_N, right_N = self._experts(targets)
        weight_NK = self.weights[left_N, right_N]
        return weight_NK[:, 0] * expert_NK[:, 0] + weight_NK[:, 1] * expert_NK[:, 1] + weight_NK[:, 2] * expert_NK[:, 2]

    def ranks(self, targets: Targets) -> np.ndarray:
        """How many words have a higher probability than the target (N), exactly."""
        left_total, right_total = self.after.totals()[targets.left_N], self.before.totals()[targets.right_N]
        weight_NK = self.weights[_bucket(left_total), _bucket(right_total)]
        scale_NK = weight_NK / np.stack(
            [np.ones(len(targets)), np.maximum(left_total, 1), np.maximum(right_total, 1)], 1
        )
        start_left, start_right = self.after.start_of(), self.before.start_of()
        size = self.after.vocab_size
        rank_N = np.zeros(len(targets), np.int64)
        rank_kernel(0)[0](
            np.stack(
                [
                    targets.word_N,
                    start_left[targets.left_N],
                    start_left[targets.left_N + 1],
                    start_right[targets.right_N],
                    start_right[targets.right_N + 1],
                ],
                1,
            ),
            scale_NK,
            self.unigram_V,
            np.sort(self.unigram_V),
            (self.after.code % size).astype(np.int32),
            self.after.count,
            (self.before.code % size).astype(np.int32),
            self.before.count,
            rank_N,
        )
        return rank_N


def _bucket(total: np.ndarray) -> np.ndarray:
    return np.minimum(np.where(total > 0, 1 + np.log10(np.maximum(total, 1)).astype(np.int64), 0), BUCKETS - 1)


def _chunks(examples: Examples, chosen_P: np.ndarray) -> Iterator[tuple[Examples, np.ndarray]]:
    """Parts of about CHUNK tokens, with their pairs' flags."""
    first = 0
    while first < len(examples):
        last = max(first + 1, int(np.searchsorted(examples.offsets, examples.offsets[first] + CHUNK, side="right")) - 1)
        yield examples.rows(first, last), chosen_P[first:last]
        first = last


def _copies_of_last(examples: Examples, count: int) -> np.ndarray:
    """Flags (P) of the last `count` pairs and of all that have the same words: differently masked copies of them."""
    digests = []
    for part, _ in _chunks(examples, np.ones(len(examples), bool)):
        position = np.arange(len(part.ids)) - np.repeat(part.offsets[:-1], np.diff(part.offsets))
        mixed = (part.original_ids().astype(np.uint64) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        ) ^ position.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        digests.append(np.add.reduceat(mixed ^ (mixed >> np.uint64(32)), part.offsets[:-1]))
    digest_P = np.concatenate(digests)
    return np.isin(digest_P, digest_P[len(digest_P) - count :])


def _ranks(target_N5, scale_NK, unigram_V, sorted_V, left_word, left_count, right_word, right_count, rank_N):  # type: ignore[no-untyped-def]
    """Two sorted lists are merged; a word in neither has the unigram's share alone, and these are counted by bisection."""
    for n in range(len(target_N5)):
        word, i, left_end, j, right_end = target_N5[n]
        a, b, d = scale_NK[n]
        own_left = own_right = 0
        low, high = i, left_end
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if left_word[middle] < word else (low, middle)
        if low < left_end and left_word[low] == word:
            own_left = left_count[low]
        low, high = j, right_end
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if right_word[middle] < word else (low, middle)
        if low < right_end and right_word[low] == word:
            own_right = right_count[low]
        own = a * unigram_V[word] + b * own_left + d * own_right
        low, high = 0, len(sorted_V)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if a * sorted_V[middle] > own else (middle + 1, high)
        rank = len(sorted_V) - low
        while i < left_end or j < right_end:
            left = left_word[i] if i < left_end else np.int32(2147483647)
            right = right_word[j] if j < right_end else np.int32(2147483647)
            candidate = min(left, right)
            base = a * unigram_V[candidate]
            score = base
            if left == candidate:
                score += b * left_count[i]
                i += 1
            if right == candidate:
                score += d * right_count[j]
                j += 1
            if candidate != word and score > own:
                rank += 1
            if base > own:
                rank -= 1
        rank_N[n] = rank


def _make(_: int, cache: bool) -> tuple[Any, ...]:
    return (njit(cache=cache)(_ranks),)


rank_kernel = compile_kernels(_make)
