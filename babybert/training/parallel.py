"""Where a run computes: one device, or all visible GPUs of one machine with `DataParallel`.

The strategy is picked, not configured. `DataParallel` splits each batch over the GPUs and gathers what `forward`
returns; that is why `PretrainingModel` returns sums of shape (1,) and not logits.
"""

import torch
from torch import nn

from babybert.errors import UsageError


def pick_device(wanted: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda". Raises UsageError when a GPU is asked for and none is visible."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU is visible to PyTorch; check the driver, or use --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def parallelize(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` on `device`, wrapped in `DataParallel` when there are several GPUs. Its weights stay `model`'s own."""
    model.to(device)
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        return nn.DataParallel(model)
    return model


def describe(device: torch.device) -> str:
    """A phrase for the log: the device, and how many."""
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name(0)}{' (DataParallel)' if count > 1 else ''}"
