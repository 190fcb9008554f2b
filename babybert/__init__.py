"""BabyBERT: pretrain a small BERT from raw text, and serve it.

Read it in the order of the data: `corpus` (raw text to documents), `data` (documents to batches), `model` (batches to
losses), `checkpoint` and `training` (losses to checkpoints), `evaluation`, `serving` (checkpoints to answers).
`cli` only parses, calls and prints.
"""

import os

__version__ = "0.1.0"

# OpenMP's threads spin while they wait for each other, and two jobs on the same cores spin against each other. With
# OpenMP's default count each job takes 20 times as long as alone; with this one about twice, and a job alone loses 1 to
# 2 %. The variable is read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
