"""What the model computes fastest by code of its own: numba on a CPU, Triton on a GPU.

Each kernel has a plain form in PyTorch beside the place that picks it (`mlm_head.py`, `layer.py`), which is its oracle
in the tests and runs wherever the kernel does not.
"""

import functools
import importlib
import logging
from types import ModuleType

import torch
from torch import Tensor


def cpu_kernels(device: torch.device) -> ModuleType | None:
    """The CPU's kernels, or None for another device or where numba cannot be had."""
    return _load("cpu") if device.type == "cpu" else None


def answer_kernels() -> ModuleType | None:
    """The kernels of a server on a CPU, or None where numba cannot be had."""
    return _load("cpu_top_tokens")


def gpu_kernels(device: torch.device) -> ModuleType | None:
    """The GPU's kernels, or None for another device or where Triton cannot be had."""
    return _load("gpu") if device.type == "cuda" else None


@functools.cache
def _load(name: str) -> ModuleType | None:
    """The module, or None where what it needs is not installed; says so, once."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        logging.getLogger(__name__).warning(
            "no %s kernels (%s): PyTorch's own operations are used, which are slower", name.upper(), error
        )
        return None


def as_autocast(x: Tensor) -> Tensor:
    """What autocast would make of the input of a matrix product: it does not look into our own functions."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
