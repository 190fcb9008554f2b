"""The one place that knows how vocabulary logits and their cross entropy are computed, without holding N x V of them.

`mlm_head_loss` picks: kernels for a CPU, narrow (`kernels/cpu_head.py`) or wide (`kernels/cpu_wide_head.py`), and for narrow
models on a GPU (`kernels/gpu.py`), else a form in PyTorch that takes a few rows at a time and has their gradients at once.
`plain_head_loss` is the oracle of them all: it holds the N x V logits, and their exponentials in the backward. At
V = 147,161 that is 0.6 MB a position, each.

Shapes: N masked positions, D width, V vocabulary, C rows of a chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from babybert.model.kernels import as_autocast, cpu_kernels, gpu_kernels

NO_TARGET = -1  # of a row that only fills a place
CHUNK = 2**24  # logits at a time: 64 MB of fp32; with fewer, the weight's gradient is gone through too often


class HeadLoss(NamedTuple):
    """Cross entropy over N positions."""

    loss_sum: Tensor  # scalar, nats
    positions: Tensor  # scalar, how many rows have a target
    rank_N: Tensor | None  # how many tokens were thought likelier than the target; None unless asked for


def mlm_head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    targets_N: Tensor,
    with_rank: bool = False,
    kernels: str = "auto",
) -> HeadLoss:
    """The loss of `plain_head_loss`, by whatever is fastest here ("auto"), or by that itself ("plain")."""
    if kernels == "plain":
        return plain_head_loss(hidden_ND, weight_VD, bias_V, targets_N, with_rank)
    positions = (targets_N != NO_TARGET).sum()
    cpu, gpu = cpu_kernels(hidden_ND.device), gpu_kernels(hidden_ND.device)
    if cpu and positions < len(targets_N):
        cpu = None
    if cpu and cpu.head.supports(hidden_ND, weight_VD):
        loss_sum, rank_N = cpu.head.CpuHeadLoss.apply(hidden_ND, weight_VD, bias_V, targets_N, with_rank)
    elif cpu and cpu.wide_head.supports(hidden_ND, weight_VD):
        loss_sum, rank_N = cpu.wide_head.CpuWideHeadLoss.apply(
            hidden_ND, weight_VD, bias_V, targets_N, torch.is_grad_enabled()
        )
    elif gpu and gpu.supports_head(hidden_ND, weight_VD):
        loss_sum, rank_N = gpu.GpuHeadLoss.apply(as_autocast(hidden_ND), weight_VD, bias_V, targets_N, with_rank)
    else:
        loss_sum, rank_N = ChunkedHeadLoss.apply(
            hidden_ND, weight_VD, bias_V, targets_N, with_rank, torch.is_grad_enabled()
        )
    return HeadLoss(loss_sum, positions, rank_N if with_rank else None)


@torch.inference_mode()
def mlm_head_token_losses(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Each position's own cross entropy (N, fp32, nats) and rank (N): what `mlm_head_loss` adds up. All have a target."""
    cpu = cpu_kernels(hidden_ND.device) if kernels == "auto" else None
    if cpu and cpu.head.supports(hidden_ND, weight_VD):
        return cpu.head.mlm_head_token_losses(hidden_ND, weight_VD, bias_V, targets_N)
    if cpu and cpu.wide_head.supports(hidden_ND, weight_VD):
        return cpu.wide_head.mlm_head_token_losses(hidden_ND, weight_VD, bias_V, targets_N)
    losses, ranks = [targets_N.new_empty(0, dtype=torch.float32)], [targets_N.new_empty(0)]
    for hidden_CD, targets_C in zip(
        *(x.split(max(1, CHUNK // len(bias_V))) for x in (hidden_ND, targets_N)), strict=True
    ):
        logits_CV = (hidden_CD @ weight_VD.T + bias_V).float()
        losses.append(logits_CV.logsumexp(1) - logits_CV.gather(1, targets_C[:, None]).squeeze(1))
        ranks.append(_ranks(logits_CV, targets_C))
    return torch.cat(losses), torch.cat(ranks)


def plain_head_loss(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, with_rank: bool = False
) -> HeadLoss:
    """Sum over positions of `-log softmax(hidden @ weight.T + bias)[target]`; 0 where N is 0, or a target is NO_TARGET.

    -log softmax(z)[t] = logsumexp(z) - z[t]. The targets' logits are computed a second time from their own rows of
    the table: a gather from the N x V logits would make autograd fill another N x V with zeros.
    """
    has_N, own_N = targets_N != NO_TARGET, targets_N.clamp(min=0)
    logits_NV = hidden_ND @ weight_VD.T + bias_V
    target_logit_N = (hidden_ND * weight_VD[own_N]).sum(-1) + bias_V[own_N]
    loss_sum = (
        (logits_NV.float().logsumexp(-1) - target_logit_N.float()) * has_N
    ).sum()  # under autocast, logits are bf16
    rank_N = _ranks(logits_NV, own_N) * has_N if with_rank else None
    return HeadLoss(loss_sum, has_N.sum(), rank_N)


def _ranks(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return (logits_NV > logits_NV.gather(1, targets_N[:, None])).sum(-1)


class ChunkedHeadLoss(torch.autograd.Function):
    """The same sum (0-dim, fp32) and ranks (or an empty tensor), a few rows at a time, on any device.

    A chunk's gradients are made while its logits are at hand, for a loss that counts once; the backward has only to
    scale them (the way of Hsu et al., Liger Kernel, 2024). That costs the weight's gradient in memory, and nothing is
    computed twice.
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
        rows = max(1, CHUNK // len(bias_V))
        loss_sum, ranks = torch.zeros((), device=hidden_ND.device), []
        gradients = [torch.zeros_like(x) for x in (hidden_ND, weight_VD, bias_V)] if with_gradients else []
        for first in range(0, len(targets_N), rows):
            hidden_CD, targets_C = hidden_ND[first : first + rows], targets_N[first : first + rows]
            has_C, own_C = targets_C != NO_TARGET, targets_C.clamp(min=0)
            logits_CV = (hidden_CD @ weight_VD.T + bias_V).float()
            own_logit_C1, log_sum_C1 = logits_CV.gather(1, own_C[:, None]), logits_CV.logsumexp(1, keepdim=True)
            loss_sum += ((log_sum_C1 - own_logit_C1).squeeze(1) * has_C).sum()
            if with_rank:
                ranks.append(_ranks(logits_CV, own_C) * has_C)
            if with_gradients:
                d_logits_CV = logits_CV.sub_(log_sum_C1).exp_().mul_(has_C[:, None])
                d_logits_CV.scatter_add_(1, own_C[:, None], -has_C[:, None].float())
                gradients[0][first : first + rows] = d_logits_CV @ weight_VD
                gradients[1].addmm_(d_logits_CV.T.to(weight_VD.dtype), hidden_CD.to(weight_VD.dtype))
                gradients[2] += d_logits_CV.sum(0)
        context.gradients = gradients
        rank_N = torch.cat(ranks) if ranks else targets_N.new_empty(0)
        context.mark_non_differentiable(rank_N)
        return loss_sum, rank_N

    @staticmethod
    def backward(context: Any, d_loss: Tensor, d_rank: Tensor) -> tuple[Tensor | None, ...]:
        assert context.gradients, "scaled in place: only one backward can be had"
        d_hidden_ND, d_weight_VD, d_bias_V = (gradient.mul_(d_loss) for gradient in context.gradients)
        context.gradients = None
        return d_hidden_ND, d_weight_VD, d_bias_V, None, None, None
