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

from torch import Tensor, nn

from babybert.data.tokenizer import PAD
from babybert.model.bert import BabyBert
from babybert.model.kernels import gpu_kernels
from babybert.model.mlm_head import NO_TARGET, HeadLoss, mlm_head_loss

IGNORED = 0  # the MLM label of a position that was not chosen


def mlm_loss(model: BabyBert, hidden_BTD: Tensor, labels_BT: Tensor, with_rank: bool = False) -> HeadLoss:
    """Sum of the MLM cross entropies over the chosen positions, and how many they are."""
    decoder, chosen_N = model.mlm_decoder, labels_BT.flatten() != IGNORED
    gpu = gpu_kernels(labels_BT.device) if model.kernels == "auto" and not with_rank else None
    # On a GPU, the host would have to wait for how many were chosen; the kernel passes over rows without a target.
    waits = not (gpu and gpu.supports_head(hidden_BTD, decoder.weight))
    index_N = chosen_N.nonzero().squeeze(1) if waits else chosen_N.int().argsort(descending=True, stable=True)
    labels_N = labels_BT.flatten()[index_N]
    targets_N = labels_N.masked_fill(labels_N == IGNORED, NO_TARGET)
    transformed_ND = model.mlm_transform(hidden_BTD.flatten(0, 1)[index_N])
    return mlm_head_loss(transformed_ND, decoder.weight, decoder.bias, targets_N, with_rank, model.kernels)


def nsp_loss(logits_B2: Tensor, is_next_B: Tensor) -> Tensor:
    """Sum over pairs of `-log softmax(logits)[is_next]`, both classes alike; a pair with -1 has no part in it."""
    logits_B2 = logits_B2.float()  # under autocast they are bf16
    own_B = logits_B2.gather(1, is_next_B[:, None].long().clamp(min=0)).squeeze(1)
    return ((logits_B2.logsumexp(-1) - own_B) * (is_next_B >= 0)).sum()


@dataclass(frozen=True)
class LossSums:
    """Sums over pairs and chosen positions: what replicas, batches and epochs add up, and means are made of."""

    mlm_sum: Tensor
    mlm_count: Tensor
    nsp_sum: Tensor
    nsp_correct: Tensor
    nsp_count: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, sums: dict[str, Tensor]) -> "LossSums":
        """Add up what `PretrainingModel` returned, over the replicas if there were several."""
        return cls(**{name: value.sum() for name, value in sums.items()})

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> "LossSums":
        """Each number changed."""
        return LossSums(**{name: change(value) for name, value in vars(self).items()})

    def detach(self) -> "LossSums":
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

    def __init__(self, bert: BabyBert) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids_BT: Tensor, labels_BT: Tensor, segments_BT: Tensor, is_next_B: Tensor) -> dict[str, Tensor]:
        """The fields of `LossSums` as tensors of shape (1,)."""
        hidden_BTD = self.bert(ids_BT, segments_BT)
        mlm = mlm_loss(self.bert, hidden_BTD, labels_BT)
        nsp_logits_B2 = self.bert.nsp_logits(hidden_BTD)
        correct = (nsp_logits_B2.argmax(-1) == is_next_B).sum()
        return {
            "mlm_sum": mlm.loss_sum.reshape(1),
            "mlm_count": mlm.positions.reshape(1),
            "nsp_sum": nsp_loss(nsp_logits_B2, is_next_B).reshape(1),
            "nsp_correct": correct.reshape(1),
            "nsp_count": (is_next_B >= 0).sum().reshape(1),
            "tokens": (ids_BT != PAD).sum().reshape(1),
        }
