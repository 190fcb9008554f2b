"""BabyBERT: pretrain a small BERT from raw text, and serve it.

Read it in the order of the data: `corpus` (raw text to documents), `data` (documents to batches), `model` (batches to
losses), `checkpoint` and `training` (losses to checkpoints), `evaluation`, `serving` (checkpoints to answers).
`cli` only parses, calls and prints.
"""

import os

__version__ = "0.1.0"

# OpenMP's threads spin while they wait for each other. On shared cores, the time that they spin is missing elsewhere:
# benchmarks/shared_cores.py measures what the count costs there and on a quiet machine. libgomp reads the variable when
# torch is loaded. Servers' workers and torchrun's ranks inherit it.
if "GOMP_SPINCOUNT" not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
    os.environ["GOMP_SPINCOUNT"] = "10000"
