"""What the CPU kernels share: an exponential and a random number that vectorise, and how they are compiled.

numba compiles Python loops with LLVM. A loop becomes vector instructions only if its body has no call in it (so `exp` is
a polynomial with an exponent set by bits) and no state that goes from one round to the next (so a random number is a
hash of where it is, not the next of a generator). Compiling takes seconds, once: numba keeps the code on disk, under
`__pycache__` or NUMBA_CACHE_DIR. A kernel's closure may hold numbers, but no compiled function: numba would take it for
another one in each process, and compile again. It does not see changes in this file: after an edit, delete `*.nbi` in
`__pycache__`.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import config, njit, set_num_threads, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic
from torch import Tensor

POWERS = (
    np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, 5, [-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef.astype(np.float32)
)
C0, C1, C2, C3, C4, C5 = POWERS
LOG2_E = np.float32(np.log2(np.e))
SMALLEST = np.float32(-126.0)  # below 2^-126 there are only denormal numbers
LARGEST = np.float32(126.0)
FLOATS_A_LINE = 16
LANES = 64  # maxima side by side, four vectors of AVX-512
GOLDEN = np.uint32(0x9E3779B9)  # 2^32 over the golden ratio: neighbours come to lie far apart


def use_wide_vectors() -> None:
    """Have numba use 512-bit vectors on a processor with AVX-512, unless NUMBA_CPU_FEATURES says what to use.

    LLVM keeps to 256 bits on Intel's, lest a few wide instructions slow the clock for all others; these loops are nothing else. It
    must be said before anything is compiled, and holds for all that numba compiles in this process.
    """
    features = get_host_cpu_features()
    if vars(config)["CPU_FEATURES"] is None and "+avx512f" in features.split(","):
        vars(config)["CPU_FEATURES"] = f"{features},-prefer-256-bit"


use_wide_vectors()


@intrinsic
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    """The fp32 number with these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _bits_of_float(typing_context: Any, number: Any) -> Any:
    """The 32 bits of an fp32 number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@njit(inline="always", fastmath=True)
def exp(x):
    """e^x for -87 < x < 87, and beyond what it is there; as exact as the rounding of x lets it be (3e-7 near 0, 4e-6 at the ends)."""
    y = min(max(x * LOG2_E, SMALLEST), LARGEST)
    whole = np.rint(y)
    f = np.float32(y - whole)
    power = np.float32(C0 + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * C5)))))
    # numba's sum and shift of int32 are int64, which processors without AVX-512 turn into floats one by one: each is cut.
    return _float_of_bits(np.int32(_bits_of_float(power) + np.int32(np.int32(whole) << np.int32(23))))


@njit(inline="always", fastmath=True)
def largest(z, lanes):
    """The maximum of a multiple of LANES numbers, many side by side: a single running maximum would not be vectorised."""
    for v in range(LANES):
        lanes[v] = z[v]
    for first in range(LANES, len(z), LANES):
        for v in range(LANES):
            lanes[v] = max(lanes[v], z[first + v])
    most = lanes[0]
    for v in range(1, LANES):
        most = max(most, lanes[v])
    return most


@njit(inline="always")
def aligned(size):
    """So many fp32 numbers, not set, that begin at a cache line: numba's own may begin in the middle of one, and then every vector of 512 bits lies in two."""
    raw = np.empty(size + FLOATS_A_LINE, np.float32)
    first = -(raw.ctypes.data // 4) % FLOATS_A_LINE
    return raw[first : first + size]


@njit(inline="always")
def mix(x):
    """A hash of 32 bits to 32 bits (`lowbias32`, found by Chris Wellons' hash-prospector)."""
    # numba's product of two uint32 is a uint64: each is cut, or the loop works on half as many numbers at a time.
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@njit(inline="always")
def row_key(row, seed0, seed1):
    """What all random numbers of a row have in common."""
    return np.uint32(mix(np.uint32(np.uint32(row) + seed0)) ^ seed1)


@njit(inline="always")
def bits_of(key, column):
    """The random number of one column of a row: 32 bits."""
    return mix(np.uint32(key + np.uint32(np.uint32(column) * GOLDEN)))


def dropout_numbers(drop: float, seed_2: Tensor) -> tuple[np.uint32, np.uint32, np.uint32, np.float32]:
    """The seed as two numbers, the hash from which on a number is kept, and what is kept is multiplied by."""
    seed0, seed1 = seed_2.tolist()
    return (
        np.uint32(seed0),
        np.uint32(seed1),
        np.uint32(min(round(drop * 2**32), 2**32 - 1)),
        np.float32(1 / (1 - drop)),
    )


def threads_for(rows: int, rows_each: int) -> int:
    """As many threads as torch uses (one process of several does not take all cores), each with work worth its start.

    numba's threads are OpenMP's, as torch's are. When they first start, numba changes torch's number to its own: it is put
    back. Both then always ask for the same number: OpenMP ends and starts threads when it changes.
    """
    allowed = torch.get_num_threads()
    most = min(allowed, vars(config)["NUMBA_NUM_THREADS"])
    set_num_threads(most)
    if torch.get_num_threads() != allowed:
        torch.set_num_threads(allowed)
    return max(1, min(most, rows // rows_each))


def compiled(make: Callable[[int, bool], tuple[Any, ...]]) -> Callable[[int], tuple[Any, ...]]:
    """`make(width, cache)` as a function of the width: called once for each, without a cache where no folder can be written."""

    @functools.cache
    def kernels(width: int) -> tuple[Any, ...]:
        try:
            made = make(width, True)
        except RuntimeError:
            made = make(width, False)
        return tuple(_forgiving(kernel) for kernel in made)

    return kernels


def _forgiving(kernel: Any) -> Callable[..., None]:
    """The kernel, also where what was compiled cannot be written to the cache, for want of space: it is there in memory."""

    def run(*arguments: Any) -> None:
        try:
            kernel(*arguments)
        except OSError:
            kernel(*arguments)

    return run
