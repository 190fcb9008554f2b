"""Compile loops with numba, and keep the machine code on disk.

numba compiles Python loops with LLVM. Compiling takes seconds, so numba stores the result under `__pycache__` or
NUMBA_CACHE_DIR. `compile_kernels` uses that cache where it can, and compiles in memory where no folder can be written.

Two rules follow from how numba keys its cache:

- A kernel's closure may hold numbers, but no compiled function. numba would take the function for another one in each
  process, and compile again. Helper functions are therefore module-level, with `@njit(inline="always")`.
- A change in another module is not seen. After an edit of a helper that is imported from another file, delete
  `*.nbi` in `__pycache__`.
"""

import functools
from collections.abc import Callable
from typing import Any

from numba import config
from numba.core.codegen import get_host_cpu_features

Kernels = tuple[Callable[..., None], ...]


def use_wide_vectors() -> None:
    """Let numba use 512-bit vectors on a processor with AVX-512, unless NUMBA_CPU_FEATURES is set.

    LLVM prefers 256 bits on Intel processors, because a few wide instructions in other code would lower the clock for
    nothing. These loops consist of vector instructions only, so they gain. The setting holds for everything that numba
    compiles in this process, and must be made before the first compilation.
    """
    features = get_host_cpu_features()
    if vars(config)["CPU_FEATURES"] is None and "+avx512f" in features.split(","):
        vars(config)["CPU_FEATURES"] = f"{features},-prefer-256-bit"


use_wide_vectors()


def compile_kernels(make: Callable[[int, bool], tuple[Any, ...]]) -> Callable[[int], Kernels]:
    """Turn `make(width, cache)`, which returns numba functions, into a function of the width alone.

    The width is a constant of the compiled code, so that LLVM unrolls the loops over it. The result calls `make` once
    for each width. `make` raises RuntimeError with `cache=True` where numba finds no folder to write to; it is then
    called with `cache=False`.
    """

    @functools.cache
    def kernels_for(width: int) -> Kernels:
        try:
            kernels = make(width, True)
        except RuntimeError:
            kernels = make(width, False)
        return tuple(_ignore_full_disk(kernel) for kernel in kernels)

    return kernels_for


def _ignore_full_disk(kernel: Any) -> Callable[..., None]:
    """Call the kernel again if numba could not write it to the cache: by then it is compiled in memory."""

    def run(*arguments: Any) -> None:
        try:
            kernel(*arguments)
        except OSError:
            kernel(*arguments)

    return run
