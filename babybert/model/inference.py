"""What a trained model says at masks: the likeliest words, and their probabilities.

Two ways to the same numbers. In PyTorch's own operations: a few positions' logits at a time, their softmax, and a search by
blocks. Compiled (`kernels/cpu_top_tokens.py`), for narrow models on a CPU: two to three times as fast, after seconds of
compiling, which a server can wait for and a command that answers once should not.

Shapes: B rows, T positions, M positions asked for, N masks, V vocabulary, D width, K candidates, X targets, C columns of a block.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from babybert.model.bert import BabyBert
from babybert.model.kernels import answer_kernels

SLICE_MASKS = 8  # 5 MB of the baby's logits, and as much of their softmax: they stay in the cache
BLOCK = 256  # columns of the vocabulary whose largest is looked at first; about the root of V


class Words(NamedTuple):
    """What was found at N masks, as lists."""

    scores_NK: list[list[float]]
    ids_NK: list[list[int]]
    target_scores_X: list[float]


class Answers:
    """A model that is only asked; `compiled` to spend seconds at the first answer and be faster from then on, where that can be had."""

    def __init__(self, model: BabyBert, compiled: bool = False, threads: int = 1) -> None:
        self.model = model.eval().set_kernels("plain")
        decoder = model.mlm_decoder
        kernels = answer_kernels() if compiled else None
        self.best_words: Any = None
        if kernels and kernels.supports(model):
            self.best_words = kernels.BestWords(decoder.weight, decoder.bias, threads)
            for layer in model.encoder.layers if model.config.width <= kernels.WIDEST_FEED_FORWARD else ():
                layer.compiled_feed_forward = kernels.FeedForward(layer.linear1, layer.linear2)

    def words(self, hidden_ND: Tensor, k: int, row_X: list[int], ids_X: list[int]) -> Words:
        """The k likeliest words at each of N masks, and the probabilities of words `ids_X` at masks `row_X`."""
        hidden_ND = self.model.mlm_transform(hidden_ND)
        return (
            self._by_softmax(hidden_ND, k, row_X, ids_X)
            if self.best_words is None
            else self._by_kernel(hidden_ND, k, row_X, ids_X)
        )

    def _by_kernel(self, hidden_ND: Tensor, k: int, row_X: list[int], ids_X: list[int]) -> Words:
        log_sum_N, logits_NK, ids_NK = self.best_words(hidden_ND, max(k, 1))
        scores_NK = np.exp(logits_NK - log_sum_N[:, None])
        score_X = []
        if row_X:
            decoder = self.model.mlm_decoder
            logit_X = (hidden_ND[row_X] * decoder.weight[ids_X]).sum(-1) + decoder.bias[ids_X]
            score_X = np.exp(logit_X.double().numpy() - log_sum_N[row_X]).tolist()
        return Words(scores_NK.tolist(), ids_NK.tolist(), score_X)

    def _by_softmax(self, hidden_ND: Tensor, k: int, row_X: list[int], ids_X: list[int]) -> Words:
        found = Words([], [], [])
        for start in range(0, len(hidden_ND), SLICE_MASKS):
            probability_NV = self.model.mlm_decoder(hidden_ND[start : start + SLICE_MASKS]).softmax(-1)
            scores_NK, ids_NK = top(probability_NV, max(k, 1))
            found.scores_NK.extend(scores_NK.tolist())
            found.ids_NK.extend(ids_NK.tolist())
            own = [x for x, row in enumerate(row_X) if start <= row < start + SLICE_MASKS]
            found.target_scores_X.extend(
                probability_NV[[row_X[x] - start for x in own], [ids_X[x] for x in own]].tolist() if own else ()
            )
        return found


def top(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`x_NV.topk(k)` (fewer where V is smaller): values and columns (N, K), the largest first.

    The k largest of a row are in the k blocks whose own largest are largest, so that only those are looked through:
    one pass for the blocks' largest in place of topk's selection over V. Columns after the last whole block join it.
    """
    size_v = x_NV.shape[1]
    blocks = size_v // BLOCK
    if k >= blocks:
        return x_NV.topk(min(k, size_v))
    whole_NMC = x_NV[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    block_NK = whole_NMC.amax(-1).topk(k).indices
    inside_NKC = whole_NMC.gather(1, block_NK[:, :, None].expand(-1, -1, BLOCK))
    columns_NKC = block_NK[:, :, None] * BLOCK + torch.arange(BLOCK)
    rest_N = torch.arange(blocks * BLOCK, size_v).expand(len(x_NV), -1)
    found = torch.cat([inside_NKC.flatten(1), x_NV[:, blocks * BLOCK :]], 1).topk(k)
    return found.values, torch.cat([columns_NKC.flatten(1), rest_N], 1).gather(1, found.indices)
