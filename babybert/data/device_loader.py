"""A loader with the examples on the training device: only the indices of a batch's pairs are copied to it.

For data that fits next to the model (9 bytes a token; IMDB takes 120 MB). Batches and dynamic masks are computed on
the device, by the same functions of (seed, epoch, index) as on the host, and are equal to the bit. Nothing waits for
the device: the host knows which pairs are in a batch, and how long the longest is.

Shapes: B pairs, T positions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from babybert.data.loader import Batch, DynamicMasking, Loader
from babybert.data.masking import CHOOSE, choosing_draws, hash_rows, is_chosen, replacements
from babybert.data.table import Examples

MAX_SHARE_OF_FREE_MEMORY = 0.25  # the rest is for the model, its gradients and activations


@dataclass
class DeviceLoader(Loader):
    """A `Loader` of the same batches whose tensors are made on `device`.

    Attributes:
        device: where the examples are held and the batches are made.
    """

    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        examples = self.examples
        self._ids = self._copy_to_device(examples.ids)
        self._labels = self._copy_to_device(examples.labels)
        self._segments = self._copy_to_device(examples.segments)
        self._offsets = self._copy_to_device(examples.offsets)
        self._is_next = self._copy_to_device(examples.is_next)
        continues_V = self.masking.continues_V if self.masking else None
        self._continues_V = None if continues_V is None else self._copy_to_device(continues_V)

    def _copy_to_device(self, array: np.ndarray) -> Tensor:
        # Copied on the host first: torch warns about arrays that cannot be written, such as a mapped file.
        return torch.from_numpy(np.array(array)).to(self.device)

    def batch(self, rows: np.ndarray, epoch: int) -> Batch:
        """Make one batch of the pairs with these indices, with the masks of this epoch."""
        lengths = self.examples.offsets[rows + 1] - self.examples.offsets[rows]
        longest = int(lengths.max(initial=0))
        rows_B = torch.from_numpy(rows).to(self.device, non_blocking=True)
        start_B1 = self._offsets[rows_B].unsqueeze(1)
        end_B1 = self._offsets[rows_B + 1].unsqueeze(1)
        index_BT = start_B1 + torch.arange(longest, device=self.device)
        is_token_BT = index_BT < end_B1
        # Padding of the last pair would index past the end. What is read there is multiplied by 0.
        index_BT = index_BT.clamp(max=len(self._ids) - 1)
        ids_BT = self._ids[index_BT].long() * is_token_BT
        labels_BT = self._labels[index_BT].long() * is_token_BT
        segments_BT = self._segments[index_BT].long() * is_token_BT
        if self.masking:
            original_ids_BT = torch.where(labels_BT > 0, labels_BT, ids_BT)
            ids_BT, labels_BT = mask_batch(original_ids_BT, rows_B, self.masking, epoch, self._continues_V)
        return Batch(ids_BT, labels_BT, segments_BT, self._is_next[rows_B].long())


def fits_on_device(examples: Examples, device: torch.device) -> bool:
    """Return whether the examples take at most a quarter of a GPU's free memory; always False on a CPU."""
    if device.type != "cuda":
        return False
    arrays = (examples.ids, examples.labels, examples.segments, examples.offsets, examples.is_next)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return sum(array.nbytes for array in arrays) <= free_bytes * MAX_SHARE_OF_FREE_MEMORY


def mask_batch(
    ids_BT: Tensor, rows_B: Tensor, masking: DynamicMasking, epoch: int, continues_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mask padded rows of original ids on their device, as `masking.mask_tokens` does.

    Args:
        ids_BT: original ids (int64), padded with 0.
        rows_B: the index of each pair in the dataset (int64).
        masking: the vocabulary's size, the seed and the share of tokens to choose.
        epoch: with the seed, determines the masks.
        continues_V: `masking.continues_V` on the device.

    Returns:
        the masked ids, and the labels: the original id where a token was chosen, 0 elsewhere.
    """
    rows_B1 = rows_B.unsqueeze(1)
    positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    word_positions_BT = positions_T.expand_as(ids_BT)
    if continues_V is not None:
        word_positions_BT = torch.where(continues_V[ids_BT], 0, word_positions_BT).cummax(1).values
    draws_BT = choosing_draws(ids_BT, hash_rows(masking.seed, epoch, rows_B1, CHOOSE), word_positions_BT, torch)
    chosen_BT = is_chosen(draws_BT, draws_BT.amin(1, keepdim=True), masking.share_in(epoch), torch)
    replaced_BT = replacements(ids_BT, masking.vocab_size, masking.seed, epoch, rows_B1, positions_T, torch)
    return torch.where(chosen_BT, replaced_BT, ids_BT), torch.where(chosen_BT, ids_BT, 0)
