"""The device that a command computes on, and what it can do."""

import torch

from babybert.errors import UsageError


def pick_device(name: str) -> torch.device:
    """The device for "auto" (a GPU if PyTorch sees one), "cpu" or "cuda". Raises UsageError for a missing GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU is visible to PyTorch; check the driver, or use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products are much faster in bf16: on CPUs with AMX or AVX512-BF16, and GPUs that support it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
