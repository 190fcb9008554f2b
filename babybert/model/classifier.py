"""A pretrained encoder with a classification head, and the module that turns a batch into its loss.

The head reads the hidden state at `[CLS]`, as BERT's does (Devlin et al., 2019): a dense layer with an activation, the
pooler, then dropout and one logit for each class. The heads of pretraining are not part of the network: fine-tuning
moves the hidden states that they read, so their answers would get worse without notice.

Shapes: B texts, T positions, D width, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from babybert.config import ClassifierConfig, ModelConfig
from babybert.data.tokenizer import PAD
from babybert.model import ops
from babybert.model.bert import NORMAL_STD, BertEncoder
from babybert.model.layer import Dropout
from babybert.model.loss import ObjectiveSums


class TextClassifier(BertEncoder):
    """Token ids to hidden states, and the hidden state at `[CLS]` to the logits of the classes."""

    def __init__(self, config: ModelConfig, classifier: ClassifierConfig) -> None:
        self.classifier = classifier
        super().__init__(config)

    def _add_heads(self) -> None:
        width, classes = self.config.width, len(self.classifier.classes)
        dropout = Dropout(self.config.dropout)
        self.class_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), dropout, nn.Linear(width, classes))

    def _initialize(self) -> None:
        super()._initialize()
        last = self.class_head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=NORMAL_STD)  # all classes start nearly equally likely
        nn.init.zeros_(last.bias)

    def load_encoder(self, source: BertEncoder) -> None:
        """Copy all weights except those of heads from a model of the same sizes."""
        own = {name for name in self.state_dict() if not name.startswith("class_head.")}
        encoder = {name: tensor for name, tensor in source.state_dict().items() if name in own}
        assert encoder.keys() == own, own - encoder.keys()
        self.load_state_dict(encoder, strict=False)

    def class_logits(self, ids_BT: Tensor, segments_BT: Tensor, has_padding: bool = True) -> Tensor:
        """The logits (B, C) of each text. In the last layer, only `[CLS]` is computed after attention."""
        if ops.packs_tokens(ids_BT.device, self.kernels):
            first_B = torch.arange(len(ids_BT)) * ids_BT.shape[1]
            return self.class_head(self.hidden_at(ids_BT, segments_BT, first_B, has_padding))
        return self.class_head(self(ids_BT, segments_BT)[:, 0])


@dataclass(frozen=True)
class ClassSums(ObjectiveSums):
    """The sums of a classifier's training, over texts."""

    class_sum: Tensor  # cross entropies, nats, times the weights of their classes
    class_correct: Tensor  # texts whose class is the likeliest
    class_count: Tensor  # texts

    def objective(self, mlm_count: Tensor, label_count: Tensor) -> Tensor:
        """The mean over the texts; nothing is masked."""
        return self.class_sum / label_count

    def means(self, with_nsp: bool = True) -> dict[str, float | None]:
        """See `ObjectiveSums.means`."""
        count = self.class_count.clamp(min=1)
        return {
            "class_loss": (self.class_sum / count).item(),
            "class_accuracy": (self.class_correct / count).item(),
        }

    @property
    def labelled(self) -> Tensor:
        """The number of texts."""
        return self.class_count


class ClassificationModel(nn.Module):
    """A classifier with its loss inside, as `PretrainingModel` is for pretraining.

    `weight_C` weights the cross entropies by their classes; None weights them equally.
    """

    weight_C: Tensor

    def __init__(self, model: TextClassifier, weight_C: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        classes = len(model.classifier.classes)
        self.register_buffer("weight_C", torch.ones(classes) if weight_C is None else weight_C.float())

    def forward(self, ids_BT: Tensor, labels_BT: Tensor, segments_BT: Tensor, class_B: Tensor) -> dict[str, Tensor]:
        """The fields of `ClassSums` as tensors of shape (1,). `class_B` is -1 for a text without a loss."""
        logits_BC = self.model.class_logits(ids_BT, segments_BT).float()  # under autocast they are bf16
        index_B = class_B.clamp(min=0)
        is_counted_B = class_B >= 0
        loss_B = logits_BC.logsumexp(-1) - logits_BC.gather(1, index_B[:, None]).squeeze(1)
        correct = ((logits_BC.argmax(-1) == class_B) & is_counted_B).sum()
        return {
            "class_sum": (loss_B * self.weight_C[index_B] * is_counted_B).sum().reshape(1),
            "class_correct": correct.reshape(1),
            "class_count": is_counted_B.sum().reshape(1),
            "tokens": (ids_BT != PAD).sum().reshape(1),
        }
