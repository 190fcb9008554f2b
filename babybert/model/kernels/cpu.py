"""The CPU kernels for training, imported together: either all of them are available or none."""

from babybert.model.kernels import cpu_attention as attention
from babybert.model.kernels import cpu_bf16_encoder as bf16_encoder
from babybert.model.kernels import cpu_bf16_head as bf16_head
from babybert.model.kernels import cpu_dropout as dropout
from babybert.model.kernels import cpu_feed_forward as feed_forward
from babybert.model.kernels import cpu_narrow_head as narrow_head
from babybert.model.kernels import cpu_wide_head as wide_head

__all__ = ["attention", "bf16_encoder", "bf16_head", "dropout", "feed_forward", "narrow_head", "wide_head"]
