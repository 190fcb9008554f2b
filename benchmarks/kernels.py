"""Time each kernel and PyTorch's operations, forward and backward, by width: what the limits in the kernels rest on.

    python benchmarks/kernels.py        # a minute on two cores

Both run at every width, also where `ops` would not pick the kernel. `x` is PyTorch's time divided by the kernel's.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babybert.model import plain_ops
from babybert.model.kernels import cpu_attention, cpu_dropout, cpu_feed_forward, cpu_narrow_head, cpu_wide_head
from babybert.model.kernels.chunked_head import ChunkedHeadLoss
from babybert.model.ops import draw_seed
from babybert.model.packing import PackedBatch

POSITIONS, MASKED, PAIRS, LENGTH = 1280, 190, 32, 40
DROPOUT = 0.1
CPU = torch.device("cpu")


def main() -> None:
    """Print a table for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--vocabulary", type=int, default=147_161)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, medians of {options.repeat}, in turns.")
    print(f"Widest that is picked, without and with dropout: head {cpu_narrow_head.WIDEST};")
    print(f"feed-forward {cpu_feed_forward.WIDEST}, {cpu_feed_forward.WIDEST_WITH_DROPOUT}; ", end="")
    print(f"attention {cpu_attention.WIDEST}, {cpu_attention.WIDEST_WITH_DROPOUT} (of a head)")
    for width in (10, 16, 32, 64):
        compare(f"head, width {width}", *head(width, options.vocabulary), options.repeat)
    wide_heads = ((64, options.vocabulary), (128, 8192), (128, options.vocabulary), (256, options.vocabulary))
    for width, vocabulary in wide_heads:
        compare(f"wide head, width {width}, {vocabulary:,} words", *wide_head(width, vocabulary), options.repeat)
    compare("head by chunks, width 256", *chunked_head(256, options.vocabulary), options.repeat)
    for width, units in ((10, 2048), (16, 2048), (32, 2048), (64, 256), (64, 2048)):
        for dropout_p in (DROPOUT, 0.0):
            title = f"feed-forward {width} -> {units}, dropout {dropout_p}"
            compare(title, *feed_forward(width, units, dropout_p), options.repeat)
    for heads, width in ((2, 5), (4, 16), (4, 32), (4, 64)):
        for dropout_p in (DROPOUT, 0.0):
            title = f"attention, {heads} heads of {width}, dropout {dropout_p}"
            compare(title, *attention(heads, width, dropout_p), options.repeat)
    for width in (10, 256):
        compare(f"dropout of {POSITIONS} x {width}", *dropout(width), options.repeat)


Work = Callable[[], Tensor]


def compare(title: str, kernel: Work, plain: Work, repeat: int) -> None:
    """Print the median milliseconds of both, which run in turns; the first turn, which compiles, is not counted."""
    kernel_times: list[float] = []
    torch_times: list[float] = []
    for turn in range(repeat + 1):
        for work, times in ((kernel, kernel_times), (plain, torch_times)):
            begin = time.perf_counter()
            work().sum().backward()
            if turn:
                times.append(1000 * (time.perf_counter() - begin))
    kernel_ms, torch_ms = statistics.median(kernel_times), statistics.median(torch_times)
    print(f"  {title:<46}{kernel_ms:>9.2f} ms   PyTorch {torch_ms:>9.2f} ms{torch_ms / kernel_ms:>8.1f} x", flush=True)


def _head_inputs(width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    leaves = torch.randn(MASKED, width), torch.randn(vocabulary, width) * width**-0.5, torch.randn(vocabulary)
    hidden, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    return hidden, weight, bias, torch.randint(0, vocabulary, (MASKED,))


def head(width: int, vocabulary: int) -> tuple[Work, Work]:
    """The vocabulary head of narrow models."""
    inputs = _head_inputs(width, vocabulary)
    return lambda: cpu_narrow_head.CpuNarrowHeadLoss.apply(*inputs, False)[
        0
    ], lambda: plain_ops.mlm_head_loss(*inputs).loss_sum


def wide_head(width: int, vocabulary: int) -> tuple[Work, Work]:
    """The vocabulary head of wide models."""
    inputs = _head_inputs(width, vocabulary)
    return lambda: cpu_wide_head.CpuWideHeadLoss.apply(*inputs, True)[
        0
    ], lambda: plain_ops.mlm_head_loss(*inputs).loss_sum


def chunked_head(width: int, vocabulary: int) -> tuple[Work, Work]:
    """The vocabulary head where no kernel is supported."""
    inputs = _head_inputs(width, vocabulary)
    return lambda: ChunkedHeadLoss.apply(*inputs, False, True)[0], lambda: plain_ops.mlm_head_loss(*inputs).loss_sum


def feed_forward(width: int, units: int, dropout_p: float) -> tuple[Work, Work]:
    """The feed-forward of a layer."""
    linear1, linear2 = nn.Linear(width, units), nn.Linear(units, width)
    x = torch.randn(POSITIONS, width, requires_grad=True)
    weights = linear1.weight, linear1.bias, linear2.weight, linear2.bias
    return (
        lambda: cpu_feed_forward.CpuFeedForward.apply(x, *weights, dropout_p, draw_seed(CPU)),
        lambda: plain_ops.feed_forward(x, linear1, linear2, dropout_p),
    )


def attention(heads: int, width: int, dropout_p: float) -> tuple[Work, Work]:
    """Attention of pairs between half and one and a half times the mean length."""
    lengths = torch.randint(LENGTH // 2, LENGTH * 3 // 2, (PAIRS,))
    mask_BT = torch.arange(int(lengths.max())) < lengths[:, None]
    packed = PackedBatch.from_mask(mask_BT)
    qkv = torch.randn(int(lengths.sum()), 3 * heads * width, requires_grad=True)
    padded = packed.unpack(qkv.detach()).requires_grad_()

    def plain() -> Tensor:
        q, k, v = padded.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BT[:, None, None], dropout_p=dropout_p)

    return lambda: cpu_attention.CpuAttention.apply(qkv, packed.cu_seqlens, heads, dropout_p, draw_seed(CPU)), plain


def dropout(width: int) -> tuple[Work, Work]:
    """Dropout by itself."""
    x = torch.randn(POSITIONS, width, requires_grad=True)
    return lambda: cpu_dropout.CpuDropout.apply(x, DROPOUT, draw_seed(CPU)), lambda: F.dropout(x, DROPOUT)


if __name__ == "__main__":
    main()
