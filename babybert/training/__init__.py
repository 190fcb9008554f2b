"""Pretraining: the loop, its steps, optimizer, learning-rate schedule, distributed strategies and metrics."""
