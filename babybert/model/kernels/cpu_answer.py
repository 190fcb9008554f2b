"""A narrow model's answers on a CPU: numba kernels for one thread, which read each table once and write no logits.

A server asks for the likeliest words at some positions and their probabilities, not for a loss. `BestWords` passes over
the vocabulary in blocks: the logits of a block and a position stay in the first cache, where their exponentials are added
up and the best words so far are kept, so that nothing of N x V is ever written. `FeedForward` is that of training
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

from babybert.model.kernels.cpu_math import LOG2_E, SMALLEST

BLOCK = 512  # words at a time: 20 KB of a table of width 10, which fit a core's first cache
UNITS = 256  # hidden units at a time, of which there are two tables
LANES = 64  # running sums and maxima side by side, four vectors of AVX-512
ROWS_A_THREAD = 8  # positions that are worth a thread's start
WIDEST, WIDEST_FEED_FORWARD = 32, 16  # beyond them the matrix products of the plain form win
SMALLEST_VOCABULARY = 4096  # with fewer words the plain form takes no time either
LARGEST_WEIGHT = 1e4  # products of such numbers stay far below the largest of fp32, at any width up to WIDEST
NOTHING = np.float32(-1e30)  # the bias of a word that is not there
# All of fastmath but `reassoc`, under which adding a number and taking it away again would be left out.
ORDERED = {"contract", "nnan", "ninf", "nsz", "arcp"}
TO_WHOLE = np.float32(1.5 * 2**23)  # what is added to it is rounded to a whole number, in the lowest bits
E0, E1, E2, E3, E4, E5 = np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, 5, [-0.5, 0.5]).convert(kind=np.polynomial.Polynomial).coef.astype(np.float32)


@njit(inline="always", fastmath=ORDERED)
def _exp_ordered(x):  # type: ignore[no-untyped-def]
    """e^x for x <= 0 with a relative error below 3e-7; as `exp`, without the slow turning of numbers into whole ones."""
    y = max(x * LOG2_E, SMALLEST)
    whole = y + TO_WHOLE
    f = y - (whole - TO_WHOLE)
    power = E0 + f * (E1 + f * (E2 + f * (E3 + f * (E4 + f * E5))))
    return np.int32(np.float32(power).view(np.int32) + np.int32(np.float32(whole).view(np.int32) << np.int32(23))).view(np.float32)


@functools.cache
def _feed_forward_kernel(width: int) -> Any:
    D = width

    @njit(fastmath=True)
    def feed_forward(x_ND, table1_BDC, bias1_BC, table2_BDC, a_C, y_ND):  # type: ignore[no-untyped-def]
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
def _keep(z_C, first, logits_K, ids_K):  # type: ignore[no-untyped-def]
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

    @njit(fastmath=ORDERED, nogil=True)
    def best(hidden_ND, table_BDC, bias_BC, z_C, lanes, top_N, sum_N, logits_NK, ids_NK):  # type: ignore[no-untyped-def]
        last = logits_NK.shape[1] - 1
        for b in range(bias_BC.shape[0]):
            table, bias = table_BDC[b], bias_BC[b]
            for n in range(hidden_ND.shape[0]):
                h = hidden_ND[n]
                for v in range(LANES):
                    lanes[v] = NOTHING
                for first in range(0, BLOCK, LANES):
                    for v in range(LANES):
                        logit = bias[first + v]
                        for d in range(D):
                            logit += h[d] * table[d, first + v]
                        z_C[first + v] = logit
                        lanes[v] = max(lanes[v], logit)
                half = LANES
                while half > 8:
                    half //= 2
                    for v in range(half):
                        lanes[v] = max(lanes[v], lanes[v + half])
                most = lanes[0]
                for v in range(1, 8):
                    most = max(most, lanes[v])
                if most > top_N[n]:
                    sum_N[n] *= np.exp(np.float64(top_N[n]) - np.float64(most))
                    top_N[n] = most
                top, total = top_N[n], np.float32(0)
                for v in range(LANES):
                    lanes[v] = 0
                for first in range(0, BLOCK, LANES):
                    for v in range(LANES):
                        lanes[v] += _exp_ordered(z_C[first + v] - top)
                half = LANES
                while half > 8:
                    half //= 2
                    for v in range(half):
                        lanes[v] += lanes[v + half]
                for v in range(8):
                    total += lanes[v]
                sum_N[n] += total
                if most > logits_NK[n, last]:
                    _keep(z_C, b * BLOCK, logits_NK[n], ids_NK[n])

    return best


def takes(model: Any) -> bool:
    """Whether these kernels are made for such a `BabyBert`, and faster than PyTorch's operations."""
    sane = all(weight.dtype == torch.float32 and bool((weight.abs() <= LARGEST_WEIGHT).all()) for weight in model.parameters())
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
        self.tables = (_in_blocks(linear1.weight, UNITS), _in_blocks(linear1.bias[:, None], UNITS)[:, 0], _in_blocks(linear2.weight.T, UNITS))
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
        self.table_BDC, self.bias_BC = _in_blocks(weight_VD, BLOCK), _in_blocks(bias_V[:, None], BLOCK, float(NOTHING))[:, 0]
        self.vocabulary, self.threads = len(bias_V), threads
        # Not OpenMP's, which go on spinning for a while: the cores are the server's, too.
        self.pool = ThreadPoolExecutor(max(1, threads - 1))

    def __call__(self, hidden_ND: Tensor, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log of the sum of all e^logit (N, fp64), and logits and ids (N, K) of the k largest, best first; K is at most V."""
        rows = len(hidden_ND)
        hidden, top_N, sum_N = hidden_ND.contiguous().numpy(), np.full(rows, NOTHING, np.float32), np.zeros(rows)
        logits_NK, ids_NK = np.full((rows, min(k, self.vocabulary)), NOTHING, np.float32), np.zeros((rows, min(k, self.vocabulary)), np.int64)

        def run(first: int, end: int) -> None:
            scratch = torch.empty(BLOCK).numpy(), torch.empty(LANES).numpy()
            own = (x[first:end] for x in (top_N, sum_N, logits_NK, ids_NK))
            self.kernel(hidden[first:end], self.table_BDC, self.bias_BC, *scratch, *own)

        parts = max(1, min(self.threads, rows // ROWS_A_THREAD))
        bounds = [rows * part // parts for part in range(parts + 1)]
        others = [self.pool.submit(run, *bounds[part : part + 2]) for part in range(1, parts)]
        run(*bounds[:2])
        for other in others:
            other.result()
        return top_N + np.log(sum_N), logits_NK, ids_NK
