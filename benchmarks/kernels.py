"""Each kernel beside PyTorch's own operations, forward and backward, by width: what the choice between them rests on.

    python benchmarks/kernels.py        # a minute on two cores

Both run at every width, also where the kernel is not chosen. `x` is how many times as long PyTorch supports.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babybert.model.kernels import cpu_attention, cpu_dropout, cpu_feed_forward, cpu_head, cpu_wide_head
from babybert.model.layer import draw_seed
from babybert.model.mlm_head import ChunkedHeadLoss, plain_head_loss
from babybert.model.packing import PackedBatch

POSITIONS, MASKED, PAIRS, LENGTH, DROP = 1280, 190, 32, 40, 0.1
CPU = torch.device("cpu")


def main() -> None:
    """Print a table for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--vocabulary", type=int, default=147_161)
    options = parser.parse_args()
    print(
        f"{torch.get_num_threads()} threads, medians of {options.repeat}, in turns. Widest that is chosen, without and with dropout: head {cpu_head.WIDEST};"
    )
    print(f"feed-forward {cpu_feed_forward.WIDEST}, {cpu_feed_forward.WIDEST_WITH_DROPOUT}; ", end="")
    print(f"attention {cpu_attention.WIDEST}, {cpu_attention.WIDEST_WITH_DROPOUT} (of a head)")
    for width in (10, 16, 32, 64):
        compare(f"head, width {width}", *head(width, options.vocabulary), options.repeat)
    for width, vocabulary in (
        (64, options.vocabulary),
        (128, 8192),
        (128, options.vocabulary),
        (256, options.vocabulary),
    ):
        compare(f"wide head, width {width}, {vocabulary:,} words", *wide_head(width, vocabulary), options.repeat)
    compare("head by chunks, width 256", *chunked_head(256, options.vocabulary), options.repeat)
    for width, units in ((10, 2048), (16, 2048), (32, 2048), (64, 256), (64, 2048)):
        for drop in (DROP, 0.0):
            compare(
                f"feed-forward {width} -> {units}, dropout {drop}", *feed_forward(width, units, drop), options.repeat
            )
    for heads, width in ((2, 5), (4, 16), (4, 32), (4, 64)):
        for drop in (DROP, 0.0):
            compare(
                f"attention, {heads} heads of {width}, dropout {drop}", *attention(heads, width, drop), options.repeat
            )
    for width in (10, 256):
        compare(f"dropout of {POSITIONS} x {width}", *dropout(width), options.repeat)


Work = Callable[[], Tensor]


def compare(title: str, ours: Work, plain: Work, repeat: int) -> None:
    """Milliseconds of both, in turns."""
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for turn in range(repeat + 1):
        for name, work in (("ours", ours), ("plain", plain)):
            begin = time.perf_counter()
            work().sum().backward()
            if turn:
                times[name].append(1000 * (time.perf_counter() - begin))
    own, other = (statistics.median(taken) for taken in times.values())
    print(f"  {title:<46}{own:>9.2f} ms   PyTorch {other:>9.2f} ms{other / own:>8.1f} x", flush=True)


def _head_inputs(width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    leaves = torch.randn(MASKED, width), torch.randn(vocabulary, width) * width**-0.5, torch.randn(vocabulary)
    hidden, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    return hidden, weight, bias, torch.randint(0, vocabulary, (MASKED,))


def head(width: int, vocabulary: int) -> tuple[Work, Work]:
    """The vocabulary head."""
    inputs = _head_inputs(width, vocabulary)
    return lambda: cpu_head.CpuHeadLoss.apply(*inputs, False)[0], lambda: plain_head_loss(*inputs).loss_sum


def wide_head(width: int, vocabulary: int) -> tuple[Work, Work]:
    """The head of wide models."""
    inputs = _head_inputs(width, vocabulary)
    return lambda: cpu_wide_head.CpuWideHeadLoss.apply(*inputs, True)[0], lambda: plain_head_loss(*inputs).loss_sum


def chunked_head(width: int, vocabulary: int) -> tuple[Work, Work]:
    """The head where no kernel is made for it."""
    inputs = _head_inputs(width, vocabulary)
    return lambda: ChunkedHeadLoss.apply(*inputs, False, True)[0], lambda: plain_head_loss(*inputs).loss_sum


def feed_forward(width: int, units: int, drop: float) -> tuple[Work, Work]:
    """The feed-forward of a layer."""
    linear1, linear2, x = (
        nn.Linear(width, units),
        nn.Linear(units, width),
        torch.randn(POSITIONS, width, requires_grad=True),
    )
    weights = linear1.weight, linear1.bias, linear2.weight, linear2.bias
    return (
        lambda: cpu_feed_forward.CpuFeedForward.apply(x, *weights, drop, draw_seed(CPU)),
        lambda: linear2(F.dropout(F.relu(linear1(x)), drop)),
    )


def attention(heads: int, width: int, drop: float) -> tuple[Work, Work]:
    """Attention of pairs between half and one and a half times the mean length."""
    lengths = torch.randint(LENGTH // 2, LENGTH * 3 // 2, (PAIRS,))
    real_BT = torch.arange(int(lengths.max())) < lengths[:, None]
    rows = PackedBatch.of(real_BT)
    qkv = torch.randn(int(lengths.sum()), 3 * heads * width, requires_grad=True)
    padded = rows.pad(qkv.detach()).requires_grad_()

    def plain() -> Tensor:
        q, k, v = padded.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=real_BT[:, None, None], dropout_p=drop)

    return lambda: cpu_attention.CpuAttention.apply(qkv, rows.offsets, heads, drop, draw_seed(CPU)), plain


def dropout(width: int) -> tuple[Work, Work]:
    """Dropout by itself."""
    x = torch.randn(POSITIONS, width, requires_grad=True)
    return lambda: cpu_dropout.CpuDropout.apply(x, DROP, draw_seed(CPU)), lambda: F.dropout(x, DROP)


if __name__ == "__main__":
    main()
