"""Checkpoints: their format, their storage on disk and in S3, and the search for the newest valid one."""
