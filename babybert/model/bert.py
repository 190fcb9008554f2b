"""The network: a Transformer encoder with one head for each objective, module for module the reference's.

Its modules are PyTorch's layers. They are post-norm, as the reference's are, or pre-norm, as `ModelConfig` says. At the
reference's sizes 97 % of the 3,177,689 parameters are in two tables of 147,161 x 10, the token embedding and the MLM
decoder, which are not tied. Most of the arithmetic is the decoder's softmax.

Shapes: B pairs, T positions, D width, V vocabulary, N packed tokens or masked positions, M query positions.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor, nn

from babybert.config import ModelConfig
from babybert.data.tokenizer import PAD
from babybert.model import ops
from babybert.model.bf16_weights import Bf16Weights
from babybert.model.layer import Dropout, EncoderLayer
from babybert.model.packing import PackedBatch

MIMETIC_GAIN = 0.7  # with more, a token attends to little but itself; tried: 0.7 and 1
NORMAL_STD = 0.02  # of the BERT paper's initial weights
SEGMENTS = 3  # 0 padding, 1 `[CLS] A [SEP]`, 2 `B [SEP]`


class TokenEmbedding(nn.Module):
    """Token embeddings, scaled by sqrt(D) to the size of the positions (Vaswani et al., 2017, section 3.4)."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.scale = math.sqrt(width)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.embedding(ids_BT) * self.scale


class PositionalEncoding(nn.Module):
    """Adds fixed sines and cosines of the position (Vaswani et al., 2017, section 3.5), then applies dropout."""

    table_TD: Tensor

    def __init__(self, width: int, max_positions: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
        angle = torch.arange(max_positions)[:, None] * frequency
        table_TD = torch.zeros(max_positions, width)
        table_TD[:, 0::2] = angle.sin()
        table_TD[:, 1::2] = angle.cos()
        self.register_buffer("table_TD", table_TD, persistent=False)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return self.dropout(x + self.table_TD[position])


class BertEmbedding(nn.Module):
    """The sum of token, position and segment embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token_embedding = TokenEmbedding(config.vocab_size, config.width)
        self.positional_encoding = PositionalEncoding(config.width, config.max_positions, config.dropout)
        self.segment_embedding = nn.Embedding(SEGMENTS, config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, ids: Tensor, segments: Tensor, position: Tensor) -> Tensor:
        """Embeddings (..., D) of ids and segments (...), at positions of the same shape or of the last dimension's."""
        positioned = self.positional_encoding(self.token_embedding(ids), position)
        return self.dropout(positioned + self.segment_embedding(segments))


class BertEncoder(nn.Module):
    """Token ids to hidden states. `BabyBert` and `TextClassifier` add heads to it."""

    kernels: ops.Kernels = "auto"
    bf16_weights: Bf16Weights | None = None  # copies that are kept from one forward to the next

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, dropout = config.width, config.dropout
        self.config = config
        self.embedding = BertEmbedding(config)
        layer = EncoderLayer(width, config.heads, config.feed_forward, dropout, config.norm, config.activation)
        self.encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.encoder_norm = nn.LayerNorm(width)
        self._add_heads()
        self.dropout = Dropout(dropout)
        self._initialize()

    def _add_heads(self) -> None:
        """Make the modules that read the hidden states. They come before `dropout`, as in the reference."""

    def _initialize(self) -> None:
        # nn.TransformerEncoder copies one layer. Without this, all layers would start with the same weights.
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        # Scaled by sqrt(D) in the forward, these have unit variance, as the positional encodings do.
        nn.init.normal_(self.embedding.token_embedding.embedding.weight, std=self.config.width**-0.5)
        nn.init.normal_(self.embedding.segment_embedding.weight, std=self.config.width**-0.5)

    @torch.no_grad()
    def initialize_normal(self) -> None:
        """Start with small normal weights, for pre-norm networks. Embeddings keep their size.

        A pre-norm network adds the output of 2 L sublayers to its residual stream. Their last matrices are scaled by
        1 / sqrt(2 L), so that the stream keeps its size with any number of layers (Radford et al., 2019).
        """
        tables = {self.embedding.token_embedding.embedding.weight, self.embedding.segment_embedding.weight}
        for parameter in self.parameters():
            if parameter.dim() > 1 and parameter not in tables:
                nn.init.normal_(parameter, std=NORMAL_STD)
        for layer in self.encoder.layers:
            for matrix in (layer.self_attn.out_proj.weight, layer.linear2.weight):
                matrix.div_(math.sqrt(2 * self.config.layers))

    @torch.no_grad()
    def initialize_mimetic(self) -> None:
        """Start with query weights equal to the key weights, so that tokens attend to similar ones.

        After Trockman and Kolter, 2023. Nearby positions have similar encodings, and equal words have equal embeddings:
        from the first step on, a token attends to its neighbours and to words that A and B share. Segment embeddings
        start as large as token embeddings, so that A and B can be distinguished.
        """
        width = self.config.width
        for layer in self.encoder.layers:
            query, key, _ = layer.self_attn.in_proj_weight.chunk(3)
            nn.init.orthogonal_(query, MIMETIC_GAIN)
            key.copy_(query)
        self.embedding.segment_embedding.weight.mul_(math.sqrt(width))

    def forward(self, ids_BT: Tensor, segments_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D). No position attends to `[PAD]`, wherever in a row it is."""
        if ops.packs_tokens(ids_BT.device, self.kernels):
            packed = PackedBatch.from_mask(ids_BT != PAD)
            return packed.unpack(self.dropout(self._encode_packed(ids_BT, segments_BT, packed)))
        x_BTD = self.embedding(ids_BT, segments_BT, torch.arange(ids_BT.shape[1], device=ids_BT.device))
        x_BTD = self.encoder(x_BTD, src_key_padding_mask=ids_BT == PAD)
        return self.dropout(self.encoder_norm(x_BTD))

    def hidden_at(self, ids_BT: Tensor, segments_BT: Tensor, query_M: Tensor, has_padding: bool = True) -> Tensor:
        """Hidden states (M, D) at the query positions alone: b x T + t for position t of pair b.

        None of them may be padding. In the last layer all tokens have keys and values, but what follows attention is
        computed for the query positions only. Without padding (`has_padding=False`) it is faster.
        """
        if has_padding:
            packed = PackedBatch.from_mask(ids_BT != PAD)
        else:
            packed = PackedBatch.without_padding(ids_BT.shape, ids_BT.device)
        row_M = torch.searchsorted(packed.index_N, query_M)
        return self.dropout(self._encode_packed(ids_BT, segments_BT, packed, row_M))

    def _encode_packed(
        self, ids_BT: Tensor, segments_BT: Tensor, packed: PackedBatch, row_M: Tensor | None = None
    ) -> Tensor:
        """The encoder's output for packed tokens, or for some rows of them, before dropout."""
        position_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        x_ND = self.embedding(packed.pack(ids_BT), packed.pack(segments_BT), packed.pack(position_BT))
        layers = list(self.encoder.layers)
        return ops.encoder(x_ND, packed, row_M, layers, self.encoder_norm, self.bf16_weights, self.kernels)

    def set_kernels(self, kernels: ops.Kernels) -> Self:
        """Choose the implementations that `ops` may pick: "auto", "plain" or "triton". Returns the model.

        Raises UsageError for "triton" where there is no GPU or no Triton.
        """
        ops.check_available(kernels)
        for module in self.modules():
            if isinstance(module, (BertEncoder, EncoderLayer, Dropout)):
                module.kernels = kernels
        return self


class BabyBert(BertEncoder):
    """The pretrained network: hidden states, and their logits for each objective."""

    def _add_heads(self) -> None:
        width, config = self.config.width, self.config
        self.nsp_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), Dropout(config.dropout), nn.Linear(width, 2))
        self.mlm_transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.mlm_decoder = nn.Linear(width, config.vocab_size)
        if config.tie_decoder:
            self.mlm_decoder.weight = self.embedding.token_embedding.embedding.weight

    def _initialize(self) -> None:
        super()._initialize()
        nn.init.zeros_(self.mlm_decoder.bias)

    def mlm_logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits over the vocabulary (N, V) at the chosen positions. V is large: pass few positions."""
        return self.mlm_decoder(self.mlm_transform(hidden_ND))

    def nsp_logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits (B, 2) from the `[CLS]` position; class 1 is "B follows A"."""
        return self.nsp_head(hidden_BTD[:, 0])


@contextlib.contextmanager
def keep_bf16_weights(model: nn.Module) -> Iterator[None]:
    """Cast the weights of `model`, an encoder or what contains one, to bf16 once in this context.

    They must not change in it. Outside of it each forward in bf16 casts them.
    """
    encoders = [module for module in model.modules() if isinstance(module, BertEncoder)]
    try:
        for encoder in encoders:
            encoder.bf16_weights = Bf16Weights()
        yield
    finally:
        for encoder in encoders:
            encoder.bf16_weights = None
