"""BabyBERT as models of Hugging Face Transformers. It is copied into each exported folder, and does not need babybert.

Inputs and outputs follow Transformers' BERT. `token_type_ids` are 0 for `[CLS] A [SEP]` and 1 for `B [SEP]`. Class 0 of
next sentence prediction is "B follows A". The weights are those of the checkpoint, where that is class 1, so the logits
are swapped here.

Shapes: B sequences, T positions, D width, V vocabulary, C classes.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    NextSentencePredictorOutput,
    SequenceClassifierOutput,
)
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput

from .configuration_babybert import BabyBertConfig

SEGMENTS = 3  # 0 padding, 1 `[CLS] A [SEP]`, 2 `B [SEP]`
INITIAL_STD = 0.02  # of the weights of new heads


class BabyBertTokenEmbedding(nn.Module):
    """Token embeddings, scaled by sqrt(D)."""

    def __init__(self, config: BabyBertConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.scale = math.sqrt(config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embedding(input_ids) * self.scale


class BabyBertEmbeddings(nn.Module):
    """The sum of token, position and segment embeddings. Positions are sines and cosines (Vaswani et al., 2017)."""

    def __init__(self, config: BabyBertConfig) -> None:
        super().__init__()
        self.token_embedding = BabyBertTokenEmbedding(config)
        self.segment_embedding = nn.Embedding(SEGMENTS, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, segments: Tensor) -> Tensor:
        token_BTD = self.token_embedding(input_ids)
        position_TD = sinusoids(input_ids.shape[1], token_BTD.shape[2]).to(token_BTD)
        return self.dropout(self.dropout(token_BTD + position_TD) + self.segment_embedding(segments))


def sinusoids(positions: int, width: int) -> Tensor:
    """The encodings of the first positions (T, D): sines and cosines take turns."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    angle = torch.arange(positions)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class BabyBertPreTrainedModel(PreTrainedModel):
    """What all models share."""

    config_class = BabyBertConfig
    base_model_prefix = "babybert"

    def _init_weights(self, module: nn.Module) -> None:
        """Initial weights of what is not in the checkpoint: a new classification head."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INITIAL_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class BabyBertModel(BabyBertPreTrainedModel):
    """The encoder: token ids to hidden states."""

    def __init__(self, config: BabyBertConfig) -> None:
        super().__init__(config)
        self.embedding = BabyBertEmbeddings(config)
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_dropout_prob,
            config.hidden_act,
            batch_first=True,
            norm_first=config.norm == "pre",
        )
        self.encoder = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=False)
        self.encoder_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.token_embedding.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.token_embedding.embedding = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Hidden states (B, T, D), and that of `[CLS]` (B, D), which is not transformed."""
        is_padding_BT = input_ids == self.config.pad_token_id if attention_mask is None else attention_mask == 0
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        segments_BT = (token_type_ids + 1).masked_fill(is_padding_BT, 0)
        x_BTD = self.encoder(self.embedding(input_ids, segments_BT), src_key_padding_mask=is_padding_BT)
        hidden_BTD = self.dropout(self.encoder_norm(x_BTD))
        output = BaseModelOutputWithPooling(last_hidden_state=hidden_BTD, pooler_output=hidden_BTD[:, 0])
        return output if return_dict is not False else output.to_tuple()


def nsp_head(config: BabyBertConfig) -> nn.Sequential:
    """From the hidden state of `[CLS]` to two logits, of which class 1 is "B follows A"."""
    return _classification_head(config, 2)


def _classification_head(config: BabyBertConfig, classes: int) -> nn.Sequential:
    width = config.hidden_size
    dropout = nn.Dropout(config.hidden_dropout_prob)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), dropout, nn.Linear(width, classes))


def mlm_transform(config: BabyBertConfig) -> nn.Sequential:
    """What comes before the MLM decoder."""
    width = config.hidden_size
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))


class BabyBertWithDecoder(BabyBertPreTrainedModel):
    """An encoder with the head of masked language modelling."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "mlm_decoder.weight": "babybert.embedding.token_embedding.embedding.weight"
    }

    def __init__(self, config: BabyBertConfig) -> None:
        super().__init__(config)
        self.babybert = BabyBertModel(config)
        self.mlm_transform = mlm_transform(config)
        self.mlm_decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self._add_heads(config)
        self.post_init()

    def _add_heads(self, config: BabyBertConfig) -> None:
        """Add further heads."""

    def get_output_embeddings(self) -> nn.Module:
        return self.mlm_decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.mlm_decoder = new_embeddings


class BabyBertForMaskedLM(BabyBertWithDecoder):
    """Logits over the vocabulary at every position."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Logits (B, T, V); with `labels` (-100 where there is none) also the mean cross entropy."""
        hidden_BTD = self.babybert(input_ids, attention_mask, token_type_ids).last_hidden_state
        logits_BTV = self.mlm_decoder(self.mlm_transform(hidden_BTD))
        loss = None if labels is None else cross_entropy(logits_BTV.flatten(0, 1), labels.flatten())
        output = MaskedLMOutput(loss=loss, logits=logits_BTV)
        return output if return_dict is not False else output.to_tuple()


class BabyBertForNextSentencePrediction(BabyBertPreTrainedModel):
    """Logits of "B follows A" (class 0) and "B is from elsewhere" (class 1), as Transformers' BERT has them."""

    def __init__(self, config: BabyBertConfig) -> None:
        super().__init__(config)
        self.babybert = BabyBertModel(config)
        self.nsp_head = nsp_head(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> NextSentencePredictorOutput | tuple[Tensor, ...]:
        """Logits (B, 2); with `labels` (0: B follows A) also the mean cross entropy."""
        hidden_BTD = self.babybert(input_ids, attention_mask, token_type_ids).last_hidden_state
        logits_B2 = self.nsp_head(hidden_BTD[:, 0]).flip(1)
        loss = None if labels is None else cross_entropy(logits_B2, labels.flatten())
        output = NextSentencePredictorOutput(loss=loss, logits=logits_B2)
        return output if return_dict is not False else output.to_tuple()


class BabyBertForPreTraining(BabyBertWithDecoder):
    """Both heads. The classes of `seq_relationship_logits` are those of `BabyBertForNextSentencePrediction`."""

    def _add_heads(self, config: BabyBertConfig) -> None:
        self.nsp_head = nsp_head(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BertForPreTrainingOutput | tuple[Tensor, ...]:
        """Logits (B, T, V) and (B, 2); with both labels also the sum of the mean cross entropies."""
        hidden_BTD = self.babybert(input_ids, attention_mask, token_type_ids).last_hidden_state
        logits_BTV = self.mlm_decoder(self.mlm_transform(hidden_BTD))
        logits_B2 = self.nsp_head(hidden_BTD[:, 0]).flip(1)
        loss = None
        if labels is not None and next_sentence_label is not None:
            loss = cross_entropy(logits_BTV.flatten(0, 1), labels.flatten())
            loss = loss + cross_entropy(logits_B2, next_sentence_label.flatten())
        output = BertForPreTrainingOutput(loss=loss, prediction_logits=logits_BTV, seq_relationship_logits=logits_B2)
        return output if return_dict is not False else output.to_tuple()


class BabyBertForSequenceClassification(BabyBertPreTrainedModel):
    """Logits of the classes of a text or a pair of texts. The head is new unless the checkpoint was fine-tuned."""

    def __init__(self, config: BabyBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.babybert = BabyBertModel(config)
        self.class_head = _classification_head(config, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits (B, C); with `labels` (B) also the mean cross entropy."""
        hidden_BTD = self.babybert(input_ids, attention_mask, token_type_ids).last_hidden_state
        logits_BC = self.class_head(hidden_BTD[:, 0])
        loss = None if labels is None else cross_entropy(logits_BC, labels.flatten())
        output = SequenceClassifierOutput(loss=loss, logits=logits_BC)
        return output if return_dict is not False else output.to_tuple()
