"""When a model on a GPU uses the Triton kernels.

Measured on an H200: steps of `baby`, of width 10, are 1.06 to 2.5 times as fast with them as without, and need a
seventh to a third of the memory. At width 64 they gain with large batches in bf16 and lose in fp32. So "auto" uses them
for narrow models alone; `--kernels triton` uses them wherever they can run (docs/performance.md).

Triton builds the launcher of each kernel with a C compiler and Python's headers. Where one of them is missing, "auto"
does without the kernels.
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

WIDEST_AUTO = 16  # measured at 10 (faster) and at 64 (not always)
C_COMPILERS = ("gcc", "clang", "cc")  # those that Triton looks for, unless CC names one


def uses_triton(device: torch.device, width: int, kernels: str) -> bool:
    """Whether a model of this width should use the Triton kernels on `device`."""
    if device.type != "cuda" or kernels == "plain":
        return False
    return kernels == "triton" or (width <= WIDEST_AUTO and can_build())


@functools.cache
def can_build() -> bool:
    """Whether Triton is installed, and what it needs to build its launchers."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else C_COMPILERS
    return (
        importlib.util.find_spec("triton") is not None
        and any(shutil.which(compiler) for compiler in compilers)
        and Path(sysconfig.get_path("include"), "Python.h").is_file()
    )
