"""What the Triton kernels share: tiles, exact products, block sizes, and sums that are split over programs.

Sums are split and their partial sums added in a fixed order, without atomics: the same input gives the same bits.
Nothing waits for the GPU. Sums are fp32. Products are bf16 where the layer's input is (as under autocast), else exact
fp32 (not TF32). A width is padded to a power of two of at least 16, which `tl.dot` needs: width 10 costs as much as 16.

They are checked on an H200 by `make bench-gpu` and in Triton's interpreter (TRITON_INTERPRET=1) by the tests. See
`triton_policy.py` for when they are used.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from babybert.model.kernels import Requirements

BLOCK = 64  # rows, and words or units, of a block; in fp32, 128 do not fit the registers of WARPS x 32 threads
WARPS = 8
TILE = 2048  # most numbers in a block of a table: wider models get fewer rows, so that all fits an H100's shared memory
# A sum is split until there are this many programs: four for each of an H100's 132 processors. The number does not
# depend on the GPU, so that the bits do not either.
PROGRAMS = 512
WIDEST = 64  # a guess: there fp32 products should take about the time in which PyTorch moves its logits
INTERPRETED = constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b):
    if INTERPRETED:  # the interpreter would multiply the bits of bf16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tile(table, row, column, width, rows, columns):
    """table[row, column], 0 where `rows` or `columns` is false."""
    return tl.load(table + row[:, None] * width + column[None, :], mask=rows[:, None] & columns[None, :], other=0.0)


def requirements(x_ND: Tensor, weight: Tensor) -> Requirements:
    """What must hold for the kernels to be correct, and assumed to be faster. `weight` has D columns."""
    return {
        "on a GPU": x_ND.device.type == "cuda" or bool(INTERPRETED.value),
        "fp32 or bf16": {x_ND.dtype, weight.dtype} <= {torch.float32, torch.bfloat16},
        f"width <= {WIDEST}": weight.shape[1] <= WIDEST,
        "32-bit offsets": max(x_ND.numel(), weight.numel()) < 2**31,
    }


def block_sizes(width: int) -> dict[str, int]:
    """The constants that all kernels of a width have in common."""
    padded = max(16, triton.next_power_of_2(width))
    return {"D": width, "PADDED": padded, "BLOCK": max(16, min(BLOCK, TILE // padded)), "num_warps": WARPS}


def split_sum(length: int, block: int, programs: int) -> tuple[int, int]:
    """Into how many splits to divide a sum over `length`, and the length of each (whole blocks).

    `programs` is how many programs there are without a split.
    """
    blocks = max(1, triton.cdiv(length, block))
    splits = min(blocks, max(1, PROGRAMS // max(1, programs)))
    span = triton.cdiv(blocks, splits) * block
    return max(1, triton.cdiv(length, span)), span


def cast_gradients(gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> tuple[Tensor | None, ...]:
    """Each gradient in its input's type."""
    return tuple(
        None if gradient is None else gradient.to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)
    )
