"""The device that a command computes on, and what it can do."""

import torch

from babybert.errors import UsageError


def pick_device(name: str) -> torch.device:
    """The device for "auto" (a GPU if PyTorch sees one), "cpu" or "cuda". Raises UsageError for a missing GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU is visible to PyTorch; check the driver, or use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def has_bf16_units() -> bool:
    """Whether the processor multiplies bf16 matrices faster than fp32 ones: AMX, or AVX-512 with its bf16 extension."""
    cpu = torch.cpu
    return bool(cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported())
