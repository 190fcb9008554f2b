"""Whether the Triton kernels are correct: values and gradients next to float64 and to PyTorch's operations.

`gpu.py` runs this on a GPU, and `gpu.py --rehearse` a few small cases in Triton's interpreter.

Shapes: N rows, D width, V vocabulary, F hidden units.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from generated_batches import generated_batch
from torch import Tensor

from babybert.config import model_config
from babybert.model import ops, plain_ops
from babybert.model.bert import BabyBert
from babybert.model.kernels import triton_feed_forward, triton_head
from babybert.model.loss import LossSums, PretrainingModel

Row = dict[str, Any]
triton_loss: Any = triton_head.TritonHeadLoss.apply
triton_units: Any = triton_feed_forward.TritonFeedForward.apply
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 2e-5, "bf16": 1e-2}  # of the largest number of a tensor
TIMES_PLAIN = 3.0  # or so many times the error of PyTorch's operations in the same precision
HEADS = ((190, 10, 147_161), (1300, 10, 147_161), (1, 64, 301), (65, 17, 8192), (700, 64, 8192), (190, 256, 8192))
FEED_FORWARDS = ((1280, 10, 2048), (65, 17, 130), (1280, 64, 128), (1280, 128, 512), (640, 256, 1024))
SMALL_HEADS, SMALL_FEED_FORWARDS = ((65, 10, 301), (7, 64, 130)), ((33, 10, 70),)
DROPOUTS = (0.0, 0.1)


def checks(name: str, device: torch.device, small: bool) -> Iterator[Row]:
    """The rows of one kernel, "head" or "feed-forward", or those of whole models, "model"."""
    for precision, dtype in DTYPES.items():
        if name == "head":
            for shape in SMALL_HEADS if small else HEADS:
                yield _guarded(name, f"{shape}", precision, partial(_head, *shape, dtype, device))
        elif name == "feed-forward":
            for shape, dropout_p in itertools.product(SMALL_FEED_FORWARDS if small else FEED_FORWARDS, DROPOUTS):
                errors = partial(_feed_forward, *shape, dropout_p, dtype, device)
                yield _guarded(name, f"{shape}, dropout {dropout_p}", precision, errors)
        else:
            for preset in ("baby",) if small else ("baby", "tiny", "mini"):
                yield _guarded(name, preset, precision, partial(_model, preset, precision, device, small))


def _guarded(name: str, shape: str, precision: str, errors: Callable[[], tuple[float, float]]) -> Row:
    """A row with both errors, or with what was raised instead."""
    row: Row = {"part": "checks", "kernel": name, "shape": shape, "precision": precision}
    try:
        error, plain_error = errors()
    except Exception as problem:  # whatever a compiler or a driver raises belongs into the report
        return {**row, "passed": False, "problem": f"{type(problem).__name__}: {problem}"[:500]}
    limit = max(TOLERANCE[precision], TIMES_PLAIN * plain_error)
    return {**row, "error": error, "plain_error": plain_error, "limit": limit, "passed": error <= limit}


def _value_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor], d_output: Tensor) -> list[Tensor]:
    """The function's value and the gradients of its inputs, in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    value.backward(d_output.to(value))
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == len(leaves), "an input has no gradient"
    return [x.detach().double() for x in (value, *gradients)]


def _difference(ones: list[Tensor], others: list[Tensor], floor: float = 1.0) -> float:
    """The largest difference, relative to the largest number of its tensor or to `floor`; infinite if not finite."""
    worst = 0.0
    for one, other in zip(ones, others, strict=True):
        if not bool(torch.isfinite(one).all()):
            return float("inf")
        size = max(floor, float(other.abs().amax()) if other.numel() else 0.0)
        worst = max(worst, float((one - other).abs().amax()) / size if one.numel() else 0.0)
    return worst


def _head(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """The errors of the vocabulary head and of its plain form; about a third of the rows have no target."""
    torch.manual_seed(0)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[1:][torch.rand(rows - 1) < 0.3] = plain_ops.NO_TARGET
    tensors = torch.randn(rows, width), torch.randn(vocabulary, width) * width**-0.5, torch.randn(vocabulary)
    targets, inputs = targets.to(device), [x.to(device, dtype) for x in tensors]
    d_loss = torch.tensor(-0.3)

    def plain_loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return plain_ops.mlm_head_loss(hidden, weight, bias, targets).loss_sum

    ours = _value_and_gradients(lambda *x: triton_loss(*x, targets, False)[0], inputs, d_loss)
    plain, exact = (_value_and_gradients(plain_loss, x, d_loss) for x in (inputs, [x.double() for x in inputs]))
    hidden, weight, bias = (x.double() for x in inputs)
    exact_ranks = plain_ops.mlm_head_loss(hidden, weight, bias, targets, True).rank_N
    _, ranks = triton_loss(*inputs, targets, True)
    allowed = 3 + vocabulary // 20_000  # logits that are nearly equal may change places
    if int((ranks - exact_ranks).abs().amax()) > allowed:
        raise ValueError(f"a rank differs by {int((ranks - exact_ranks).abs().amax())}, at most {allowed} is allowed")
    return _difference(ours, exact), _difference(plain, exact)


def _feed_forward(
    rows: int, width: int, units: int, dropout_p: float, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """The errors of the feed-forward and of its plain form, with the kernel's own dropout mask."""
    torch.manual_seed(0)
    # Eighths and odd 128ths: what goes into the relu is exact and never 0, so that its derivative is certain.
    x, weight1 = torch.randint(-8, 9, (rows, width)) / 8, torch.randint(-8, 9, (units, width)) / 8
    bias1 = (2 * torch.randint(-64, 64, (units,)) + 1) / 128
    tensors = x, weight1, bias1, torch.randn(width, units) * units**-0.5, torch.randn(width)
    inputs = [tensor.to(device, dtype) for tensor in tensors]
    d_y, seed_2 = torch.randn(rows, width).to(device, dtype), torch.tensor([7, 2**32 - 5], device=device)
    factor = _dropout_factors(rows, width, units, dropout_p, seed_2)
    share = float((factor > 0).double().mean())
    if abs(share - (1 - dropout_p)) > 5 * (0.25 / factor.numel()) ** 0.5:
        raise ValueError(f"dropout keeps a share of {share:.4f}, not {1 - dropout_p}")

    def plain(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        return (torch.relu(x @ weight1.T + bias1) * factor.to(x.dtype)) @ weight2.T + bias2

    ours = _value_and_gradients(lambda *tensors: triton_units(*tensors, dropout_p, seed_2), inputs, d_y)
    exact = _value_and_gradients(plain, [tensor.double() for tensor in inputs], d_y)
    return _difference(ours, exact), _difference(_value_and_gradients(plain, inputs, d_y), exact)


def _dropout_factors(rows: int, width: int, units: int, dropout_p: float, seed_2: Tensor) -> Tensor:
    """What the kernel multiplies each unit with, (N, F): 0 or 1 / (1 - p). Each pass reads `width` units out."""
    device = seed_2.device
    x, weight1 = torch.zeros(rows, width, device=device), torch.zeros(units, width, device=device)
    factors = torch.empty(rows, units, device=device)
    for first in range(0, units, width):
        columns = torch.arange(first, min(first + width, units), device=device)
        weight2 = torch.zeros(width, units, device=device)
        weight2[columns - first, columns] = 1
        ones, zeros = torch.ones(units, device=device), torch.zeros(width, device=device)
        y = triton_units(x, weight1, ones, weight2, zeros, dropout_p, seed_2)
        factors[:, columns] = y[:, : len(columns)]
    return factors


def _model(preset: str, precision: str, device: torch.device, small: bool) -> tuple[float, float]:
    """The errors of a whole model's losses and gradients, with the Triton kernels and with PyTorch's operations.

    Without a GPU there are no Triton kernels in a model, and the kernels for the CPU are checked.
    """
    vocabulary = 301 if small else 30_522
    batch = generated_batch(8, 32, vocabulary, device)

    def losses_and_gradients(kernels: ops.Kernels, dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        torch.manual_seed(0)
        bert = BabyBert(model_config(preset, vocabulary, dropout=0.0)).set_kernels(kernels).to(device, dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            sums = LossSums.of(PretrainingModel(bert)(*batch))
        sums.loss.backward()
        gradients = [p.grad for p in bert.parameters() if p.grad is not None]
        return [x.detach().double() for x in (sums.loss, *gradients)]

    exact = losses_and_gradients("plain", torch.float64, False)
    kernels: ops.Kernels = "triton" if device.type == "cuda" else "auto"
    ours, plain = (losses_and_gradients(name, torch.float32, precision == "bf16") for name in (kernels, "plain"))
    floor = 0.01 * max(float(x.abs().amax()) for x in exact[1:])  # some gradients are zero but for rounding
    return _difference(ours, exact, floor), _difference(plain, exact, floor)
