"""Padded batches to packed tokens, and back.

The tokens of all pairs are laid end to end, without padding. Attention looks from `cu_seqlens[b]` to `cu_seqlens[b +
1]`; everything else in the encoder is a function of one token.

Shapes: B pairs, T positions, N tokens of all pairs, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Where the tokens of a padded batch are when they are packed. All tensors are on the batch's device."""

    index_N: Tensor  # position of each token in the flattened batch, b x T + t (int64, ascending)
    cu_seqlens: Tensor  # cumulative lengths (B + 1, int64): pair b has tokens cu_seqlens[b] to cu_seqlens[b + 1]
    shape: torch.Size  # (B, T)
    is_full: bool = False  # known to have no padding: packing is a change of the shape, and attention needs no mask

    @classmethod
    def without_padding(cls, shape: torch.Size, device: torch.device) -> "PackedBatch":
        """A batch whose rows are all full."""
        rows, length = shape
        index_N = torch.arange(rows * length, device=device)
        return cls(index_N, torch.arange(rows + 1, device=device) * length, shape, is_full=True)

    @classmethod
    def from_mask(cls, mask_BT: Tensor) -> "PackedBatch":
        """Pack the positions where the mask is true: those that are not padding. Waits for a GPU to count them."""
        index_N = mask_BT.flatten().nonzero().squeeze(1)
        cu_seqlens = F.pad(mask_BT.sum(1).cumsum(0), (1, 0))
        return cls(index_N, cu_seqlens, mask_BT.shape)

    def to_mask(self) -> Tensor:
        """The mask (B, T): true where there is a token."""
        mask = torch.zeros(self.shape.numel(), dtype=torch.bool, device=self.index_N.device)
        return mask.index_fill_(0, self.index_N, True).view(self.shape)

    def pack(self, x: Tensor) -> Tensor:
        """The tokens' entries (N, ...) of a padded batch (B, T, ...)."""
        x_ND = x.flatten(0, 1)
        return x_ND if self.is_full else x_ND[self.index_N]

    def unpack(self, x_ND: Tensor) -> Tensor:
        """The padded batch (B, T, D), with zeros where there is no token."""
        if self.is_full:
            return x_ND.view(*self.shape, -1)
        flat = x_ND.new_zeros(self.shape.numel(), x_ND.shape[1]).index_copy(0, self.index_N, x_ND)
        return flat.view(*self.shape, -1)
