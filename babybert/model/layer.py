"""A Transformer layer: `nn.TransformerEncoderLayer` with the same weights, and a second forward for packed tokens.

On a CPU the tokens of all pairs are packed (`PackedBatch`), because the kernels need no padding. On a GPU a batch stays
padded, and the forward of PyTorch's layer runs. `ops` picks the implementation of each operation.

Shapes: N tokens of all pairs (or B x T positions), M query positions, D width.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from babybert.model import ops
from babybert.model.packing import PackedBatch


class Dropout(nn.Dropout):
    """`nn.Dropout` that calls `ops.dropout`."""

    kernels: ops.Kernels = "auto"

    def forward(self, x: Tensor) -> Tensor:
        return ops.dropout(x, self.p, self.kernels) if self.training else x


class EncoderLayer(nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer`, batch first, with `forward_packed` in addition to `forward`."""

    kernels: ops.Kernels = "auto"
    compiled_feed_forward: Callable[[Tensor], Tensor] | None = None  # set by `InferenceModel`

    def __init__(
        self, width: int, heads: int, hidden: int, dropout_p: float, norm: str = "post", activation: str = "relu"
    ) -> None:
        norm_first = norm == "pre"
        super().__init__(width, heads, hidden, dropout_p, activation, batch_first=True, norm_first=norm_first)
        self.activation_name = activation
        self.dropout = Dropout(dropout_p)
        self.dropout1 = Dropout(dropout_p)
        self.dropout2 = Dropout(dropout_p)

    def _get_name(self) -> str:
        return "TransformerEncoderLayer"  # so that `print(model)` shows the reference's modules

    def _ff_block(self, x: Tensor) -> Tensor:
        """The feed-forward block of (..., D). It overrides PyTorch's, so `forward` uses it as well."""
        if self.compiled_feed_forward is not None:
            return self.compiled_feed_forward(x)
        dropout_p = self.dropout.p if self.training else 0.0
        x_ND = x.flatten(0, -2)
        y_ND = ops.feed_forward(x_ND, self.linear1, self.linear2, dropout_p, self.activation_name, self.kernels)
        return self.dropout2(y_ND.view(x.shape))

    def forward_packed(self, x_ND: Tensor, packed: PackedBatch, query_M: Tensor | None = None) -> Tensor:
        """The layer's output for packed tokens (N, D), or for the query positions among them alone (M, D)."""
        attended_ND = self._attend_packed(self.norm1(x_ND) if self.norm_first else x_ND, packed)
        if query_M is not None:
            x_ND, attended_ND = x_ND[query_M], attended_ND[query_M]
        return self._add_sublayers(x_ND, self.self_attn.out_proj(attended_ND))

    def forward_queries(self, x_BTD: Tensor, query_M: Tensor) -> Tensor:
        """The layer's output (B, M, D) at the query positions alone, from sequences without padding.

        It has PyTorch's operations only, so that it can be exported.
        """
        input_BTD = self.norm1(x_BTD) if self.norm_first else x_BTD
        attended_BMD, _ = self.self_attn(input_BTD[:, query_M], input_BTD, input_BTD, need_weights=False)
        return self._add_sublayers(x_BTD[:, query_M], attended_BMD)

    def _add_sublayers(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the projected attention and then the feed-forward block to the residual stream (..., D)."""
        x = x + self.dropout1(attended)
        if self.norm_first:
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x)
        return self.norm2(x + self._ff_block(x))

    def _attend_packed(self, x_ND: Tensor, packed: PackedBatch) -> Tensor:
        """What each token gathers from its pair (N, D), before the projection."""
        attention = self.self_attn
        qkv_N3D = F.linear(x_ND, attention.in_proj_weight, attention.in_proj_bias)
        dropout_p = attention.dropout if self.training else 0.0
        return ops.attention(qkv_N3D, packed, attention.num_heads, dropout_p, self.kernels)
