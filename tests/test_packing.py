import torch
from conftest import gradient

from babybert.model.packing import PackedBatch

MASK_BT = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)


def test_a_mask_becomes_indices_and_cumulative_lengths() -> None:
    packed = PackedBatch.from_mask(MASK_BT)
    assert packed.index_N.tolist() == [0, 1, 3, 8]
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 4]
    assert packed.shape == (3, 4)
    assert torch.equal(packed.to_mask(), MASK_BT)


def test_pack_keeps_the_tokens_and_unpack_puts_zeros_elsewhere() -> None:
    packed = PackedBatch.from_mask(MASK_BT)
    x_BTD = torch.arange(1, 25).view(3, 4, 2)
    x_ND = packed.pack(x_BTD)
    assert torch.equal(x_ND, x_BTD[MASK_BT])
    assert torch.equal(packed.unpack(x_ND), x_BTD * MASK_BT[:, :, None])
    assert torch.equal(packed.pack(x_BTD[:, :, 0]), x_ND[:, 0])


def test_unpack_passes_gradients() -> None:
    packed = PackedBatch.from_mask(MASK_BT)
    x_ND = torch.ones(4, 2, requires_grad=True)
    packed.unpack(x_ND).sum().backward()
    assert torch.equal(gradient(x_ND), torch.ones(4, 2))


def test_the_mask_is_on_the_device_of_the_indices() -> None:
    index_N = torch.empty(4, dtype=torch.int64, device="meta")
    packed = PackedBatch(index_N, torch.empty(4, dtype=torch.int64, device="meta"), torch.Size((3, 4)))
    assert packed.to_mask().device.type == "meta"
    assert packed.unpack(torch.empty(4, 2, device="meta")).device.type == "meta"
