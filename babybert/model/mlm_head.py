"""The one place that knows how vocabulary logits and their cross entropy are computed.

`mlm_head_loss` is the plain form, and the oracle for any faster one behind the same signature. It holds the N x V
logits once, and their exponentials in the backward: at V = 147,161 that is 0.6 MB a masked position, each.

Shapes: N masked positions, D width, V vocabulary.
"""

from typing import NamedTuple

from torch import Tensor


class HeadLoss(NamedTuple):
    """Cross entropy over N positions."""

    loss_sum: Tensor  # scalar, nats
    positions: int
    rank_N: Tensor | None  # how many tokens were thought likelier than the target; None unless asked for


def mlm_head_loss(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, with_rank: bool = False) -> HeadLoss:
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
