"""Training batches of random tokens, for measurements that need no prepared data.

Shapes: B pairs, T positions.
"""

import torch

from babybert.data.loader import Batch
from babybert.data.tokenizer import CLS, FIRST_ORDINARY, MASK

MASKED_SHARE = 0.15


def generated_batch(pairs: int, positions: int, vocabulary: int, device: torch.device, seed: int = 0) -> Batch:
    """A batch whose pairs have between half and all of `positions`, and of which 15 % of the tokens are masked."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    length_B1 = integers(positions // 2, positions + 1, pairs, 1)
    length_B1[0] = positions
    position_T = torch.arange(positions)
    is_token_BT = position_T < length_B1
    ids_BT = integers(FIRST_ORDINARY, vocabulary, pairs, positions) * is_token_BT
    ids_BT[:, 0] = CLS
    chosen_BT = (torch.rand(pairs, positions, generator=generator) < MASKED_SHARE) & is_token_BT
    chosen_BT[:, 0] = False
    chosen_BT[:, 1] = True
    labels_BT = ids_BT * chosen_BT
    segments_BT = (1 + (position_T >= length_B1 // 2).long()) * is_token_BT
    return Batch(ids_BT.masked_fill(chosen_BT, MASK), labels_BT, segments_BT, integers(0, 2, pairs)).to(device)
