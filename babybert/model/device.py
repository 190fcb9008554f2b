"""The device that a command computes on."""

import torch

from babybert.errors import UsageError


def pick_device(name: str) -> torch.device:
    """The device for "auto" (a GPU if PyTorch sees one), "cpu" or "cuda". Raises UsageError for a missing GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU is visible to PyTorch; check the driver, or use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
