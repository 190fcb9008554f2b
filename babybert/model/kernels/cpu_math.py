"""What the CPU kernels share: an exponential and a random number that vectorise, and the number of threads.

LLVM turns a loop into vector instructions only if its body calls no function and carries no state from one round to the
next. So `exp` is a polynomial whose exponent is set by bit operations, and a random number is a hash of its position
instead of the next number of a generator. All helpers are inlined. `babybert/jit.py` says how kernels are compiled and
cached, and what to delete after an edit of this file.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import config, njit, set_num_threads, types
from numba.extending import intrinsic
from torch import Tensor

import babybert.jit  # noqa: F401  # sets the width of vectors, which must happen before anything is compiled

EXP2_COEFFICIENTS = (
    np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, 5, [-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef.astype(np.float32)
)
C0, C1, C2, C3, C4, C5 = EXP2_COEFFICIENTS
LOG2_E = np.float32(np.log2(np.e))
SMALLEST = np.float32(-126.0)  # below 2^-126 there are only denormal numbers
LARGEST = np.float32(126.0)
FLOATS_PER_CACHE_LINE = 16
LANES = 64  # running maxima side by side: four vectors of AVX-512
GOLDEN = np.uint32(0x9E3779B9)  # 2^32 / golden ratio: neighbouring columns get hashes that lie far apart


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """The fp32 number with these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def bits_of_float(typing_context: Any, value: Any) -> Any:
    """The 32 bits of an fp32 number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@njit(inline="always", fastmath=True)
def exp(x):
    """e^x for -87 < x < 87, and the value at the nearer end beyond.

    The relative error is that of rounding x to fp32: 3e-7 near 0, 4e-6 at the ends.
    """
    y = min(max(x * LOG2_E, SMALLEST), LARGEST)
    whole = np.rint(y)
    f = np.float32(y - whole)
    power = np.float32(C0 + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * C5)))))
    # numba's sum and shift of int32 are int64, which processors without AVX-512 convert to floats one by one. The casts
    # keep them at 32 bits.
    return float_of_bits(np.int32(bits_of_float(power) + np.int32(np.int32(whole) << np.int32(23))))


@njit(inline="always", fastmath=True)
def largest(z, lanes):
    """The maximum of `z`, whose length is a multiple of LANES. `lanes` is scratch space for LANES numbers.

    LANES running maxima are kept side by side, because a loop with a single one is not vectorised.
    """
    for v in range(LANES):
        lanes[v] = z[v]
    for first in range(LANES, len(z), LANES):
        for v in range(LANES):
            lanes[v] = max(lanes[v], z[first + v])
    maximum = lanes[0]
    for v in range(1, LANES):
        maximum = max(maximum, lanes[v])
    return maximum


@njit(inline="always", fastmath=True)
def largest_of_row(z, lanes):
    """The maximum of `z`, of any length; see `largest`."""
    top = np.float32(-np.inf)
    whole = len(z) // LANES * LANES
    if whole:
        top = largest(z[:whole], lanes)
    for v in range(whole, len(z)):
        top = max(top, z[v])
    return top


@njit(inline="always")
def aligned(size):
    """`size` uninitialised fp32 numbers that begin at a cache line.

    numba's own arrays may begin in the middle of one. Each 512-bit vector would then span two cache lines.
    """
    raw = np.empty(size + FLOATS_PER_CACHE_LINE, np.float32)
    first = -(raw.ctypes.data // 4) % FLOATS_PER_CACHE_LINE
    return raw[first : first + size]


@njit(inline="always")
def mix(x):
    """A hash of 32 bits to 32 bits (`lowbias32`, found by Chris Wellons' hash-prospector)."""
    # numba's product of two uint32 is a uint64. The casts cut it, or a vector would hold half as many numbers.
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@njit(inline="always")
def row_key(row, seed0, seed1):
    """The part of the hash that all columns of a row share."""
    return np.uint32(mix(np.uint32(np.uint32(row) + seed0)) ^ seed1)


@njit(inline="always")
def bits_of(key, column):
    """The 32 random bits of one column of a row; `key` is the row's `row_key`."""
    return mix(np.uint32(key + np.uint32(np.uint32(column) * GOLDEN)))


def dropout_constants(dropout_p: float, seed_2: Tensor) -> tuple[np.uint32, np.uint32, np.uint32, np.float32]:
    """The two halves of the seed, the threshold of the hash (numbers at or above it are kept), and 1 / (1 - p)."""
    seed0, seed1 = seed_2.tolist()
    return (
        np.uint32(seed0),
        np.uint32(seed1),
        np.uint32(min(round(dropout_p * 2**32), 2**32 - 1)),
        np.float32(1 / (1 - dropout_p)),
    )


def threads_for(rows: int, rows_per_thread: int) -> int:
    """How many threads to start for so many rows: at most PyTorch's number, each with `rows_per_thread` rows or more.

    PyTorch's number is the limit because a process among several must not take all cores. numba's threads and PyTorch's
    are both OpenMP's. Where both load the same library, numba also changes PyTorch's number when it starts its threads,
    which is undone here: OpenMP would end and start threads whenever the number changes.
    """
    allowed = torch.get_num_threads()
    available = min(allowed, vars(config)["NUMBA_NUM_THREADS"])
    set_num_threads(available)
    if torch.get_num_threads() != allowed:
        torch.set_num_threads(allowed)
    return max(1, min(available, rows // rows_per_thread))
