"""The model's operations in PyTorch, as plainly as they can be written.

`ops` uses them where no kernel is supported, and for `--kernels plain`. The tests compare the kernels with them.

Shapes: B pairs, T positions, N packed tokens or masked positions, D width, V vocabulary, H heads, K candidates, X
targets, C rows of a chunk or columns of a block, J blocks.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babybert.model.packing import PackedBatch

NO_TARGET = -1  # marks a row without a target: it has no loss
CHUNK = 2**24  # logits at a time: 64 MB of fp32; with fewer, the weight's gradient is read and written too often
MASKS_PER_SLICE = 8  # 5 MB of the baby's logits, and as much of their softmax: they stay in the cache
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
TOPK_BLOCK = 256  # columns of a block in `blockwise_topk`: about the square root of V


class HeadLoss(NamedTuple):
    """Cross entropy over N positions."""

    loss_sum: Tensor  # scalar, nats
    positions: Tensor  # scalar, how many rows have a target
    rank_N: Tensor | None  # how many tokens have a higher logit than the target; None unless asked for


def attention(qkv_N3D: Tensor, packed: PackedBatch, heads: int, dropout_p: float) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., 2017) within each pair, to (N, D), on a padded batch with a mask.

    `qkv_N3D` holds queries, keys and values side by side. Dropout applies to the weights, after the softmax.
    """
    q, k, v = packed.unpack(qkv_N3D).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mask = None if packed.is_full else packed.to_mask()[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    return packed.pack(out.transpose(1, 2).flatten(2))


def feed_forward(
    x_ND: Tensor, linear1: nn.Linear, linear2: nn.Linear, dropout_p: float, activation: str = "relu"
) -> Tensor:
    """`dropout(activation(x @ W1.T + b1)) @ W2.T + b2` of rows (N, D); the activation is "relu" or "gelu"."""
    return linear2(F.dropout(ACTIVATIONS[activation](linear1(x_ND)), dropout_p))


def mlm_head_loss(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, with_rank: bool = False
) -> HeadLoss:
    """Sum over positions of `-log softmax(hidden @ weight.T + bias)[target]`; a target may be NO_TARGET.

    It holds all N x V logits: 0.6 MB a position at V = 147,161, and as much in the backward.

    -log softmax(z)[t] = logsumexp(z) - z[t]. The targets' logits are computed a second time from their rows of the
    table: the backward of a gather from the N x V logits would fill another N x V tensor with zeros.
    """
    has_target_N = targets_N != NO_TARGET
    index_N = targets_N.clamp(min=0)
    logits_NV = hidden_ND @ weight_VD.T + bias_V
    target_logit_N = (hidden_ND * weight_VD[index_N]).sum(-1) + bias_V[index_N]
    loss_N = logits_NV.float().logsumexp(-1) - target_logit_N.float()  # under autocast, logits are bf16
    rank_N = target_ranks(logits_NV, index_N) * has_target_N if with_rank else None
    return HeadLoss((loss_N * has_target_N).sum(), has_target_N.sum(), rank_N)


def target_ranks(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """How many tokens have a higher logit than the target (N, int64)."""
    return (logits_NV > logits_NV.gather(1, targets_N[:, None])).sum(-1)


def mlm_head_token_losses(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The cross entropy (N, fp32, nats) and rank (N, int64) of each position, a chunk of rows at a time."""
    rows = max(1, CHUNK // len(bias_V))
    losses, ranks = [targets_N.new_empty(0, dtype=torch.float32)], [targets_N.new_empty(0)]
    for hidden_CD, targets_C in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
        logits_CV = (hidden_CD @ weight_VD.T + bias_V).float()
        losses.append(logits_CV.logsumexp(1) - logits_CV.gather(1, targets_C[:, None]).squeeze(1))
        ranks.append(target_ranks(logits_CV, targets_C))
    return torch.cat(losses), torch.cat(ranks)


def top_tokens(
    hidden_ND: Tensor, decoder: nn.Linear, k: int, row_X: Sequence[int] = (), id_X: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities and ids (N, K) of the k likeliest tokens at N masks, best first, and those of some targets (X).

    Target x is token `id_X[x]` at mask `row_X[x]`. K is k, or V where that is smaller.
    """
    target_score_X = hidden_ND.new_zeros(len(row_X))
    candidates = min(k, decoder.out_features)
    scores = [hidden_ND.new_zeros(0, candidates)]
    ids = [torch.zeros(0, candidates, dtype=torch.int64, device=hidden_ND.device)]
    for start in range(0, len(hidden_ND), MASKS_PER_SLICE):
        probability_NV = decoder(hidden_ND[start : start + MASKS_PER_SLICE]).softmax(-1)
        score_NK, id_NK = blockwise_topk(probability_NV, k)
        scores.append(score_NK)
        ids.append(id_NK)
        targets = [x for x, row in enumerate(row_X) if start <= row < start + MASKS_PER_SLICE]
        if targets:
            rows, columns = [row_X[x] - start for x in targets], [id_X[x] for x in targets]
            target_score_X[targets] = probability_NV[rows, columns]
    return torch.cat(scores), torch.cat(ids), target_score_X


def blockwise_topk(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`x_NV.topk(k)` (fewer where V is smaller): values and columns (N, K), the largest first.

    The k largest numbers of a row are in the k blocks with the largest maxima, so only those K of the J blocks of C
    columns are searched: one pass for the maxima replaces topk's selection over V. Columns after the last full block
    are searched, too.
    """
    vocab = x_NV.shape[1]
    blocks = vocab // TOPK_BLOCK
    if k >= blocks:
        values, columns = x_NV.topk(min(k, vocab))
        return values, columns
    blocks_NJC = x_NV[:, : blocks * TOPK_BLOCK].unflatten(1, (blocks, TOPK_BLOCK))
    block_NK = blocks_NJC.amax(-1).topk(k).indices
    values_NKC = blocks_NJC.gather(1, block_NK[:, :, None].expand(-1, -1, TOPK_BLOCK))
    columns_NKC = block_NK[:, :, None] * TOPK_BLOCK + torch.arange(TOPK_BLOCK, device=x_NV.device)
    rest_N = torch.arange(blocks * TOPK_BLOCK, vocab, device=x_NV.device).expand(len(x_NV), -1)
    values, index = torch.cat([values_NKC.flatten(1), x_NV[:, blocks * TOPK_BLOCK :]], 1).topk(k)
    return values, torch.cat([columns_NKC.flatten(1), rest_N], 1).gather(1, index)
