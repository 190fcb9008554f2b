"""A narrow model's answers on a CPU: numba kernels for one thread, which read each table once and write no logits.

A server asks for the likeliest words at some positions and their probabilities, not for a loss. `BestWords` passes over
the vocabulary in blocks: the logits of a block and a position stay in the first cache, where their exponentials are added
up and the best words so far are kept, so that nothing of N x V is ever written. A block is looked through for better words
only if its sum is as large as the least of the best: no word in it can be, if all of them together are not. `FeedForward` is that of training
without its dropout and its threads.

Compiled for one thread this takes a second or two, which a server can spend before it says that it is ready. No cache on
disk is kept: numba's is keyed by the path of the source, and TorchServe unpacks an archive to another one each time.

The loops are compiled on the understanding that nothing overflows and nothing is NaN: `takes` looks at the weights.

Shapes: N masks or tokens, D width, V vocabulary, K candidates, B blocks, C columns of a block.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

from babybert.model.kernels.cpu_math import LANES, exp, largest

BLOCK = 512  # words at a time: 20 KB of a table of width 10, which fit a core's first cache
UNITS = 256  # hidden units at a time, of which there are two tables
TOO_LARGE = np.float32(1e30)  # a sum of exponentials that is not to be trusted
HIGHEST = np.float32(80)  # e^80 x BLOCK is a number yet, and too large
NEARLY = np.float32(0.99)  # of what a sum must reach: it is rounded
ROWS_A_THREAD = 8  # positions that are worth a thread's start
WIDEST, WIDEST_FEED_FORWARD = 32, 16  # beyond them the matrix products of the plain form win
SMALLEST_VOCABULARY = 4096  # with fewer words the plain form takes no time either
LARGEST_WEIGHT = 1e4  # products of such numbers stay far below the largest of fp32, at any width up to WIDEST
NOTHING = np.float32(-1e30)  # the bias of a word that is not there


@functools.cache
def _feed_forward_kernel(width: int) -> Any:
    D = width

    @njit(fastmath=True)
    def feed_forward(x_ND, table1_BDC, bias1_BC, table2_BDC, a_C, y_ND):
        for b in range(bias1_BC.shape[0]):
            table1, bias1, table2 = table1_BDC[b], bias1_BC[b], table2_BDC[b]
            for n in range(x_ND.shape[0]):
                x = x_ND[n]
                for v in range(UNITS):
                    z = bias1[v]
                    for d in range(D):
                        z += x[d] * table1[d, v]
                    a_C[v] = max(z, np.float32(0))
                for d in range(D):
                    total = np.float32(0)
                    for v in range(UNITS):
                        total += a_C[v] * table2[d, v]
                    y_ND[n, d] += total

    return feed_forward


@njit(inline="always")
def _keep(z_C, first, logits_K, ids_K):
    """Put what is above the last of the best so far in its place among them; of equals, the first stays before."""
    last = len(logits_K) - 1
    for v in range(len(z_C)):
        if z_C[v] > logits_K[last]:
            k = last
            while k > 0 and logits_K[k - 1] < z_C[v]:
                logits_K[k], ids_K[k] = logits_K[k - 1], ids_K[k - 1]
                k -= 1
            logits_K[k], ids_K[k] = z_C[v], first + v


@functools.cache
def _best_kernel(width: int) -> Any:
    D = width

    @njit(fastmath=True, nogil=True)
    def best(hidden_ND, table_BDC, bias_BC, z_C, lanes, shift_N, enough_N, sum_N, logits_NK, ids_NK):
        last = logits_NK.shape[1] - 1
        for b in range(bias_BC.shape[0]):
            table, bias = table_BDC[b], bias_BC[b]
            for n in range(hidden_ND.shape[0]):
                h, shift, total = hidden_ND[n], shift_N[n], np.float32(0)
                for v in range(BLOCK):
                    logit = bias[v]
                    for d in range(D):
                        logit += h[d] * table[d, v]
                    z_C[v] = logit
                for v in range(BLOCK):
                    total += exp(min(z_C[v] - shift, HIGHEST))
                if total > TOO_LARGE:  # also the first block: its shift is NOTHING
                    most = largest(z_C, lanes)
                    sum_N[n] *= np.exp(np.float64(shift) - np.float64(most))
                    shift_N[n], shift, total = most, most, np.float32(0)
                    enough_N[n] = 0  # it was relative to the old one
                    for v in range(BLOCK):
                        total += exp(z_C[v] - shift)
                sum_N[n] += total
                if total > enough_N[n] and largest(z_C, lanes) > logits_NK[n, last]:
                    _keep(z_C, b * BLOCK, logits_NK[n], ids_NK[n])
                    enough_N[n] = exp(logits_NK[n, last] - shift) * NEARLY

    return best


def supports(model: Any) -> bool:
    """Whether these kernels are made for such a `BabyBert`, and faster than PyTorch's operations."""
    sane = all(
        weight.dtype == torch.float32 and bool((weight.abs() <= LARGEST_WEIGHT).all()) for weight in model.parameters()
    )
    return sane and model.config.width <= WIDEST and model.config.vocab_size >= SMALLEST_VOCABULARY


def _in_blocks(x_VD: Tensor, block: int, filling: float = 0.0) -> np.ndarray:
    """Rows as columns, `block` of them at a time: (B, D, C)."""
    blocks = -(-len(x_VD) // block)
    whole = torch.full((blocks * block, x_VD.shape[1]), filling)
    whole[: len(x_VD)] = x_VD.detach()
    # PyTorch's memory begins at a cache line, numpy's does not.
    columns: np.ndarray = whole.view(blocks, block, -1).transpose(1, 2).contiguous().numpy()
    return columns


class FeedForward:
    """`relu(x @ W1.T + b1) @ W2.T + b2` of rows (..., D)."""

    def __init__(self, linear1: nn.Linear, linear2: nn.Linear) -> None:
        self.kernel = _feed_forward_kernel(linear1.in_features)
        self.tables = (
            _in_blocks(linear1.weight, UNITS),
            _in_blocks(linear1.bias[:, None], UNITS)[:, 0],
            _in_blocks(linear2.weight.T, UNITS),
        )
        self.bias2_D = linear2.bias.detach()
        self.a_C = torch.empty(UNITS).numpy()

    def __call__(self, x: Tensor) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1]).contiguous()
        y_ND = self.bias2_D.repeat(len(x_ND), 1)
        self.kernel(x_ND.numpy(), *self.tables, self.a_C, y_ND.numpy())
        return y_ND.view(x.shape)


class BestWords:
    """The likeliest words at some positions, which are shared out to threads where there are several of them."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor, threads: int = 1) -> None:
        self.kernel = _best_kernel(weight_VD.shape[1])
        self.table_BDC, self.bias_BC = (
            _in_blocks(weight_VD, BLOCK),
            _in_blocks(bias_V[:, None], BLOCK, float(NOTHING))[:, 0],
        )
        self.vocabulary, self.threads = len(bias_V), threads
        # Not OpenMP's, which go on spinning for a while: the cores are the server's, too.
        self.pool = ThreadPoolExecutor(max(1, threads - 1))

    def __call__(self, hidden_ND: Tensor, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log of the sum of all e^logit (N, fp64), and logits and ids (N, K) of the k largest, best first; K is at most V."""
        rows = len(hidden_ND)
        hidden, shift_N, enough_N, sum_N = (
            hidden_ND.contiguous().numpy(),
            np.full(rows, NOTHING),
            np.zeros(rows, np.float32),
            np.zeros(rows),
        )
        logits_NK, ids_NK = (
            np.full((rows, min(k, self.vocabulary)), NOTHING),
            np.zeros((rows, min(k, self.vocabulary)), np.int64),
        )

        def run(first: int, end: int) -> None:
            own = (x[first:end] for x in (shift_N, enough_N, sum_N, logits_NK, ids_NK))
            self.kernel(
                hidden[first:end],
                self.table_BDC,
                self.bias_BC,
                torch.empty(BLOCK).numpy(),
                torch.empty(LANES).numpy(),
                *own,
            )

        parts = max(1, min(self.threads, rows // ROWS_A_THREAD))
        bounds = [rows * part // parts for part in range(parts + 1)]
        others = [self.pool.submit(run, *bounds[part : part + 2]) for part in range(1, parts)]
        run(*bounds[:2])
        for other in others:
            other.result()
        return shift_N + np.log(sum_N), logits_NK, ids_NK
