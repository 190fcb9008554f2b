"""BERT's two objectives, written out, and the module that turns a batch into their sums.

MLM: the cross entropy of the original token at each chosen position; positions that were not chosen (label 0) take no
part and never reach the vocabulary. NSP: the cross entropy of is_next from the `[CLS]` state; 0 ("B is from
elsewhere") is a class like 1, not something to ignore. The objective is the sum of the two means.

`PretrainingModel.forward` returns sums and counts of shape (1,), not logits: `DataParallel` then gathers a few numbers
instead of a B x T x V tensor, and the mean is over the whole batch, not a mean of the replicas' means.

Shapes: B pairs, T positions, D width, V vocabulary, N chosen positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from babybert.data.tokenizer import PAD
from babybert.model.bert import BabyBert
from babybert.model.mlm_head import HeadLoss, mlm_head_loss

IGNORED = 0  # the MLM label of a position that was not chosen


def mlm_loss(model: BabyBert, hidden_BTD: Tensor, labels_BT: Tensor, with_rank: bool = False, head: str = "auto") -> HeadLoss:
    """Sum of the MLM cross entropies over the chosen positions, and how many they are."""
    chosen_BT = labels_BT != IGNORED
    transformed_ND = model.mlm_transform(hidden_BTD[chosen_BT])
    return mlm_head_loss(transformed_ND, model.mlm_decoder.weight, model.mlm_decoder.bias, labels_BT[chosen_BT], with_rank, head)


def nsp_loss(logits_B2: Tensor, is_next_B: Tensor) -> Tensor:
    """Sum over pairs of `-log softmax(logits)[is_next]`, both classes alike; a pair with -1 has no part in it."""
    logits_B2 = logits_B2.float()  # under autocast they are bf16
    own_B = logits_B2.gather(1, is_next_B[:, None].long().clamp(min=0)).squeeze(1)
    return ((logits_B2.logsumexp(-1) - own_B) * (is_next_B >= 0)).sum()


@dataclass(frozen=True)
class Totals:
    """Sums over pairs and chosen positions: what replicas, batches and epochs add up, and means are made of."""

    mlm_sum: Tensor
    mlm_count: Tensor
    nsp_sum: Tensor
    nsp_correct: Tensor
    nsp_count: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, sums: dict[str, Tensor]) -> "Totals":
        """Add up what `PretrainingModel` returned, over the replicas if there were several."""
        return cls(**{name: value.sum() for name, value in sums.items()})

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> "Totals":
        """Each number changed."""
        return Totals(**{name: change(value) for name, value in vars(self).items()})

    def detach(self) -> "Totals":
        """The same numbers without their graph."""
        return self.map(Tensor.detach)

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
        """The objective."""
        return self.mlm_loss + self.nsp_loss

    @property
    def nsp_accuracy(self) -> Tensor:
        """Share of the pairs whose label is the likelier one."""
        return self.nsp_correct / self.nsp_count.clamp(min=1)


class PretrainingModel(nn.Module):
    """A BabyBert with its losses inside, so that it can be wrapped for several devices."""

    def __init__(self, bert: BabyBert, head: str = "auto") -> None:
        super().__init__()
        self.bert, self.head = bert, head

    def forward(self, ids_BT: Tensor, labels_BT: Tensor, segments_BT: Tensor, is_next_B: Tensor) -> dict[str, Tensor]:
        """The fields of `Totals` as tensors of shape (1,)."""
        hidden_BTD = self.bert(ids_BT, segments_BT)
        mlm = mlm_loss(self.bert, hidden_BTD, labels_BT, head=self.head)
        nsp_logits_B2 = self.bert.nsp_logits(hidden_BTD)
        correct = (nsp_logits_B2.argmax(-1) == is_next_B).sum()
        return {
            "mlm_sum": mlm.loss_sum.reshape(1),
            "mlm_count": torch.full_like(correct.reshape(1), mlm.positions),
            "nsp_sum": nsp_loss(nsp_logits_B2, is_next_B).reshape(1),
            "nsp_correct": correct.reshape(1),
            "nsp_count": (is_next_B >= 0).sum().reshape(1),
            "tokens": (ids_BT != PAD).sum().reshape(1),
        }
