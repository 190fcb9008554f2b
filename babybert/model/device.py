"""The device that a command computes on."""

import torch

from babybert.errors import UsageError


def pick_device(wanted: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda". Raises UsageError when a GPU is asked for and none is visible."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU is visible to PyTorch; check the driver, or use --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
