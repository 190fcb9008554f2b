"""The measurements of `gpu.py`: training steps, kernels by themselves, and a share of an epoch."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import TrainingStep, preset_config
from generated_batches import generated_batch
from torch import Tensor, nn

from babybert.data.dataset import Dataset, open_dataset
from babybert.data.loader import Batch
from babybert.model import ops, plain_ops
from babybert.model.bert import BabyBert
from babybert.model.kernels.chunked_head import ChunkedHeadLoss
from babybert.training.setup import make_loader

Row = dict[str, Any]
chunked_loss: Any = ChunkedHeadLoss.apply
Kernels = ops.Kernels
REFERENCE_VOCABULARY, WORDPIECE_VOCABULARY, SMALL_VOCABULARY = 147_161, 8192, 301
NARROW = ("baby", "tiny")  # measured with the reference's vocabulary, and with the Triton kernels
SHAPES = ((64, 64), (32, 128), (512, 64))  # pairs x positions of a batch
PRECISIONS = ("fp32", "bf16")
BATCHES = 4  # different batches, which take turns
ROUND_SECONDS = 0.3
EPOCH_SECONDS = 12.0  # most of an epoch that is measured, for each variant
HEADS = tuple((190, width, vocabulary) for width in (10, 32, 64, 128, 256) for vocabulary in (8192, 147_161))
FEED_FORWARDS = ((1280, 10, 2048), (1280, 64, 128), (1280, 64, 2048), (1280, 128, 512), (1280, 256, 1024))
DROPOUT = 0.1


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _seconds(device: torch.device, work: Callable[[], object], times: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    _wait(device)
    return (time.perf_counter() - start) / times


def _median_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of one call: the median of three rounds, after calls that compile and warm up."""
    work()
    once = _seconds(device, work, 2)
    times = max(1, min(300, int(ROUND_SECONDS / once)))
    return statistics.median(_seconds(device, work, times) for _ in range(3))


def _vocabulary(preset: str, small: bool) -> int:
    if small:
        return SMALL_VOCABULARY
    return REFERENCE_VOCABULARY if preset in NARROW else WORDPIECE_VOCABULARY


def _training_step(
    preset: str, vocabulary: int, pairs: int, kernels: Kernels, precision: str, device: torch.device
) -> TrainingStep:
    config = preset_config(
        Path("generated"), preset, device=device.type, kernels=kernels, precision=precision, batch_size=pairs
    )
    torch.manual_seed(0)
    bert = BabyBert(config.sizes(vocabulary)).set_kernels(kernels).to(device)
    return TrainingStep.of(bert, config, device)


def steps(preset: str, kernels: Kernels, compiled: bool, device: torch.device, small: bool) -> Iterator[Row]:
    """Time and memory of training steps of one preset, by shape and precision. The optimizer is part of a step."""
    vocabulary = _vocabulary(preset, small)
    for precision in PRECISIONS[::-1] if compiled else PRECISIONS:
        for pairs, positions in ((4, 16),) if small else SHAPES:
            batches = [generated_batch(pairs, positions, vocabulary, device, seed) for seed in range(BATCHES)]
            row = {
                "part": "steps",
                "preset": preset,
                "batch": f"{pairs} x {positions}",
                "vocabulary": vocabulary,
                "kernels": f"{kernels}, compiled" if compiled else kernels,
                "precision": precision,
            }
            try:
                step = _training_step(preset, vocabulary, pairs, kernels, precision, device)
                if compiled:
                    step.model.compile(dynamic=True)
                yield {**row, **_measure_step(step, batches, device)}
            except Exception as problem:  # whatever a compiler or a driver raises belongs into the report
                yield {**row, "problem": f"{type(problem).__name__}: {problem}"[:500]}


def _measure_step(step: TrainingStep, batches: list[Batch], device: torch.device) -> Row:
    first_seconds = _seconds(device, lambda: step(batches[0]), 1)

    def round_of_steps() -> None:
        for batch in batches:
            step(batch)

    round_of_steps()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _median_seconds(device, round_of_steps) / len(batches)
    tokens = statistics.fmean(int((batch.ids_BT > 0).sum()) for batch in batches)
    return {
        "step_ms": 1000 * seconds,
        "pairs_per_second": len(batches[0].is_next_B) / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "first_step_s": first_seconds,
        "host_waits": _host_waits(step, batches[0]) if device.type == "cuda" else None,
    }


def _host_waits(step: TrainingStep, batch: Batch) -> bool:
    """Whether the host waits for the GPU within a step."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def kernels(name: str, device: torch.device, small: bool) -> Iterator[Row]:
    """Each Triton kernel next to PyTorch's operations, forward and backward, by shape and precision."""
    make = _head if name == "head" else _feed_forward
    shapes: tuple[tuple[int, int, int], ...] = HEADS if name == "head" else FEED_FORWARDS
    for shape in ((7, 16, 40),) if small else shapes:
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            row: Row = {"part": "kernels", "kernel": name, "shape": f"{shape}", "precision": precision}
            try:
                works = make(*shape, dtype, device)
                row["ms"] = {
                    variant: 1000 * _median_seconds(device, partial(_forward_backward, work))
                    for variant, work in works.items()
                }
            except Exception as problem:  # as in `steps`
                row["problem"] = f"{type(problem).__name__}: {problem}"[:500]
            yield row


Work = Callable[[], Tensor]


def _forward_backward(work: Work) -> None:
    work().sum().backward()


def _head(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> dict[str, Work]:
    from babybert.model.kernels.triton_head import TritonHeadLoss

    triton: Any = TritonHeadLoss.apply
    tensors = torch.randn(rows, width), torch.randn(vocabulary, width) * width**-0.5, torch.randn(vocabulary)
    hidden, weight, bias = (x.to(device).requires_grad_() for x in tensors)
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    bf16 = dtype == torch.bfloat16

    def plain() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return plain_ops.mlm_head_loss(hidden, weight, bias, targets).loss_sum

    def chunked() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss_sum: Tensor = chunked_loss(hidden, weight, bias, targets, False, True)[0]
            return loss_sum

    return {
        "plain": plain,
        "chunked": chunked,
        "triton": lambda: triton(hidden.to(dtype), weight, bias, targets, False)[0],
    }


def _feed_forward(rows: int, width: int, units: int, dtype: torch.dtype, device: torch.device) -> dict[str, Work]:
    from babybert.model.kernels.triton_feed_forward import TritonFeedForward

    triton: Any = TritonFeedForward.apply
    linear1, linear2 = nn.Linear(width, units).to(device), nn.Linear(units, width).to(device)
    x = torch.randn(rows, width, device=device, requires_grad=True)
    weights = linear1.weight, linear1.bias, linear2.weight, linear2.bias

    def plain() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return plain_ops.feed_forward(x, linear1, linear2, DROPOUT)

    return {
        "plain": plain,
        "triton": lambda: triton(x.to(dtype), *weights, DROPOUT, ops.draw_seed(device)),
    }


def epoch(preset: str, kernels: Kernels, data: Path | None, device: torch.device, small: bool) -> Iterator[Row]:
    """Training on prepared data for some seconds, as `babybert pretrain` does it. The default is generated reviews."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = open_dataset(data or _prepare_generated(Path(folder)))
        yield _measure_epoch(dataset, "prepared" if data else "generated reviews", preset, kernels, device, small)


def _prepare_generated(folder: Path) -> Path:
    arguments = ["prepare", "--corpus", "demo", "--out", str(folder / "data")]
    subprocess.run([sys.executable, "-m", "babybert.cli", *arguments], check=True, capture_output=True)
    return folder / "data"


def _measure_epoch(
    dataset: Dataset, data: str, preset: str, kernels: Kernels, device: torch.device, small: bool
) -> Row:
    pairs = 8 if small else 512 if preset in NARROW else 64
    limit = 1.0 if small else EPOCH_SECONDS
    config = preset_config(Path(data), preset, device=device.type, kernels=kernels, batch_size=pairs)
    train = dataset.examples("train")
    loader = make_loader(config, train, dataset.tokenizer, device)
    torch.manual_seed(0)
    bert = BabyBert(config.sizes(dataset.tokenizer.size)).set_kernels(kernels).to(device)
    step = TrainingStep.of(bert, config, device)
    for _, batch in zip(range(3), loader.epoch(0), strict=False):
        step(batch.to(device))
    _wait(device)
    start, done = time.perf_counter(), 0
    for number, batch in enumerate(loader.epoch(0)):
        step(batch.to(device))
        done += len(batch.is_next_B)
        if number % 20 == 19:
            _wait(device)
        if time.perf_counter() - start > limit:
            break
    _wait(device)
    seconds = time.perf_counter() - start
    return {
        "part": "epoch",
        "preset": preset,
        "kernels": kernels,
        "data": data,
        "batch": pairs,
        "pairs_of_epoch": len(train),
        "pairs_done": done,
        "pairs_per_second": done / seconds,
        "epoch_s": len(train) * seconds / done,
    }
