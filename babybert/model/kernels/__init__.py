"""Compiled kernels: numba on a CPU, Triton on a GPU, and the chunked vocabulary head in PyTorch.

`babybert/model/ops.py` is the only importer. `babybert/model/plain_ops.py` has each kernel's plain form in PyTorch,
which runs wherever the kernel does not, and which the tests compare the kernel with. Each kernel module has a function
`requirements`: what must hold of the tensors for the kernel to be correct, and to be faster than PyTorch's operations.
"""

Requirements = dict[str, bool]  # each requirement in words, and whether it is met
