"""The bigram baseline: predicts a masked word from the tokens on its left and right, by counts alone.

    p(w | l, r) = a u(w) + b c(l, w) / c(l) + d c(w, r) / c(r)

u(w) is the unigram baseline, c(l, w) how often w follows l in the training pairs, and c(w, r) how often w precedes r.
The weights a, b, d sum to one. They depend on how often l and r occur (in powers of ten), because a ratio of large
counts is more reliable: this is the interpolation of Jelinek and Mercer (1980). Expectation maximisation fits them on
training pairs that the counts do not include at that time. A neighbour that is masked, is padding or was never seen has
weight 0. `[CLS]` and `[SEP]` are neighbours like words: they say where a sentence begins and ends.

Cost: 16 bytes of memory for each distinct bigram and direction (IMDB: 2 million), and some 50 bytes for each of the
CHUNK tokens that are counted at a time. Ranks are exact: a loop compiled by numba visits every word that was seen next
to the left or the right word (IMDB: 94,000 ranks in 8 s on one core). Compiling it takes a second, once.

Shapes: N masked tokens, P pairs, V vocabulary, K = 3 experts (unigram, left, right), Q pairs of buckets.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from babybert.data.table import Examples
from babybert.data.tokenizer import MASK, PAD, UNK
from babybert.evaluation.scores import unigram_log_probs
from babybert.jit import compile_kernels

CHUNK = 2_000_000  # tokens counted at a time
BUCKETS = 6  # of a neighbour's count: 0, below 10, 100, 1,000, 10,000, and more
EXPERTS = 3
FITTED_SHARE = 0.05  # of the training pairs, the last ones: the weights are fitted on their masked tokens
MOST_FITTED = 20_000
ROUNDS = 30  # of expectation maximisation; the weights change little after the first ten
# A bucket with few tokens gets weights near those of all buckets together, as if it had this many tokens more.
PRIOR_TOKENS = 10.0
NO_WORD = np.int32(2**31 - 1)  # above every word's id
# Multipliers of splitmix64 and of the golden ratio (Steele et al., 2014), which spread close numbers far apart.
HASH_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))


@dataclass(frozen=True)
class Targets:
    """The N masked tokens of some pairs, and what a model is shown in their place and next to them (N each)."""

    pair_N: np.ndarray
    """Index of the pair."""
    position_N: np.ndarray
    """Position in the pair; 0 is `[CLS]`."""
    word_N: np.ndarray
    """The original id, which is to be predicted."""
    shown_N: np.ndarray
    """The id that stands in its place: `[MASK]`, another word or the word itself."""
    left_N: np.ndarray
    """The id on the left; `[PAD]` where there is none."""
    right_N: np.ndarray
    """The id on the right; `[PAD]` where there is none."""

    def __len__(self) -> int:
        return len(self.word_N)


def targets_of(examples: Examples) -> Targets:
    """The masked tokens of the examples, in their order."""
    token = np.flatnonzero(examples.labels)
    pair = np.searchsorted(examples.offsets, token, side="right") - 1
    first, end = examples.offsets[pair], examples.offsets[pair + 1]
    last_index = len(examples.ids) - 1
    # In externally prepared tables a pair may begin or end with a masked token, which then has one neighbour only.
    left = np.where(token > first, examples.ids[np.maximum(token - 1, 0)], PAD)
    right = np.where(token + 1 < end, examples.ids[np.minimum(token + 1, last_index)], PAD)
    return Targets(
        pair_N=pair,
        position_N=token - first,
        word_N=np.asarray(examples.labels[token]),
        shown_N=np.asarray(examples.ids[token]),
        left_N=left,
        right_N=right,
    )


class NeighbourCounts:
    """How often each word occurs next to each neighbour, on one side of it.

    Sorted by neighbour, then word: the words of one neighbour are a slice of the arrays.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.code = np.zeros(0, np.int64)  # neighbour * V + word
        self.count = np.zeros(0, np.int64)

    def add(self, neighbour: np.ndarray, word: np.ndarray) -> None:
        """Count bigrams of a word (`[UNK]` or an ordinary token) and a neighbour (neither `[PAD]` nor `[MASK]`)."""
        keep = (word >= UNK) & (neighbour != PAD) & (neighbour != MASK)
        new_code, new_count = np.unique(self._codes(neighbour[keep], word[keep]), return_counts=True)
        code = np.concatenate([self.code, new_code])
        count = np.concatenate([self.count, new_count])
        if not len(code):
            return
        order = np.argsort(code, kind="stable")
        code, count = code[order], count[order]
        # A bigram counted before and now has two entries, which are merged.
        first = np.flatnonzero(np.append(True, code[1:] != code[:-1]))
        self.code = code[first]
        self.count = np.add.reduceat(count, first)

    def _codes(self, neighbour: np.ndarray, word: np.ndarray) -> np.ndarray:
        code: np.ndarray = neighbour.astype(np.int64) * self.vocab_size + word
        return code

    def starts(self) -> np.ndarray:
        """Where each neighbour's slice begins (V + 1); it ends where the next one's begins."""
        return np.searchsorted(self.code, np.arange(self.vocab_size + 1) * self.vocab_size)

    def totals(self) -> np.ndarray:
        """How often each neighbour has a word next to it (V)."""
        cumulative = np.append(0, np.cumsum(self.count))
        return np.diff(cumulative[self.starts()])

    def counts(self, neighbour: np.ndarray, word: np.ndarray) -> np.ndarray:
        """How often each of these bigrams occurs."""
        if not len(self.code):
            return np.zeros(len(word), np.int64)
        code = self._codes(neighbour, word)
        index = np.minimum(np.searchsorted(self.code, code), len(self.code) - 1)
        return np.where(self.code[index] == code, self.count[index], 0)


class BigramBaseline:
    """The baseline, fitted on the training pairs; `counts_V` are their token counts."""

    def __init__(self, train: Examples, counts_V: np.ndarray) -> None:
        vocab_size = len(counts_V)
        self.unigram_V = np.exp(unigram_log_probs(counts_V))
        self.after = NeighbourCounts(vocab_size)  # words that follow a neighbour: it is on their left
        self.before = NeighbourCounts(vocab_size)  # words that precede a neighbour: it is on their right
        fitted = max(1, min(MOST_FITTED, round(FITTED_SHARE * len(train))))
        left_out_P = _same_words_as_last(train, fitted)
        self._count(train, ~left_out_P)
        self.weights = self._fit(targets_of(train.rows(len(train) - fitted, len(train))))
        self._count(train, left_out_P)

    def _count(self, examples: Examples, selected_P: np.ndarray) -> None:
        """Count the bigrams of the selected pairs."""
        for chunk, selected in _chunks(examples, selected_P):
            ids = chunk.original_ids()
            has_next = np.repeat(selected, np.diff(chunk.offsets))
            has_next[chunk.offsets[1:] - 1] = False  # a pair's last token: the next one is of another pair
            left = np.flatnonzero(has_next)
            self.after.add(ids[left], ids[left + 1])
            self.before.add(ids[left + 1], ids[left])

    def _experts(self, targets: Targets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probabilities (N, K) that the experts give to the targets, and the buckets (N) of both neighbours."""
        left_total = self.after.totals()[targets.left_N]
        right_total = self.before.totals()[targets.right_N]
        left_share = self.after.counts(targets.left_N, targets.word_N) / np.maximum(left_total, 1)
        right_share = self.before.counts(targets.right_N, targets.word_N) / np.maximum(right_total, 1)
        expert_NK = np.stack([self.unigram_V[targets.word_N], left_share, right_share], 1)
        return expert_NK, _bucket(left_total), _bucket(right_total)

    def _fit(self, targets: Targets) -> np.ndarray:
        """The experts' weights (BUCKETS, BUCKETS, K) for each pair of buckets, by expectation maximisation."""
        expert_NK, left_bucket_N, right_bucket_N = self._experts(targets)
        bucket_N = left_bucket_N * BUCKETS + right_bucket_N
        buckets = BUCKETS**2
        left_bucket_Q, right_bucket_Q = np.divmod(np.arange(buckets), BUCKETS)
        # A neighbour in bucket 0 was never seen, so its expert has weight 0.
        usable_QK = np.stack([np.ones(buckets, bool), left_bucket_Q > 0, right_bucket_Q > 0], 1)
        tokens_Q = np.bincount(bucket_N, minlength=buckets)
        weight_QK = usable_QK / usable_QK.sum(1, keepdims=True)
        for _ in range(ROUNDS):
            # Expectation: each expert's share in the probability of each target.
            share_NK = expert_NK * weight_QK[bucket_N]
            share_NK /= share_NK.sum(1, keepdims=True)
            # Maximisation: the mean shares in each bucket, with the mean of all buckets as a prior.
            mean_share_K = (share_NK.sum(0) + 1) / (len(targets) + EXPERTS)
            sum_QK = np.stack([np.bincount(bucket_N, share_NK[:, k], buckets) for k in range(EXPERTS)], 1)
            weight_QK = (sum_QK + PRIOR_TOKENS * mean_share_K) / (tokens_Q + PRIOR_TOKENS)[:, None] * usable_QK
            weight_QK /= weight_QK.sum(1, keepdims=True)
        weights: np.ndarray = weight_QK.reshape(BUCKETS, BUCKETS, EXPERTS)
        return weights

    def probabilities(self, targets: Targets) -> np.ndarray:
        """p(word | left, right) of each target (N). Over all words of the vocabulary these sum to one."""
        expert_NK, left_bucket_N, right_bucket_N = self._experts(targets)
        weighted_NK = self.weights[left_bucket_N, right_bucket_N] * expert_NK
        probability_N: np.ndarray = weighted_NK[:, 0] + weighted_NK[:, 1] + weighted_NK[:, 2]
        return probability_N

    def ranks(self, targets: Targets) -> np.ndarray:
        """How many words have a higher probability than the target (N, int64), exactly."""
        left_total = self.after.totals()[targets.left_N]
        right_total = self.before.totals()[targets.right_N]
        weight_NK = self.weights[_bucket(left_total), _bucket(right_total)]
        # Divided by the totals, the weights apply to counts.
        total_NK = np.stack([np.ones(len(targets)), np.maximum(left_total, 1), np.maximum(right_total, 1)], 1)
        rank_N = np.zeros(len(targets), np.int64)
        (rank_targets,) = rank_kernels_for(0)
        rank_targets(
            targets.word_N,
            weight_NK / total_NK,
            self.unigram_V,
            np.sort(self.unigram_V),
            _slices_of(self.after, targets.left_N),
            _slices_of(self.before, targets.right_N),
            rank_N,
        )
        return rank_N


def _bucket(total: np.ndarray) -> np.ndarray:
    """The bucket of a neighbour's count: 0 if it was never seen, else its number of digits, at most BUCKETS - 1."""
    digits = 1 + np.log10(np.maximum(total, 1)).astype(np.int64)
    return np.minimum(np.where(total > 0, digits, 0), BUCKETS - 1)


def _chunks(examples: Examples, flag_P: np.ndarray) -> Iterator[tuple[Examples, np.ndarray]]:
    """The examples in chunks of about CHUNK tokens, each with the flags of its pairs."""
    first = 0
    while first < len(examples):
        end = int(np.searchsorted(examples.offsets, examples.offsets[first] + CHUNK, side="right")) - 1
        end = max(first + 1, end)
        yield examples.rows(first, end), flag_P[first:end]
        first = end


def _same_words_as_last(examples: Examples, count: int) -> np.ndarray:
    """Flags (P) of the last `count` pairs, and of all pairs with the same words: copies of them with other masks."""
    digests = []
    for chunk, _ in _chunks(examples, np.ones(len(examples), bool)):
        lengths = np.diff(chunk.offsets)
        position = np.arange(len(chunk.ids)) - np.repeat(chunk.offsets[:-1], lengths)
        # The digest of a pair is the sum of a 64-bit hash of each (id, position).
        hashed = (chunk.original_ids().astype(np.uint64) + np.uint64(1)) * HASH_MULTIPLIERS[0]
        hashed ^= position.astype(np.uint64)
        hashed = (hashed ^ (hashed >> np.uint64(29))) * HASH_MULTIPLIERS[1]
        hashed ^= hashed >> np.uint64(32)
        digests.append(np.add.reduceat(hashed, chunk.offsets[:-1]))
    digest_P = np.concatenate(digests)
    return np.isin(digest_P, digest_P[len(digest_P) - count :])


class _Slices(NamedTuple):
    """The counts of one side, and each target's slice of them: a tuple of arrays, which numba can compile for."""

    words: np.ndarray  # int32, sorted within a slice
    counts: np.ndarray  # int64
    begin_N: np.ndarray
    end_N: np.ndarray


def _slices_of(counts: NeighbourCounts, neighbour_N: np.ndarray) -> _Slices:
    starts = counts.starts()
    words = (counts.code % counts.vocab_size).astype(np.int32)
    return _Slices(words, counts.count, starts[neighbour_N], starts[neighbour_N + 1])


# Below: the compiled search for ranks. Only words seen next to the left or the right neighbour have more than the
# unigram's share. So for each target
# 1. a bisection of the sorted unigram counts the words that are above the target by the unigram's share alone;
# 2. a merge of the slices of both sides then corrects that number for the words in them, by their whole probability.
# Comparing each target with all V words gives the same ranks (the test does it). On IMDB that takes 1.5 to 2 times as
# long when compiled, and 3 to 4 times as long in numpy.


@njit
def count_at(words, counts, begin, end, word):  # type: ignore[no-untyped-def]
    """The count of `word` in the slice from `begin` to `end`, whose words are sorted; 0 if it is not in it."""
    low, high = begin, end
    while low < high:
        middle = (low + high) // 2
        if words[middle] < word:
            low = middle + 1
        else:
            high = middle
    return counts[low] if low < end and words[low] == word else 0


@njit
def unigram_words_above(sorted_unigram_V, weight, probability):  # type: ignore[no-untyped-def]
    """How many words have a weighted unigram share above `probability`."""
    low, high = 0, len(sorted_unigram_V)
    while low < high:
        middle = (low + high) // 2
        if weight * sorted_unigram_V[middle] > probability:
            high = middle
        else:
            low = middle + 1
    return len(sorted_unigram_V) - low


@njit
def neighbour_correction(word, probability, weight_K, unigram_V, left, right, n):  # type: ignore[no-untyped-def]
    """What step 2 adds to the rank of target n, which is `word` and has this `probability`.

    Both slices are sorted by word: the smaller of the two next words is handled, and each slice that has it advances.
    """
    correction = 0
    i, left_end = left.begin_N[n], left.end_N[n]
    j, right_end = right.begin_N[n], right.end_N[n]
    while i < left_end or j < right_end:
        left_word = left.words[i] if i < left_end else NO_WORD
        right_word = right.words[j] if j < right_end else NO_WORD
        candidate = min(left_word, right_word)
        unigram_share = weight_K[0] * unigram_V[candidate]
        candidate_probability = unigram_share
        if left_word == candidate:
            candidate_probability += weight_K[1] * left.counts[i]
            i += 1
        if right_word == candidate:
            candidate_probability += weight_K[2] * right.counts[j]
            j += 1
        if candidate != word and candidate_probability > probability:
            correction += 1
        if unigram_share > probability:  # step 1 has counted it
            correction -= 1
    return correction


def _rank_targets(word_N, weight_NK, unigram_V, sorted_unigram_V, left, right, rank_N):  # type: ignore[no-untyped-def]
    """Write to `rank_N` how many words have a higher probability than each target."""
    for n in range(len(word_N)):
        word, weight_K = word_N[n], weight_NK[n]
        left_count = count_at(left.words, left.counts, left.begin_N[n], left.end_N[n], word)
        right_count = count_at(right.words, right.counts, right.begin_N[n], right.end_N[n], word)
        probability = weight_K[0] * unigram_V[word] + weight_K[1] * left_count + weight_K[2] * right_count
        rank = unigram_words_above(sorted_unigram_V, weight_K[0], probability)
        rank_N[n] = rank + neighbour_correction(word, probability, weight_K, unigram_V, left, right, n)


def _make(_width: int, cache: bool) -> tuple[Any, ...]:
    return (njit(cache=cache)(_rank_targets),)


# The kernel does not depend on a width: callers pass 0.
rank_kernels_for = compile_kernels(_make)
