"""Where a run computes: one device, all GPUs of one machine in one process, or a process for each GPU.

The strategy is picked, not configured: under `torchrun`, DistributedDataParallel (NCCL on GPUs, gloo on CPUs, one node
or several); else with several GPUs visible, `DataParallel`; else one device. `--parallel` overrides.

Whichever it is, a step has the same global batch, loss and gradient. Losses leave the model as sums, and are divided
by the counts of the *global* batch, which are known before the first backward: never a mean of means.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from babybert.data.loader import Batch
from babybert.errors import UsageError
from babybert.model.device import pick_device
from babybert.model.loss import IGNORED, LossSums

TIMEOUT = timedelta(minutes=30)  # the others wait while the first process validates, or fetches a checkpoint


@dataclass(frozen=True)
class DistributedContext:
    """One process' part in a run. With one process, what it asks of the others is answered by itself."""

    strategy: str
    device: torch.device
    bf16: bool
    rank: int = 0
    world: int = 1
    control: Any = None  # a gloo group for what the processes tell each other apart from gradients

    @property
    def is_main(self) -> bool:
        """Whether this process writes, prints and serves for all of them."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` on the device, wrapped as the strategy wants it. Its weights stay `model`'s own, and are then the first process'."""
        model.to(self.device)
        if self.strategy == "dp":
            return nn.DataParallel(model)
        if self.strategy == "ddp":
            return nn.parallel.DistributedDataParallel(
                model, device_ids=[self.device.index] if self.device.type == "cuda" else None
            )
        return model

    def sum(self, values: Tensor) -> Tensor:
        """The sum of this tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.world == 1:
            return flag
        up = torch.tensor([int(flag)])
        dist.all_reduce(up, dist.ReduceOp.MAX, group=self.control)
        return bool(up.item())

    def tell(self, thing: Any) -> Any:
        """What the first process has, to all of them."""
        if self.world == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, 0, group=self.control)
        return box[0]

    def seed_step(self, seed: int, step: int) -> None:
        """Make the dropout of a step a function of (seed, step, process, GPU): a resume has no random state to restore."""
        torch.manual_seed(_mixed(seed, step, self.rank, 0))
        if self.strategy == "dp":
            for number in range(torch.cuda.device_count()):
                with torch.cuda.device(number):
                    torch.cuda.manual_seed(_mixed(seed, step, self.rank, number))

    def describe(self) -> str:
        """A phrase for the log: the devices and the strategy."""
        precision = ", bf16" if self.bf16 else ""
        if self.device.type == "cpu":
            return (
                f"CPU, {torch.get_num_threads()} threads"
                + (f" each in {self.world} processes (DistributedDataParallel)" if self.world > 1 else "")
                + precision
            )
        count = {"single": 1, "dp": torch.cuda.device_count(), "ddp": self.world}[self.strategy]
        name = {"single": "", "dp": " (DataParallel)", "ddp": " (DistributedDataParallel)"}[self.strategy]
        return f"{count} x {torch.cuda.get_device_name(self.device)}{name}{precision}"


@contextlib.contextmanager
def start(strategy: str, device: str, precision: str) -> Iterator[DistributedContext]:
    """Take this process' part, and leave it at the end. Raises UsageError for what cannot be had here."""
    launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))
    if strategy == "ddp" and not launched:
        raise UsageError("--parallel ddp: start it with `torchrun --nproc-per-node N -m babybert.cli pretrain ...`")
    if launched and strategy not in ("auto", "ddp") and int(os.environ["WORLD_SIZE"]) > 1:
        raise UsageError(f"--parallel {strategy}: under torchrun with several processes it must be ddp, or auto")
    base = pick_device(device)
    bf16 = precision == "bf16" or (
        precision == "auto" and base.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    if strategy == "dp" and base.type == "cpu":
        raise UsageError("--parallel dp: DataParallel is of GPUs, and none is used here")
    if launched and strategy in ("auto", "ddp"):
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if base.type == "cuda" else base
        if own.type == "cuda":
            torch.cuda.set_device(own)
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=TIMEOUT)
        try:
            control = dist.new_group(backend="gloo", timeout=TIMEOUT)
            yield DistributedContext("ddp", own, bf16, dist.get_rank(), dist.get_world_size(), control)
        finally:
            dist.destroy_process_group()
        return
    several = base.type == "cuda" and torch.cuda.device_count() > 1
    yield DistributedContext("dp" if strategy == "dp" or (strategy == "auto" and several) else "single", base, bf16)


def backward(model: nn.Module, batch: Batch, parallel: DistributedContext, accumulate: int = 1) -> LossSums:
    """Add the gradient of the global batch's mean loss to the parameters, this process' `batch` in `accumulate` parts.

    Returns this process' sums. DistributedDataParallel averages gradients over processes, hence the factor.
    """
    counts = torch.stack([(batch.labels_BT != IGNORED).sum(), (batch.is_next_B >= 0).sum()])
    mlm_count, nsp_count = parallel.sum(counts).clamp(min=1)
    parts = batch.split(accumulate)
    totals = None
    for number, part in enumerate(parts, start=1):
        alone = isinstance(model, nn.parallel.DistributedDataParallel) and number < len(parts)
        with model.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            with torch.autocast(parallel.device.type, torch.bfloat16, enabled=parallel.bf16):
                own = LossSums.of(model(*part))
            ((own.mlm_sum / mlm_count + own.nsp_sum / nsp_count) * parallel.world).backward()
        totals = own.detach() if totals is None else totals + own.detach()
    assert totals is not None
    return totals


def _mixed(*numbers: int) -> int:
    """One seed of several numbers (FNV-1a, 64 bits)."""
    mixed = 0xCBF29CE484222325
    for number in numbers:
        for byte in number.to_bytes(8, "little"):
            mixed = (mixed ^ byte) * 0x100000001B3 % 2**64
    return mixed % 2**63
