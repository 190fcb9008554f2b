"""The loader with its arrays on the device that trains: only the indices of a batch's pairs travel.

For data that fits beside the model (9 bytes a token: IMDB takes 120 MB). Batches and dynamic masks are made on the
device, by the same functions of (seed, epoch, index) as on the host, to the bit: 64-bit integers wrap around alike.
Which pairs and how long the longest is, the host knows; so nothing waits for the device.

Shapes: B pairs, T positions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from babybert.data.loader import Batch, DynamicMasking, Loader
from babybert.data.masking import BECOMES_MASK, BECOMES_RANDOM, CHOOSE, DRAW, REPLACE, stream_key
from babybert.data.table import Examples
from babybert.data.tokenizer import FIRST_ORDINARY, MASK


@dataclass
class DeviceLoader(Loader):
    """A `Loader` of the same batches, whose tensors are made on `device`."""

    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        arrays = (
            self.examples.ids,
            self.examples.labels,
            self.examples.segments,
            self.examples.offsets,
            self.examples.is_next,
        )
        # Copied, because a mapped file is read-only and a tensor promises that it can be written.
        self._tensors = [torch.from_numpy(np.array(array)).to(self.device) for array in arrays]

    def batch(self, rows: np.ndarray, epoch: int) -> Batch:
        """One batch of the pairs with these indices, with the masks of this epoch."""
        ids, labels, segments, offsets, is_next = self._tensors
        longest = int((self.examples.offsets[rows + 1] - self.examples.offsets[rows]).max(initial=0))
        rows_B = torch.from_numpy(rows).to(self.device, non_blocking=True)
        start_B1, end_B1 = offsets[rows_B].unsqueeze(1), offsets[rows_B + 1].unsqueeze(1)
        index_BT = start_B1 + torch.arange(longest, device=self.device)
        real_BT = index_BT < end_B1
        index_BT = index_BT.clamp(max=len(ids) - 1)
        ids_BT, labels_BT, segments_BT = (values[index_BT].long() * real_BT for values in (ids, labels, segments))
        if self.remask:
            ids_BT, labels_BT = mask_batch(torch.where(labels_BT > 0, labels_BT, ids_BT), rows_B, self.remask, epoch)
        return Batch(ids_BT, labels_BT, segments_BT, is_next[rows_B].long())


def fits_on_device(examples: Examples, device: torch.device) -> bool:
    """Whether the arrays take at most a quarter of what is free on a GPU; False for a CPU, where they are already."""
    if device.type != "cuda":
        return False
    arrays = (examples.ids, examples.labels, examples.segments, examples.offsets, examples.is_next)
    return sum(array.nbytes for array in arrays) <= torch.cuda.mem_get_info(device)[0] // 4


def mask_batch(ids_BT: Tensor, rows_B: Tensor, remask: DynamicMasking, epoch: int) -> tuple[Tensor, Tensor]:
    """What `masking.mask_tokens` does, for padded rows of original ids on any device."""

    def uniform(stream: int) -> Tensor:
        key = stream_key(remask.seed, epoch, stream).astype(np.int64).item()
        position_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        mixed_BT = _mix(_mix(rows_B ^ key).unsqueeze(1) + position_T)
        return _shift_right(mixed_BT, 11).double() * 2.0**-53

    draw_BT = torch.where(ids_BT >= FIRST_ORDINARY, uniform(CHOOSE), torch.inf)
    smallest_B1 = draw_BT.amin(1, keepdim=True)
    chosen_BT = (draw_BT < remask.share) | ((draw_BT == smallest_B1) & draw_BT.isfinite())
    fate_BT = uniform(REPLACE)
    random_BT = FIRST_ORDINARY + (uniform(DRAW) * (remask.vocab_size - FIRST_ORDINARY)).long()
    changed_BT = torch.where(
        fate_BT < BECOMES_MASK, MASK, torch.where(fate_BT < BECOMES_MASK + BECOMES_RANDOM, random_BT, ids_BT)
    )
    return torch.where(chosen_BT, changed_BT, ids_BT), torch.where(chosen_BT, ids_BT, 0)


def _mix(x: Tensor) -> Tensor:
    """`masking._mix`, on signed integers."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """As of unsigned integers: torch's own shift copies the sign down."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(unsigned: int) -> int:
    return unsigned - (1 << 64)
