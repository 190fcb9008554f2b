"""The roofline of a training step: its operations and bytes divided by the rates that this machine reaches.

Only the unavoidable work is counted, one kind after the other, so a real step takes longer unless kinds of work
overlap.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from common import seconds_of

from babybert.config import ModelConfig

# Passes over the parameters in one step. Adam reads weight, gradient and two moments, and writes weight and moments.
ADAM_PASSES = 7
# Forward and backward each read the weights, and the gradient is written, read for its norm, and scaled.
OTHER_PASSES = 5


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second."""

    multiply_adds: float  # of a large matrix product
    exponentials: float
    bytes: float  # read and written by a large copy


def measure_rates(device: torch.device) -> Rates:
    """Measure the rates of a device, as medians of five."""
    on_cpu = device.type == "cpu"
    size = 2048 if on_cpu else 8192
    a = torch.randn(size, size, device=device)
    b = torch.randn(size, size, device=device)
    # On a CPU the exponentials are computed on a tensor that fits into a core's cache, many times over.
    exp_input = torch.randn(2**14 if on_cpu else 2**26, device=device)
    exp_output = torch.empty_like(exp_input)
    exp_rounds = 200 if on_cpu else 1
    copy_source = torch.randn(2**26, device=device)
    copy_target = torch.empty_like(copy_source)

    def exponentials() -> None:
        for _ in range(exp_rounds):
            torch.exp(exp_input, out=exp_output)

    exp_threads = torch.get_num_threads() if on_cpu else 1  # PyTorch uses one thread for a tensor this small
    return Rates(
        size**3 / _median_seconds(lambda: a @ b, device),
        exp_threads * exp_rounds * exp_input.numel() / _median_seconds(exponentials, device),
        2 * copy_source.nbytes / _median_seconds(lambda: copy_target.copy_(copy_source), device),
    )


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    def finished_work() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = [seconds_of(finished_work) for _ in range(6)]
    return median(times[1:])


def roofline_seconds(sizes: ModelConfig, tokens: float, masked: float, rates: Rates) -> dict[str, float]:
    """Seconds of a step by kind of work, for `tokens` tokens (padding excluded) and `masked` masked positions.

    The products are those of an implementation that stores neither logits nor hidden units, and computes them again
    in the backward.
    """
    head = masked * sizes.vocab_size * sizes.width * 4
    layer = tokens * (sizes.width * sizes.feed_forward * 7 + sizes.width**2 * 4 * 3)
    parameters = 2 * sizes.vocab_size * sizes.width + sizes.layers * 2 * sizes.width * sizes.feed_forward
    return {
        "products": (head + sizes.layers * layer) / rates.multiply_adds,
        "exponentials": 2 * masked * sizes.vocab_size / rates.exponentials,
        "bytes": 4 * parameters * (ADAM_PASSES + OTHER_PASSES) / rates.bytes,
    }


def flops_of_step(sizes: ModelConfig, tokens: float, masked: float, positions: int) -> float:
    """Operations of the products of a step of the plain model, for `tokens` tokens (padding excluded).

    All layers compute all tokens, forward and twice as much backward; the head computes the masked positions.
    """
    layer = sizes.width * (4 * sizes.width + 2 * sizes.feed_forward + 2 * positions)
    return 6 * (tokens * sizes.layers * layer + masked * sizes.vocab_size * sizes.width)
