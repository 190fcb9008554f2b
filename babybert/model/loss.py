"""BERT's two objectives, written out, and the module that turns a batch into their sums.

MLM (masked language modelling): the cross entropy of the original token at each chosen position. Positions that were
not chosen (label 0) have no loss, and no logits are computed for them. NSP (next sentence prediction): the cross
entropy of is_next from the `[CLS]` state. Label 0 ("B is from elsewhere") is a class like 1, not a value to ignore. The
objective is the sum of the two means (Devlin et al., 2019).

`PretrainingModel.forward` returns sums and counts of shape (1,), not logits. `DataParallel` then gathers a few scalars
instead of a B x T x V tensor, and the mean is over the whole batch, not a mean of the replicas' means.

Shapes: B pairs, T positions, D width, V vocabulary, N chosen positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from babybert.data.tokenizer import PAD
from babybert.model import ops
from babybert.model.bert import BabyBert
from babybert.model.plain_ops import NO_TARGET, HeadLoss

IGNORED = 0  # the MLM label of a position that was not chosen


def mlm_loss(model: BabyBert, hidden_BTD: Tensor, labels_BT: Tensor, with_rank: bool = False) -> HeadLoss:
    """Sum of the MLM cross entropies over the chosen positions, and their number.

    `with_rank` also counts, for each of them, the tokens with a higher logit than the target.
    """
    decoder = model.mlm_decoder
    chosen = labels_BT.flatten() != IGNORED
    if not with_rank and ops.skips_rows_without_target(hidden_BTD, decoder.weight, model.kernels):
        # On a GPU, `nonzero` waits for the number of chosen positions. This keeps all positions, the chosen ones first.
        index_N = chosen.int().argsort(descending=True, stable=True)
    else:
        index_N = chosen.nonzero().squeeze(1)
    labels_N = labels_BT.flatten()[index_N]
    targets_N = labels_N.masked_fill(labels_N == IGNORED, NO_TARGET)
    return _mlm_loss_of(model, hidden_BTD.flatten(0, 1)[index_N], targets_N, with_rank)


def _mlm_loss_of(model: BabyBert, hidden_ND: Tensor, targets_N: Tensor, with_rank: bool = False) -> HeadLoss:
    """Sum of the MLM cross entropies of hidden states at N positions, and the number of targets."""
    decoder, weights = model.mlm_decoder, model.bf16_weights
    inputs = model.mlm_transform(hidden_ND), decoder.weight, decoder.bias, targets_N
    return ops.mlm_head_loss(*inputs, with_rank, model.kernels, weights)


def _masked_positions(ids_BT: Tensor, labels_BT: Tensor, model: BabyBert) -> tuple[Tensor, Tensor]:
    """The chosen positions (N) of the flattened batch, and their labels.

    Other tokens, without a target, may follow them, so that N is a number of rows that the head prefers.
    """
    is_chosen_BT = labels_BT != IGNORED
    is_other_BT = (ids_BT != PAD) & ~is_chosen_BT
    is_other_BT[:, 0] = False  # `[CLS]`, which is asked for in any case
    chosen_N, other_N = (flags_BT.flatten().nonzero().squeeze(1) for flags_BT in (is_chosen_BT, is_other_BT))
    rows = ops.preferred_rows(len(chosen_N), model.mlm_decoder.weight, model.kernels)
    index_N = torch.cat([chosen_N, other_N[: rows - len(chosen_N)]])
    labels_N = labels_BT.flatten()[index_N]
    return index_N, labels_N.masked_fill(labels_N == IGNORED, NO_TARGET)


def nsp_loss(logits_B2: Tensor, is_next_B: Tensor) -> Tensor:
    """Sum over pairs of `-log softmax(logits)[is_next]`. A pair whose label is -1 is left out."""
    logits_B2 = logits_B2.float()  # under autocast they are bf16
    index_B1 = is_next_B[:, None].long().clamp(min=0)
    target_logit_B = logits_B2.gather(1, index_B1).squeeze(1)
    return ((logits_B2.logsumexp(-1) - target_logit_B) * (is_next_B >= 0)).sum()


@dataclass(frozen=True)
class ObjectiveSums:
    """Sums of a training objective, all of them scalars. Replicas, micro-batches and steps add up to means."""

    tokens: Tensor  # tokens that are not padding

    @classmethod
    def of(cls, sums: dict[str, Tensor]) -> Self:
        """Add up what the trained module returned, over the replicas if there are several."""
        return cls(**{name: value.sum() for name, value in sums.items()})

    def __add__(self, other: Self) -> Self:
        return type(self)(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """`change` applied to each sum."""
        return type(self)(**{name: change(value) for name, value in vars(self).items()})

    def detach(self) -> Self:
        """The same sums without their autograd graph."""
        return self.map(Tensor.detach)

    def objective(self, mlm_count: Tensor, label_count: Tensor) -> Tensor:
        """The mean loss, if so many positions are chosen, and so many labels are given, in the global batch."""
        raise NotImplementedError

    def means(self, with_nsp: bool = True) -> dict[str, float | None]:
        """Each mean by its name in `metrics.jsonl`; those of NSP are None unless `with_nsp`."""
        raise NotImplementedError

    @property
    def labelled(self) -> Tensor:
        """The number of pairs, or texts, with a label."""
        raise NotImplementedError


@dataclass(frozen=True)
class LossSums(ObjectiveSums):
    """The sums of pretraining, over pairs and chosen positions."""

    mlm_sum: Tensor  # cross entropies of the chosen positions, nats
    mlm_count: Tensor  # chosen positions
    nsp_sum: Tensor  # cross entropies of the pairs, nats
    nsp_correct: Tensor  # pairs whose label is the likelier class
    nsp_count: Tensor  # pairs with a label

    def objective(self, mlm_count: Tensor, label_count: Tensor) -> Tensor:
        """The sum of the two means."""
        return self.mlm_sum / mlm_count + self.nsp_sum / label_count

    def means(self, with_nsp: bool = True) -> dict[str, float | None]:
        """See `ObjectiveSums.means`."""
        return {
            "mlm_loss": self.mlm_loss.item(),
            "nsp_loss": self.nsp_loss.item() if with_nsp else None,
            "nsp_accuracy": self.nsp_accuracy.item() if with_nsp else None,
        }

    @property
    def labelled(self) -> Tensor:
        """The number of pairs with a label."""
        return self.nsp_count

    @property
    def mlm_loss(self) -> Tensor:
        """Mean over the chosen positions, nats."""
        return self.mlm_sum / self.mlm_count.clamp(min=1)

    @property
    def nsp_loss(self) -> Tensor:
        """Mean over the pairs, nats."""
        return self.nsp_sum / self.nsp_count.clamp(min=1)

    @property
    def loss(self) -> Tensor:
        """The objective: the sum of the two means."""
        return self.mlm_loss + self.nsp_loss

    @property
    def nsp_accuracy(self) -> Tensor:
        """Share of the pairs whose label is the likelier class."""
        return self.nsp_correct / self.nsp_count.clamp(min=1)


class PretrainingModel(nn.Module):
    """A BabyBert with its losses inside, so that it can be wrapped in `DataParallel` or `DistributedDataParallel`."""

    def __init__(self, bert: BabyBert) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids_BT: Tensor, labels_BT: Tensor, segments_BT: Tensor, is_next_B: Tensor) -> dict[str, Tensor]:
        """The fields of `LossSums` as tensors of shape (1,)."""
        bert = self.bert
        if ops.narrows_last_layer(ids_BT.device, bert.config.norm, bert.kernels):
            first_B = torch.arange(len(ids_BT)) * ids_BT.shape[1]
            index_N, targets_N = _masked_positions(ids_BT, labels_BT, bert)
            hidden_MD = bert.hidden_at(ids_BT, segments_BT, torch.cat([first_B, index_N]))
            mlm = _mlm_loss_of(bert, hidden_MD[len(first_B) :], targets_N)
            nsp_logits_B2 = bert.nsp_head(hidden_MD[: len(first_B)])
        else:
            hidden_BTD = bert(ids_BT, segments_BT)
            mlm = mlm_loss(bert, hidden_BTD, labels_BT)
            nsp_logits_B2 = bert.nsp_logits(hidden_BTD)
        correct = (nsp_logits_B2.argmax(-1) == is_next_B).sum()
        return {
            "mlm_sum": mlm.loss_sum.reshape(1),
            "mlm_count": mlm.positions.reshape(1),
            "nsp_sum": nsp_loss(nsp_logits_B2, is_next_B).reshape(1),
            "nsp_correct": correct.reshape(1),
            "nsp_count": (is_next_B >= 0).sum().reshape(1),
            "tokens": (ids_BT != PAD).sum().reshape(1),
        }
