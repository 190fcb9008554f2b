"""One optimizer step's forward and backward pass, on one device or many, in one pass or several micro-batches.

Every strategy gives the same gradient. The model returns its losses as sums, and these are divided by the counts of the
*global* batch, which are known before the first backward pass. A mean of the replicas' means would weight the tokens of
a small replica more.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from babybert.data.loader import Batch
from babybert.model.bert import keep_bf16_weights
from babybert.model.loss import IGNORED, LossSums, ObjectiveSums
from babybert.training.distributed import DistributedContext

Sums = TypeVar("Sums", bound=ObjectiveSums)


@overload
def forward_backward(
    model: nn.Module, batch: Batch, context: DistributedContext, micro_batches: int = 1
) -> LossSums: ...


@overload
def forward_backward(
    model: nn.Module, batch: Batch, context: DistributedContext, micro_batches: int, sums_class: type[Sums]
) -> Sums: ...


def forward_backward(
    model: nn.Module,
    batch: Batch,
    context: DistributedContext,
    micro_batches: int = 1,
    sums_class: type[ObjectiveSums] = LossSums,
) -> ObjectiveSums:
    """Add the gradient of the global batch's mean loss to the parameters.

    Args:
        model: a `PretrainingModel` or `ClassificationModel`, possibly wrapped by `DistributedContext.wrap`.
        batch: this rank's part of the global batch, on its device.
        micro_batches: the number of passes that `batch` is split into; more need less memory.
        sums_class: what the model returns the fields of.

    Returns:
        This rank's sums, detached.
    """
    mlm_count, label_count = _global_counts(batch, context)
    batches = batch.split(micro_batches)
    total: ObjectiveSums | None = None
    with keep_bf16_weights(model):
        for index, micro_batch in enumerate(batches):
            is_last = index == len(batches) - 1
            with _gradient_sync(model, is_last):
                with torch.autocast(context.device.type, torch.bfloat16, enabled=context.bf16):
                    sums = sums_class.of(model(*micro_batch))
                loss = sums.objective(mlm_count, label_count)
                # DistributedDataParallel averages the ranks' gradients; this makes the average a sum.
                (loss * context.world_size).backward()
            total = sums.detach() if total is None else total + sums.detach()
    assert total is not None, "a batch has at least one pair"
    return total


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients that are longer than `max_norm` down to it. Returns their norm before that.

    The result is that of PyTorch's `clip_grad_norm_`, which multiplies shorter gradients by 1. On a CPU this is one
    more pass over all parameters, so it is left out. On a GPU the comparison would make the host wait.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    is_short = norm.device.type == "cpu" and bool(norm < 0.999 * max_norm)
    if not is_short:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _global_counts(batch: Batch, context: DistributedContext) -> Tensor:
    """Masked positions and labelled pairs of the global batch (2,), each at least 1."""
    masked_positions = (batch.labels_BT != IGNORED).sum()
    labelled_pairs = (batch.is_next_B >= 0).sum()
    return context.all_reduce_sum(torch.stack([masked_positions, labelled_pairs])).clamp(min=1)


@contextlib.contextmanager
def _gradient_sync(model: nn.Module, is_last: bool) -> Iterator[None]:
    """Let DistributedDataParallel exchange gradients after the last micro-batch only."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not is_last:
        with model.no_sync():
            yield
    else:
        yield
