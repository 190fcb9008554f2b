"""The device that a command computes on."""

from typing import Literal

import torch

from babybert.errors import UsageError


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this name; "auto" is a GPU where PyTorch sees one. Raises UsageError for "cuda" without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU is visible to PyTorch; check the driver, or use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
