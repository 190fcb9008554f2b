"""Choose the tokens that masked language modelling (MLM) hides, and what replaces them.

Each ordinary token is chosen with a probability of 0.15, or the share that the caller gives. Of the chosen tokens, 80 %
become `[MASK]`, 10 % a random ordinary token, and 10 % stay (Devlin et al., 2019, section 3.1). A row without a chosen
token gets the one whose random number is smallest, so every row has a target.

With whole-word masking, all pieces of a word have the random number of its first piece when tokens are chosen, so they
are chosen together. What replaces them is still drawn for each piece. The expected share of chosen tokens is the same.

The random numbers are a hash of (seed, epoch, row, position), not the state of a generator: the masks of a row do not
depend on which rows are masked with it, in what order, or by how many workers.

The functions with an argument `xp` compute the same numbers with numpy or torch: `xp` is the module that the arrays
come from, as in the Python array API standard. With torch they run on the tensors' device without waiting for it.
`mask_tokens` uses them for rows of different lengths in numpy, `device_loader.mask_batch` for padded rows in torch.
"""

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from babybert.data.tokenizer import FIRST_ORDINARY, MASK

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", np.ndarray, "Tensor")
Integers = TypeVar("Integers", int, np.ndarray, "Tensor")

MASKED_SHARE = 0.15
BECOMES_MASK = 0.80
BECOMES_RANDOM = 0.10
CHOOSE, REPLACE, DRAW = range(3)  # the three independent random numbers of a position

# The increment and the multipliers of splitmix64, as the int64 with the same bits: torch has no arithmetic on uint64.
INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


def mask_tokens(
    ids: np.ndarray,
    offsets: np.ndarray,
    vocab_size: int,
    seed: int,
    epoch: int,
    rows: np.ndarray,
    share: float = MASKED_SHARE,
    continues_V: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mask `share` of the ordinary tokens of rows that follow one another in one array.

    Args:
        ids: original ids; row r is `ids[offsets[r]:offsets[r + 1]]`.
        offsets: where each row starts (int64), and the end of the last one.
        vocab_size: random tokens have ids below it.
        seed: with `epoch`, determines the masks.
        epoch: see `seed`.
        rows: the number of each row (int64), for example its index in the dataset.
        share: the probability with which a token is chosen.
        continues_V: for each token of the vocabulary (bool), whether it continues the word of the token before it: such
            pieces are chosen with their word. None chooses each token for itself.

    Returns:
        the masked ids (int32), and the labels (int32): the original id where a token was chosen, 0 elsewhere.
    """
    masked_ids = ids.astype(np.int32)
    labels = np.zeros(len(ids), np.int32)
    if not len(ids):
        return masked_ids, labels
    lengths = np.diff(offsets)
    positions = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    row_hashes = np.repeat(hash_rows(seed, epoch, rows, CHOOSE), lengths)

    word_positions = positions
    if continues_V is not None:  # no word reaches back over a row's start, because `[CLS]` continues none
        word_starts = np.maximum.accumulate(np.where(continues_V[ids], 0, np.arange(len(ids))))
        word_positions = word_starts - np.repeat(offsets[:-1], lengths)
    draws = choosing_draws(ids, row_hashes, word_positions, np)
    smallest_draws = np.repeat(np.minimum.reduceat(draws, offsets[:-1]), lengths)
    chosen = np.flatnonzero(is_chosen(draws, smallest_draws, share, np))

    labels[chosen] = ids[chosen]
    chosen_rows = rows[np.searchsorted(offsets, chosen, side="right") - 1]
    masked_ids[chosen] = replacements(ids[chosen], vocab_size, seed, epoch, chosen_rows, positions[chosen], np)
    return masked_ids, labels


def choosing_draws(ids: Array, row_hashes: Array, positions: Array, xp: Any) -> Array:
    """Return the random number that decides whether a token is chosen; infinity for special tokens, which never are.

    `row_hashes` are from `hash_rows` with the stream `CHOOSE`. Tokens with the same of the `positions` are chosen
    together.
    """
    draws: Array = xp.where(ids >= FIRST_ORDINARY, _uniform(row_hashes, positions, xp), xp.inf)
    return draws


def is_chosen(draws: Array, smallest_draws: Array, share: float, xp: Any) -> Array:
    """Return which tokens are chosen: a `share` of them, and in every row the token or word with the smallest draw."""
    chosen: Array = (draws < share) | ((draws == smallest_draws) & xp.isfinite(draws))
    return chosen


def replacements(ids: Array, vocab_size: int, seed: int, epoch: int, rows: Array, positions: Array, xp: Any) -> Array:
    """Return what each token becomes if it is chosen: `[MASK]`, a random ordinary token, or itself."""
    draws = random_uniform(seed, epoch, rows, positions, REPLACE, xp)
    ordinary_tokens = vocab_size - FIRST_ORDINARY
    random_tokens = random_uniform(seed, epoch, rows, positions, DRAW, xp) * ordinary_tokens
    random_ids = FIRST_ORDINARY + xp.asarray(random_tokens, dtype=xp.int64)
    random_or_same = xp.where(draws < BECOMES_MASK + BECOMES_RANDOM, random_ids, ids)
    replaced: Array = xp.where(draws < BECOMES_MASK, MASK, random_or_same)
    return replaced


def random_uniform(seed: int, epoch: int, rows: Array, positions: Array, stream: int, xp: Any = np) -> Array:
    """Return numbers in [0, 1) (float64) that are a function of the arguments alone.

    `rows` and `positions` are int64 and broadcast against each other; `stream` selects one of several independent
    numbers of a position.
    """
    return _uniform(hash_rows(seed, epoch, rows, stream), positions, xp)


def hash_rows(seed: int, epoch: int, rows: Array, stream: int) -> Array:
    """Return the first half of the hash of `random_uniform`, the one that is the same for all positions of a row."""
    return splitmix64(rows ^ stream_key(seed, epoch, stream))


def _uniform(row_hashes: Array, positions: Array, xp: Any) -> Array:
    upper_53_bits = _shift_right(splitmix64(row_hashes + positions), 11)  # float64 holds 53 bits exactly
    uniform: Array = xp.asarray(upper_53_bits, dtype=xp.float64) * 2.0**-53
    return uniform


def stream_key(seed: int, epoch: int, stream: int) -> int:
    """Hash three numbers to one int64."""
    key = 0
    for value in (seed, epoch, stream):
        key = splitmix64(key ^ value)
    return (key + (1 << 63)) % (1 << 64) - (1 << 63)


def splitmix64(x: Integers) -> Integers:
    """Hash int64 numbers (splitmix64; Steele, Lea and Flood, 2014).

    Arrays wrap around on overflow, as uint64 would. A Python int does not, but its lowest 64 bits are the same.
    """
    x = x + INCREMENT
    x = (x ^ _shift_right(x, 30)) * MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * MULTIPLIER_2
    mixed: Integers = x ^ _shift_right(x, 31)
    return mixed


def _shift_right(x: Integers, bits: int) -> Integers:
    """Shift the lowest 64 bits right and zeros in, as with uint64; `>>` of int64 shifts in copies of the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
