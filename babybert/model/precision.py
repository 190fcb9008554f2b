"""Whether a model's encoder runs in bf16: the one rule for training, evaluation and the linear probe.

Servers and commands that answer once run in fp32. There a batch is one short text or a few. bf16 gains little on it, or
loses. And a product in bf16 may round a row differently in another batch, so that an answer would depend, by some
thousandths, on the requests that it shares a batch with.
"""

import logging

import torch

from babybert.model import ops
from babybert.model.bert import BabyBert

PRECISIONS = {False: "fp32", True: "bf16"}
EVALUATED_PAIRS = 64  # of a usual batch of an evaluation: results must not depend on --batch-size

logger = logging.getLogger(__name__)


def uses_bf16(precision: str, device: torch.device, width: int, pairs: int, kernels: ops.Kernels) -> bool:
    """Whether to use bf16 for a `precision` of "auto", "fp32" or "bf16".

    "auto" picks it where it was measured to be faster, for a model of this width and batches of so many pairs.
    """
    if precision == "auto":
        return ops.bf16_wins(device, width, pairs, kernels)
    return precision == "bf16"


def evaluates_in_bf16(precision: str, model: BabyBert, device: torch.device) -> bool:
    """Whether an evaluation of `model` on `device` runs in bf16; the log says it."""
    bf16 = uses_bf16(precision, device, model.config.width, EVALUATED_PAIRS, model.kernels)
    logger.info("encoder: %s, %s", device, PRECISIONS[bf16])
    return bf16
