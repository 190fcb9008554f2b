"""A Transformer layer that is PyTorch's own in name, weights and plain form, and runs on kernels where they are faster.

Where there are CPU kernels, the tokens of all pairs are laid end to end, without padding (`PackedBatch`): attention looks from
`offsets[b]` to `offsets[b + 1]`, and all else is a function of one row. On a GPU a batch stays padded, because how many
tokens there are would have to be waited for; only the feed-forward is then replaced.

Dropout draws its seed from PyTorch's generator at each call, so a run's seed decides it, whatever computes it.

Shapes: B pairs, T positions, N tokens of all pairs (or B x T positions), M of them, D width, F hidden units.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babybert.model.kernels import as_autocast, cpu_kernels, gpu_kernels
from babybert.model.packing import PackedBatch


def feed_forward(x_ND: Tensor, linear1: nn.Linear, linear2: nn.Linear, drop: float, kernels: str = "auto") -> Tensor:
    """`dropout(relu(x @ W1.T + b1)) @ W2.T + b2` of rows (N, D), by a kernel where one is made for them."""
    if kernels == "auto":
        cpu, gpu = cpu_kernels(x_ND.device), gpu_kernels(x_ND.device)
        arguments = linear1.weight, linear1.bias, linear2.weight, linear2.bias, drop
        if cpu and cpu.feed_forward.supports(x_ND, linear1.weight, drop):
            return cpu.feed_forward.CpuFeedForward.apply(x_ND, *arguments, draw_seed(x_ND.device))
        if gpu and gpu.supports_feed_forward(x_ND, linear1.weight):
            return gpu.GpuFeedForward.apply(as_autocast(x_ND), *arguments, draw_seed(x_ND.device))
    return linear2(dropout(F.relu(linear1(x_ND)), drop, kernels))


def attention(qkv_N3D: Tensor, rows: PackedBatch, heads: int, drop: float, kernels: str = "auto") -> Tensor:
    """Scaled dot-product attention (Vaswani et al., 2017) within each pair, to (N, D)."""
    cpu = cpu_kernels(qkv_N3D.device) if kernels == "auto" else None
    if cpu and cpu.attention.supports(qkv_N3D, heads, drop):
        return cpu.attention.CpuAttention.apply(qkv_N3D, rows.offsets, heads, drop, draw_seed(qkv_N3D.device))
    q, k, v = rows.pad(qkv_N3D).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    real_BT = torch.zeros(rows.shape.numel(), dtype=torch.bool).index_fill_(0, rows.index_N, True).view(rows.shape)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=real_BT[:, None, None], dropout_p=drop)
    return rows.pack(out.transpose(1, 2).flatten(2))


def dropout(x: Tensor, drop: float, kernels: str = "auto") -> Tensor:
    """Each number 0 with probability `drop`, else divided by 1 - drop (Srivastava et al., 2014)."""
    cpu = cpu_kernels(x.device) if kernels == "auto" and drop > 0 else None
    if cpu and cpu.dropout.supports(x):
        return cpu.dropout.CpuDropout.apply(x, drop, draw_seed(x.device))
    return F.dropout(x, drop)


def draw_seed(device: torch.device) -> Tensor:
    """Two numbers below 2^32 from PyTorch's generator of this device: what one call of a dropout hashes with."""
    return torch.randint(0, 2**32, (2,), device=device)


class Dropout(nn.Dropout):
    """`nn.Dropout` by whichever is faster."""

    kernels = "auto"

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.kernels) if self.training else x


class EncoderLayer(nn.TransformerEncoderLayer):
    """The same layer, with a second way through it for rows without padding."""

    kernels = "auto"
    compiled_feed_forward: Callable[[Tensor], Tensor] | None = None  # of a model that only answers

    def __init__(self, width: int, heads: int, hidden: int, drop: float) -> None:
        super().__init__(width, heads, hidden, drop, batch_first=True)
        self.dropout, self.dropout1, self.dropout2 = Dropout(drop), Dropout(drop), Dropout(drop)

    def _get_name(self) -> str:
        return "TransformerEncoderLayer"  # printed, it is what it stands for

    def _ff_block(self, x: Tensor) -> Tensor:
        if self.compiled_feed_forward is not None:
            return self.compiled_feed_forward(x)
        drop = self.dropout.p if self.training else 0.0
        return self.dropout2(
            feed_forward(x.flatten(0, -2), self.linear1, self.linear2, drop, self.kernels).view(x.shape)
        )

    def forward_rows(self, x_ND: Tensor, rows: PackedBatch, query_M: Tensor | None = None) -> Tensor:
        """The layer's output for tokens laid end to end, or for those M of them that are asked for."""
        attend = self.self_attn
        qkv_N3D = F.linear(x_ND, attend.in_proj_weight, attend.in_proj_bias)
        attended_ND = attention(qkv_N3D, rows, attend.num_heads, attend.dropout if self.training else 0.0, self.kernels)
        if query_M is not None:
            x_ND, attended_ND = x_ND[query_M], attended_ND[query_M]
        x_ND = self.norm1(x_ND + self.dropout1(attend.out_proj(attended_ND)))
        return self.norm2(x_ND + self._ff_block(x_ND))
