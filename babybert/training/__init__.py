"""From batches to checkpoints: the loop, its schedule, parallel strategies, checkpoints, metrics, evaluation."""
