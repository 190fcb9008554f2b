"""The one place that knows how vocabulary logits and their cross entropy are computed.

`mlm_head_loss` picks: kernels for narrow models on a CPU (`cpu_kernels.py`), the plain form for all others. The plain
form is also the kernels' oracle. It holds the N x V logits once, and their exponentials in the backward: at V = 147,161
that is 0.6 MB a masked position, each.

Shapes: N masked positions, D width, V vocabulary.
"""

import functools
import logging
from typing import Any, NamedTuple

from torch import Tensor


class HeadLoss(NamedTuple):
    """Cross entropy over N positions."""

    loss_sum: Tensor  # scalar, nats
    positions: int
    rank_N: Tensor | None  # how many tokens were thought likelier than the target; None unless asked for


def mlm_head_loss(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, with_rank: bool = False, head: str = "auto") -> HeadLoss:
    """The loss of `plain_head_loss`, by whatever is fastest here ("auto"), or by that itself ("plain")."""
    kernels = _cpu_kernels() if head == "auto" and hidden_ND.device.type == "cpu" else None
    if kernels is None or not kernels.takes(hidden_ND, weight_VD):
        return plain_head_loss(hidden_ND, weight_VD, bias_V, targets_N, with_rank)
    loss_sum, rank_N = kernels.CpuHeadLoss.apply(hidden_ND, weight_VD, bias_V, targets_N, with_rank)
    return HeadLoss(loss_sum, len(targets_N), rank_N if with_rank else None)


@functools.cache
def _cpu_kernels() -> Any:
    """The module, or None where numba is not to be had; says so, once."""
    try:
        from babybert.model import cpu_kernels
    except ImportError as error:
        logging.getLogger(__name__).warning("no CPU kernels (%s): the plain form is used, which is slower at small widths", error)
        return None
    return cpu_kernels


def plain_head_loss(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, with_rank: bool = False) -> HeadLoss:
    """Sum over positions of `-log softmax(hidden @ weight.T + bias)[target]`; 0 where N is 0.

    -log softmax(z)[t] = logsumexp(z) - z[t]. The targets' logits are computed a second time from their own rows of
    the table: a gather from the N x V logits would make autograd fill another N x V with zeros.
    """
    logits_NV = hidden_ND @ weight_VD.T + bias_V
    target_logit_N = (hidden_ND * weight_VD[targets_N]).sum(-1) + bias_V[targets_N]
    loss_sum = (logits_NV.float().logsumexp(-1) - target_logit_N.float()).sum()  # under autocast, logits are bf16
    rank_N = None
    if with_rank:
        own_N1 = logits_NV.gather(1, targets_N[:, None])
        rank_N = (logits_NV > own_N1).sum(-1)
    return HeadLoss(loss_sum, len(targets_N), rank_N)
