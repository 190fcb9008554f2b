"""BabyBERT: pretrain a small BERT from raw text, and serve it.

Read it in the order of the data: `data` (text to batches), `model` (batches to losses), `training` (losses to
checkpoints), `inference` (checkpoints to answers). `cli` only parses, calls and prints.
"""

__version__ = "0.1.0"
