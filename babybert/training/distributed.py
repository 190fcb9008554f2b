"""Where a run computes: on one device, on all GPUs of a machine in one process, or in one process per GPU.

The strategy is picked, not configured. Under `torchrun` it is DistributedDataParallel (NCCL on GPUs, gloo on CPUs, one
node or several); else `DataParallel` if several GPUs are visible; else one device. `--parallel` overrides this.

A step has the same global batch, loss and gradient with every strategy (see `step.py`).
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from babybert.errors import UsageError
from babybert.model import ops
from babybert.model.device import pick_device
from babybert.model.precision import uses_bf16

TIMEOUT = timedelta(minutes=30)  # other ranks wait while rank 0 validates or downloads a checkpoint
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")


@dataclass(frozen=True)
class DistributedContext:
    """One process's part in a run. In a single process, every collective operation returns its input."""

    strategy: str  # "single", "dp" or "ddp"
    device: torch.device
    bf16: bool  # whether the forward pass runs under bf16 autocast
    rank: int = 0
    world_size: int = 1
    control_group: Any = None  # a gloo group for everything except gradients, which works on the CPU

    @property
    def is_main(self) -> bool:
        """Whether this process logs, saves and serves metrics for all of them."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` on the device, wrapped for the strategy. Parameters are shared with `model`, and equal rank 0's."""
        model.to(self.device)
        if self.strategy == "dp":
            return nn.DataParallel(model)
        if self.strategy == "ddp":
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=device_ids)
        return model

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of this tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.world_size == 1:
            return flag
        flag_tensor = torch.tensor([int(flag)])
        dist.all_reduce(flag_tensor, dist.ReduceOp.MAX, group=self.control_group)
        return bool(flag_tensor.item())

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`, on all ranks."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, group=self.control_group)
        return values[0]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.broadcast_object(None)

    def seed_step(self, seed: int, step: int) -> None:
        """Make a step's dropout a function of (seed, step, rank, GPU), so that a resume restores no random state."""
        torch.manual_seed(_mix_seeds(seed, step, self.rank, 0))
        if self.strategy == "dp":
            for gpu in range(torch.cuda.device_count()):
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(_mix_seeds(seed, step, self.rank, gpu))

    def describe(self) -> str:
        """The devices and the strategy, for the log."""
        precision = ", bf16" if self.bf16 else ", fp32"
        if self.device.type == "cpu":
            processes = f" each in {self.world_size} processes (DistributedDataParallel)" if self.world_size > 1 else ""
            return f"CPU, {torch.get_num_threads()} threads{processes}{precision}"
        counts = {"single": 1, "dp": torch.cuda.device_count(), "ddp": self.world_size}
        names = {"single": "", "dp": " (DataParallel)", "ddp": " (DistributedDataParallel)"}
        gpu_name = torch.cuda.get_device_name(self.device)
        return f"{counts[self.strategy]} x {gpu_name}{names[self.strategy]}{precision}"

    def facts(self) -> dict[str, Any]:
        """What the bits of a step depend on in addition to the settings, as a checkpoint records it."""
        replicas = torch.cuda.device_count() if self.strategy == "dp" else self.world_size
        facts = {
            "parallel": self.strategy if replicas > 1 else "single",
            "world_size": replicas,
            "precision": "bf16" if self.bf16 else "fp32",
            "torch": str(torch.__version__),
        }
        if self.device.type == "cpu":
            capability = torch.backends.cpu.get_cpu_capability()
            return {**facts, "device": f"CPU ({capability})", "threads": torch.get_num_threads()}
        return {**facts, "device": torch.cuda.get_device_name(self.device)}


@contextlib.contextmanager
def start_distributed(
    strategy: str,
    device: Literal["auto", "cpu", "cuda"],
    precision: str,
    width: int,
    pairs: int,
    kernels: ops.Kernels = "auto",
) -> Iterator[DistributedContext]:
    """Join the run, and leave it at the end. Raises UsageError for what is not available here.

    Args:
        strategy: "auto", "single", "dp" or "ddp".
        device: "auto", "cpu" or "cuda".
        precision: "auto", "fp32" or "bf16".
        width: of the model. "auto" depends on it.
        pairs: of a micro-batch. "auto" depends on it.
        kernels: "auto" depends on them as well.
    """
    launched = all(name in os.environ for name in TORCHRUN_VARIABLES)
    _check_strategy(strategy, launched)
    base_device = pick_device(device)
    on_gpu = base_device.type == "cuda"
    bf16 = uses_bf16(precision, base_device, width, pairs, kernels)
    if strategy == "dp" and not on_gpu:
        raise UsageError("--parallel dp: DataParallel needs GPUs, and none is used here")
    if launched and strategy in ("auto", "ddp"):
        with _process_group(base_device, bf16) as context:
            yield context
    else:
        use_all_gpus = strategy == "dp" or (strategy == "auto" and on_gpu and torch.cuda.device_count() > 1)
        yield DistributedContext("dp" if use_all_gpus else "single", base_device, bf16)


def _check_strategy(strategy: str, launched: bool) -> None:
    """Raise UsageError if the strategy does not fit the way this process was started."""
    if strategy == "ddp" and not launched:
        raise UsageError("--parallel ddp: start it with `torchrun --nproc-per-node N -m babybert.cli pretrain ...`")
    if launched and strategy not in ("auto", "ddp") and int(os.environ["WORLD_SIZE"]) > 1:
        raise UsageError(f"--parallel {strategy}: under torchrun with several processes it must be ddp or auto")


@contextlib.contextmanager
def _process_group(base_device: torch.device, bf16: bool) -> Iterator[DistributedContext]:
    """This process as one rank of a `torchrun` job."""
    device, backend = base_device, "gloo"
    if base_device.type == "cuda":
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        control_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        yield DistributedContext("ddp", device, bf16, dist.get_rank(), dist.get_world_size(), control_group)
    finally:
        dist.destroy_process_group()


def _mix_seeds(*numbers: int) -> int:
    """One 63-bit seed from several numbers (FNV-1a; Fowler, Noll and Vo, 1991)."""
    mixed = 0xCBF29CE484222325
    for number in numbers:
        for byte in number.to_bytes(8, "little"):
            mixed = (mixed ^ byte) * 0x100000001B3 % 2**64
    return mixed % 2**63
