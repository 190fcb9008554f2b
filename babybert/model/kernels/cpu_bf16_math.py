"""What the bf16 kernels of a CPU share: conversions between fp32 and bf16.

numba has no bf16. A bf16 number is the upper half of an fp32 number, and the kernels see bf16 tensors as 16-bit
integers. They compute in fp32 and round to the nearest bf16 number, ties to even, as PyTorch does.
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from babybert.model.kernels.cpu_math import bits_of_float, float_of_bits

ROWS_PER_THREAD = 16  # fewer are not worth a thread's start


@njit(inline="always", fastmath=True)
def widen(bits):
    """The fp32 number that equals the bf16 number with these bits."""
    return float_of_bits(np.int32(np.int32(bits) << np.int32(16)))


@njit(inline="always")
def narrow(x):
    """The bits of the bf16 number nearest to an fp32 number."""
    bits = np.uint32(bits_of_float(x))
    is_odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + is_odd)) >> np.uint32(16))


def bits_array(x: Tensor) -> Any:
    """A contiguous bf16 tensor's memory as a numpy array of 16-bit integers."""
    assert x.dtype == torch.bfloat16
    return x.detach().view(torch.uint16).numpy()


def round_up(count: int, bits: int = 4) -> int:
    """The next number with at most so many significant bits.

    oneDNN compiles a product for each shape, in a millisecond or more, and keeps the latest 1,024 or more of them. So
    all shapes that differ from batch to batch are rounded up, and the rest is filled with zeros.
    """
    step = 1 << max(0, count.bit_length() - bits)
    return -(-count // step) * step
