"""The vocabulary head in PyTorch's operations, a few rows at a time, on any device.

It never holds N x V logits. A chunk's gradients are computed in the forward, while its logits are in memory, for an
output gradient of 1; the backward only scales them (Liger Kernel: Hsu et al., 2024). That costs the weight's gradient
in memory from the forward on, and no logit is computed twice.

Shapes: N masked positions, D width, V vocabulary, C rows of a chunk.
"""

from typing import Any

import torch
from torch import Tensor

from babybert.model import plain_ops
from babybert.model.plain_ops import NO_TARGET, target_ranks


class ChunkedHeadLoss(torch.autograd.Function):
    """Sum of the cross entropies (0-dim, fp32), and the targets' ranks (or an empty tensor).

    Rows whose target is NO_TARGET have loss 0, rank 0 and no gradient.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        targets_N: Tensor,
        with_rank: bool,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = max(1, plain_ops.CHUNK // len(bias_V))
        loss_sum, ranks = torch.zeros((), device=hidden_ND.device), []
        gradients = [torch.zeros_like(x) for x in (hidden_ND, weight_VD, bias_V)] if with_gradients else []
        for first in range(0, len(targets_N), rows):
            hidden_CD, targets_C = hidden_ND[first : first + rows], targets_N[first : first + rows]
            has_target_C, index_C = targets_C != NO_TARGET, targets_C.clamp(min=0)
            logits_CV = (hidden_CD @ weight_VD.T + bias_V).float()
            target_logit_C1 = logits_CV.gather(1, index_C[:, None])
            log_sum_C1 = logits_CV.logsumexp(1, keepdim=True)
            loss_sum += ((log_sum_C1 - target_logit_C1).squeeze(1) * has_target_C).sum()
            if with_rank:
                ranks.append(target_ranks(logits_CV, index_C) * has_target_C)
            if with_gradients:
                # The loss's gradient by the logits is softmax - one_hot(target), made in place of the logits.
                d_logits_CV = logits_CV.sub_(log_sum_C1).exp_().mul_(has_target_C[:, None])
                d_logits_CV.scatter_add_(1, index_C[:, None], -has_target_C[:, None].float())
                gradients[0][first : first + rows] = d_logits_CV @ weight_VD
                gradients[1].addmm_(d_logits_CV.T.to(weight_VD.dtype), hidden_CD.to(weight_VD.dtype))
                gradients[2] += d_logits_CV.sum(0)
        context.gradients = gradients
        rank_N = torch.cat(ranks) if ranks else targets_N.new_empty(0)
        context.mark_non_differentiable(rank_N)
        return loss_sum, rank_N

    @staticmethod
    def backward(context: Any, d_loss: Tensor, d_rank: Tensor) -> tuple[Tensor | None, ...]:
        assert context.gradients, "the gradients are scaled in place, so there can be only one backward"
        d_hidden_ND, d_weight_VD, d_bias_V = (gradient.mul_(d_loss) for gradient in context.gradients)
        context.gradients = None
        return d_hidden_ND, d_weight_VD, d_bias_V, None, None, None
