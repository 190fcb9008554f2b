"""How fast a training step could be at best on this machine: its operations and bytes, over rates measured here and now."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from babybert.config import ModelConfig

UPDATES = 7  # passes over the parameters of an Adam step: weight, gradient and two moments read, the weight and the moments written
OTHERS = 5  # and of the rest of a step: read by forward and backward, gradient written, read for its norm, scaled


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second."""

    multiply_adds: float  # of a large matrix product
    exponentials: float
    bytes: float  # read and written, of a large copy


def measure_rates(device: torch.device) -> Rates:
    """Medians of five."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    small = torch.randn(
        2**14 if device.type == "cpu" else 2**26, device=device
    )  # on a CPU, what stays in a core's cache
    large = torch.randn(2**26, device=device)
    target, rounds = torch.empty_like(large), 200 if device.type == "cpu" else 1
    out = torch.empty_like(small)

    def exponentials() -> None:
        for _ in range(rounds):
            torch.exp(small, out=out)

    threads = torch.get_num_threads() if device.type == "cpu" else 1  # so small a tensor is one thread's
    return Rates(
        size**3 / _seconds(lambda: a @ b, device),
        threads * rounds * small.numel() / _seconds(exponentials, device),
        2 * large.nbytes / _seconds(lambda: target.copy_(large), device),
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return median(times[1:])


def floor_seconds(sizes: ModelConfig, tokens: float, masked: float, rates: Rates) -> dict[str, float]:
    """Seconds of a step by kind of work, for so many real tokens and masked positions, one kind after the other.

    Products are those of a form that keeps neither logits nor hidden units: one more of each in the backward.
    """
    head = masked * sizes.vocab_size * sizes.width * 4
    layer = tokens * (sizes.width * sizes.feed_forward * 7 + sizes.width**2 * 4 * 3)
    parameters = 2 * sizes.vocab_size * sizes.width + sizes.layers * 2 * sizes.width * sizes.feed_forward
    return {
        "products": (head + sizes.layers * layer) / rates.multiply_adds,
        "exponentials": 2 * masked * sizes.vocab_size / rates.exponentials,
        "bytes": 4 * parameters * (UPDATES + OTHERS) / rates.bytes,
    }
