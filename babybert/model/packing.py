"""Padded batches to tokens laid end to end, and back."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PackedBatch(NamedTuple):
    """Where the tokens of a padded batch are when they are laid end to end."""

    index_N: Tensor  # in the flattened batch
    offsets: Tensor  # pair b has the tokens from offsets[b] to offsets[b + 1]
    shape: torch.Size  # (B, T)

    @classmethod
    def of(cls, real_BT: Tensor) -> "PackedBatch":
        """The positions that are not padding."""
        return cls(real_BT.flatten().nonzero().squeeze(1), F.pad(real_BT.sum(1).cumsum(0), (1, 0)), real_BT.shape)

    def pack(self, x_BT: Tensor) -> Tensor:
        """Of a padded batch, what is at the tokens."""
        return x_BT.flatten(0, 1)[self.index_N]

    def pad(self, x_ND: Tensor) -> Tensor:
        """The padded batch (B, T, D), with zeros where there is no token."""
        flat = x_ND.new_zeros(self.shape.numel(), x_ND.shape[1]).index_copy(0, self.index_N, x_ND)
        return flat.view(*self.shape, -1)
