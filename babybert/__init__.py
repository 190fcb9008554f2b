"""BabyBERT: pretrain a small BERT from raw text, and serve it.

Read it in the order of the data: `data` (text to batches), `model` (batches to losses), `training` (losses to
checkpoints), `inference` (checkpoints to answers). `cli` only parses, calls and prints.
"""

import os

__version__ = "0.1.0"

# A thread that waits for the others spins, and two jobs on the same cores spin against each other: by OpenMP's own count each
# takes 20 times as long as alone, by this one about twice, and a job alone loses 1 or 2 %. It is read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
