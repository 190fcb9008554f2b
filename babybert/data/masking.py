"""Choose the tokens that masked language modelling (MLM) hides, and what stands in their place.

Each ordinary token is chosen with probability 0.15, or another share that training is told; of those, 80 % become
`[MASK]`, 10 % a random ordinary token, 10 % stay (Devlin et al., 2019, section 3.1). A row in which none came up gets
its likeliest one, so every row has a target. The random numbers are a hash of (seed, epoch, row, position), not a
generator's state: a row's masks do not depend on which rows are masked beside it, in what order, or by how many workers.
"""

import numpy as np

from babybert.data.tokenizer import FIRST_ORDINARY, MASK

MASKED_SHARE = 0.15
BECOMES_MASK = 0.80
BECOMES_RANDOM = 0.10
CHOOSE, REPLACE, DRAW = range(3)  # the three independent random numbers of a position


def mask_tokens(
    ids: np.ndarray,
    offsets: np.ndarray,
    vocab_size: int,
    seed: int,
    epoch: int,
    rows: np.ndarray,
    share: float = MASKED_SHARE,
) -> tuple[np.ndarray, np.ndarray]:
    """Mask `share` of the tokens of rows laid end to end: row r, the pair with index `rows[r]`, is `ids[offsets[r]:offsets[r + 1]]`.

    Returns:
        input ids (int32) after masking, and labels (int32): the original id where a token was chosen, 0 elsewhere.
    """
    lengths = np.diff(offsets)
    position = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    draw = np.where(
        ids >= FIRST_ORDINARY, random_uniform(seed, epoch, np.repeat(rows, lengths), position, CHOOSE), np.inf
    )
    # The smallest number of a row is chosen even above the share: no row is without a target.
    smallest = np.repeat(np.minimum.reduceat(draw, offsets[:-1]), lengths) if len(ids) else draw
    chosen = np.flatnonzero((draw < share) | ((draw == smallest) & np.isfinite(draw)))

    row, position = rows[np.searchsorted(offsets, chosen, side="right") - 1], position[chosen]
    fate = random_uniform(seed, epoch, row, position, REPLACE)
    random_id = FIRST_ORDINARY + (
        random_uniform(seed, epoch, row, position, DRAW) * (vocab_size - FIRST_ORDINARY)
    ).astype(np.int32)
    masked, labels = ids.astype(np.int32), np.zeros(len(ids), np.int32)
    labels[chosen] = ids[chosen]
    masked[chosen] = np.where(
        fate < BECOMES_MASK, MASK, np.where(fate < BECOMES_MASK + BECOMES_RANDOM, random_id, ids[chosen])
    )
    return masked, labels


def random_uniform(seed: int, epoch: int, row: np.ndarray, position: np.ndarray, stream: int) -> np.ndarray:
    """Numbers in [0, 1) that are a function of the arguments alone (splitmix64; Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(row.astype(np.uint64) ^ stream_key(seed, epoch, stream)) + position.astype(np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def stream_key(seed: int, epoch: int, stream: int) -> np.ndarray:
    """What these three come to, as one uint64."""
    key = np.zeros((), np.uint64)
    for part in (seed, epoch, stream):
        key = _mix(key ^ np.uint64(part))
    return key


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))
