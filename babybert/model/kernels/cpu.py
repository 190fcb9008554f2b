"""The CPU kernels under one name, so that they are there together or not at all."""

from babybert.model.kernels import cpu_attention as attention
from babybert.model.kernels import cpu_dropout as dropout
from babybert.model.kernels import cpu_feed_forward as feed_forward
from babybert.model.kernels import cpu_head as head
from babybert.model.kernels import cpu_wide_head as wide_head

__all__ = ["attention", "dropout", "feed_forward", "head", "wide_head"]
