"""The network: a post-norm Transformer encoder with one head for each objective, module for module the reference's.

Everything is PyTorch's own layers. At the reference's sizes 97 % of the 3,177,689 parameters are two tables of
147,161 x 10, the token embedding and the MLM decoder (not tied); the decoder's softmax is most of the arithmetic.

Shapes: B pairs, T positions, D width, V vocabulary, N tokens or masked positions, M tokens asked for.
"""

import math

import torch
from torch import Tensor, nn

from babybert.config import ModelConfig
from babybert.data.tokenizer import PAD
from babybert.model.kernels import cpu_kernels
from babybert.model.layer import Dropout, EncoderLayer
from babybert.model.packing import PackedBatch

MIMETIC_GAIN = 0.7  # more, and a token sees little but itself; tried: 0.7 and 1
SEGMENTS = 3  # 0 padding, 1 `[CLS] A [SEP]`, 2 `B [SEP]`


class TokenEmbedding(nn.Module):
    """Token vectors, scaled by sqrt(D) to the size of the positions' (Vaswani et al., 2017, section 3.4)."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.scale = math.sqrt(width)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.embedding(ids_BT) * self.scale


class PositionalEncoding(nn.Module):
    """Adds fixed sines and cosines of the position (Vaswani et al., 2017, section 3.5), then drops out."""

    table_TD: Tensor

    def __init__(self, width: int, max_positions: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
        angle = torch.arange(max_positions)[:, None] * frequency
        table_TD = torch.zeros(max_positions, width)
        table_TD[:, 0::2], table_TD[:, 1::2] = angle.sin(), angle.cos()
        self.register_buffer("table_TD", table_TD, persistent=False)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return self.dropout(x + self.table_TD[position])


class BertEmbedding(nn.Module):
    """Token, position and segment, added up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token_embedding = TokenEmbedding(config.vocab_size, config.width)
        self.positional_encoding = PositionalEncoding(config.width, config.max_positions, config.dropout)
        self.segment_embedding = nn.Embedding(SEGMENTS, config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, ids: Tensor, segments: Tensor, position: Tensor) -> Tensor:
        """Vectors (..., D) of ids and segments (...); `position` is theirs, or that of the last dimension."""
        return self.dropout(
            self.positional_encoding(self.token_embedding(ids), position) + self.segment_embedding(segments)
        )


class BabyBert(nn.Module):
    """Token ids to hidden states, and hidden states to what each objective predicts."""

    kernels = "auto"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, dropout = config.width, config.dropout
        self.config = config
        self.embedding = BertEmbedding(config)
        layer = EncoderLayer(width, config.heads, config.feed_forward, dropout)
        self.encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.encoder_norm = nn.LayerNorm(width)
        self.nsp_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), Dropout(dropout), nn.Linear(width, 2))
        self.mlm_transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.mlm_decoder = nn.Linear(width, config.vocab_size)
        self.dropout = Dropout(dropout)
        self._initialize()

    def _initialize(self) -> None:
        # nn.TransformerEncoder copies one layer: without this, all layers would start with the same weights.
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        # sqrt(D) in the forward makes these of unit variance, as large as the positions.
        nn.init.normal_(self.embedding.token_embedding.embedding.weight, std=self.config.width**-0.5)
        nn.init.normal_(self.embedding.segment_embedding.weight, std=self.config.width**-0.5)
        nn.init.zeros_(self.mlm_decoder.bias)

    @torch.no_grad()
    def initialize_mimetic(self) -> None:
        """Begin with queries that equal the keys, so that tokens attend to what is like them (after Trockman and Kolter, 2023).

        Near positions are alike, and equal words are: neighbours, and words that A and B share, reach a token from the first
        step on. Segments begin as large as tokens, that A and B are told apart.
        """
        width = self.config.width
        for layer in self.encoder.layers:
            query, key, _ = layer.self_attn.in_proj_weight.chunk(3)
            nn.init.orthogonal_(query, MIMETIC_GAIN)
            key.copy_(query)
        self.embedding.segment_embedding.weight.mul_(math.sqrt(width))

    def forward(self, ids_BT: Tensor, segments_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D). Positions that hold `[PAD]` are not attended to, wherever in the row they are."""
        if self.kernels == "auto" and cpu_kernels(ids_BT.device):
            rows = PackedBatch.of(ids_BT != PAD)
            x_ND = self._embed_rows(ids_BT, segments_BT, rows)
            for layer in self.encoder.layers:
                x_ND = layer.forward_rows(x_ND, rows)
            return rows.pad(self.dropout(self.encoder_norm(x_ND)))
        x_BTD = self.embedding(ids_BT, segments_BT, torch.arange(ids_BT.shape[1], device=ids_BT.device))
        x_BTD = self.encoder(x_BTD, src_key_padding_mask=ids_BT == PAD)
        return self.dropout(self.encoder_norm(x_BTD))

    def hidden_at(self, ids_BT: Tensor, segments_BT: Tensor, query_M: Tensor) -> Tensor:
        """Hidden states (M, D) of some positions only, none of which is padding: b x T + t for position t of row b.

        All tokens have keys and values in the last layer, but only these need what comes after them.
        """
        rows = PackedBatch.of(ids_BT != PAD)
        x_ND = self._embed_rows(ids_BT, segments_BT, rows)
        last = len(self.encoder.layers) - 1
        for index, layer in enumerate(self.encoder.layers):
            x_ND = layer.forward_rows(x_ND, rows, torch.searchsorted(rows.index_N, query_M) if index == last else None)
        return self.dropout(self.encoder_norm(x_ND))

    def _embed_rows(self, ids_BT: Tensor, segments_BT: Tensor, rows: PackedBatch) -> Tensor:
        position_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        return self.embedding(rows.pack(ids_BT), rows.pack(segments_BT), rows.pack(position_BT))

    def set_kernels(self, kernels: str) -> "BabyBert":
        """Compute by whatever is fastest here ("auto"), or by PyTorch's own operations ("plain")."""
        for module in self.modules():
            if isinstance(module, (BabyBert, EncoderLayer, Dropout)):
                module.kernels = kernels
        return self

    def mlm_logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits over the vocabulary (N, V) of chosen positions; ask for few, V is large."""
        return self.mlm_decoder(self.mlm_transform(hidden_ND))

    def nsp_logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits (B, 2) from the `[CLS]` position: 1 is "B follows A"."""
        return self.nsp_head(hidden_BTD[:, 0])
