"""The operations that have several implementations, and the only place that picks one.

Each operation has a plain form in PyTorch (`plain_ops.py`), the oracle of the tests, and kernels (`kernels/`) that are
faster for some devices, dtypes and shapes. A `..._candidates` function lists an operation's implementations, the
preferred one first, each with its requirements. `pick` takes the first whose requirements are all met.

`kernels` says which implementations may be picked:

- "auto": those that were measured to be faster. On a CPU: the numba kernels. On a GPU: PyTorch's operations and the
  chunked vocabulary head, and for narrow models the Triton kernels (see `triton_policy.py`).
- "triton": as "auto", and on a GPU the Triton kernels for all widths that they support.
- "plain": PyTorch's operations alone.

Shapes: B pairs, T positions, N packed tokens or masked positions, D width, V vocabulary, K candidates, X targets.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babybert.errors import UsageError
from babybert.model import plain_ops
from babybert.model.bf16_weights import Bf16Weights
from babybert.model.device import has_fast_bf16
from babybert.model.kernels import Requirements
from babybert.model.kernels.chunked_head import ChunkedHeadLoss
from babybert.model.packing import PackedBatch
from babybert.model.plain_ops import NO_TARGET, HeadLoss
from babybert.model.triton_policy import uses_triton

Kernels = Literal["auto", "plain", "triton"]
Candidates = dict[str, Requirements]  # implementations of one operation by name, the preferred first
TORCH = "torch"  # the plain form; the other implementations have the name of their module in `kernels/`
CompiledTopTokens = Callable[[Tensor, int], tuple[np.ndarray, np.ndarray, np.ndarray]]

logger = logging.getLogger(__name__)


def pick(candidates: Candidates) -> str:
    """The first implementation whose requirements are all met; the last has none."""
    return next(name for name, requirements in candidates.items() if all(requirements.values()))


def check_available(kernels: Kernels) -> None:
    """Raise UsageError if the kernels that are asked for cannot run on this machine."""
    assert kernels in get_args(Kernels), kernels
    if kernels == "triton" and not torch.cuda.is_available():
        raise UsageError("--kernels triton: no GPU is visible to PyTorch; use --kernels auto")
    if kernels == "triton" and importlib.util.find_spec("triton") is None:
        raise UsageError("--kernels triton: Triton is not installed; install it, or use --kernels auto")


@functools.cache
def _load_cpu_kernels(name: str) -> ModuleType | None:
    """A module of `kernels/` that needs numba, or None with a warning where numba is not installed."""
    try:
        return importlib.import_module(f"babybert.model.kernels.{name}")
    except ImportError as error:
        logger.warning("no CPU kernels (%s): PyTorch's own operations are used, which are slower", error)
        return None


def _cpu_kernels(device: torch.device, kernels: Kernels) -> Any:
    return _load_cpu_kernels("cpu") if device.type == "cpu" and kernels != "plain" else None


def _triton_kernels(name: str, x: Tensor, kernels: Kernels) -> Any:
    """A module of Triton kernels if they should be used for such an input (..., D), else None."""
    is_used = uses_triton(x.device, x.shape[-1], kernels)
    return importlib.import_module(f"babybert.model.kernels.{name}") if is_used else None


def _as_autocast(x: Tensor) -> Tensor:
    """Cast `x` as autocast casts inputs of matrix products. Autocast does not do it for custom autograd functions."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def draw_seed(device: torch.device) -> Tensor:
    """Two numbers below 2^32 from PyTorch's generator of the device: the seed of one call of a kernel's dropout.

    The seed of a run therefore decides its dropout, whichever implementation is picked.
    """
    return torch.randint(0, 2**32, (2,), device=device)


def packs_tokens(device: torch.device, kernels: Kernels) -> bool:
    """Whether the encoder should run on packed tokens: where there are CPU kernels.

    On a GPU a batch stays padded: the host would have to wait for the number of tokens.
    """
    return _cpu_kernels(device, kernels) is not None


def bf16_wins(device: torch.device, width: int, pairs: int, kernels: Kernels) -> bool:
    """Whether training in bf16, with micro-batches of so many pairs, was measured to be faster than in fp32."""
    if not has_fast_bf16(device) or device.type == "cuda":
        return has_fast_bf16(device)
    cpu = _cpu_kernels(device, kernels)
    return cpu is not None and width >= cpu.bf16_encoder.NARROWEST and pairs >= cpu.bf16_encoder.FEWEST_PAIRS


def encoder_candidates(x_ND: Tensor, kernels: Kernels = "auto") -> Candidates:
    """The implementations of the encoder for packed tokens; the plain one is the layers' `forward_packed`."""
    candidates: Candidates = {}
    if cpu := _cpu_kernels(x_ND.device, kernels):
        candidates["cpu_bf16_encoder"] = cpu.bf16_encoder.requirements(x_ND)
    return {**candidates, TORCH: {}}


def encoder(
    x_ND: Tensor,
    packed: PackedBatch,
    query_M: Tensor | None,
    layers: Sequence[Any],
    last_norm: nn.LayerNorm,
    weights: Bf16Weights | None = None,
    kernels: Kernels = "auto",
) -> Tensor:
    """Hidden states of packed embeddings (N, D) after all layers and the last norm, or those of rows `query_M` alone.

    `layers` are `EncoderLayer`s. Each row is asked for at most once. `cpu_bf16_encoder` returns bf16.
    """
    if pick(encoder_candidates(x_ND, kernels)) == TORCH:
        for layer in layers:
            x_ND = layer.forward_packed(x_ND, packed, query_M if layer is layers[-1] else None)
        return last_norm(x_ND)
    cpu, first = _cpu_kernels(x_ND.device, kernels), layers[0]
    sizes = first.self_attn.num_heads, first.norm_first, first.activation_name
    shape = cpu.bf16_encoder.EncoderShape(*sizes, first.dropout.p if first.training else 0.0)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    inputs = x_ND.float(), packed.cu_seqlens, query_M, shape, weights or Bf16Weights()
    return cpu.bf16_encoder.CpuBf16Encoder.apply(*inputs, *parameters, *last_norm.parameters())


def narrows_last_layer(device: torch.device, norm: str, kernels: Kernels) -> bool:
    """Whether training should compute the last layer only at the positions that have a loss.

    The reference's layers in fp32 compute all positions: their results are compared to the bit.
    """
    return packs_tokens(device, kernels) and (norm == "pre" or torch.is_autocast_enabled(device.type))


def preferred_rows(count: int, weight_VD: Tensor, kernels: Kernels) -> int:
    """How many rows `mlm_head_loss` should get for so many targets: products of some shapes are compiled already."""
    cpu = _cpu_kernels(weight_VD.device, kernels)
    is_bf16 = cpu is not None and torch.is_autocast_enabled(weight_VD.device.type)
    return cpu.bf16_encoder.round_up(count, cpu.bf16_encoder.ROW_BITS) if is_bf16 else count


def attention_candidates(qkv_N3D: Tensor, heads: int, dropout_p: float, kernels: Kernels = "auto") -> Candidates:
    """The implementations of `attention` for such inputs."""
    candidates: Candidates = {}
    if cpu := _cpu_kernels(qkv_N3D.device, kernels):
        candidates["cpu_attention"] = cpu.attention.requirements(qkv_N3D, heads, dropout_p)
    return {**candidates, TORCH: {}}


def attention(qkv_N3D: Tensor, packed: PackedBatch, heads: int, dropout_p: float, kernels: Kernels = "auto") -> Tensor:
    """Scaled dot-product attention within each pair, to (N, D); see `plain_ops.attention`."""
    if pick(attention_candidates(qkv_N3D, heads, dropout_p, kernels)) == TORCH:
        return plain_ops.attention(qkv_N3D, packed, heads, dropout_p)
    cpu = _cpu_kernels(qkv_N3D.device, kernels)
    seed_2 = draw_seed(qkv_N3D.device)
    return cpu.attention.CpuAttention.apply(qkv_N3D, packed.cu_seqlens, heads, dropout_p, seed_2)


def feed_forward_candidates(
    x_ND: Tensor, weight1_FD: Tensor, dropout_p: float, activation: str = "relu", kernels: Kernels = "auto"
) -> Candidates:
    """The implementations of `feed_forward` for such inputs."""
    candidates: Candidates = {}
    with_relu = {"ReLU": activation == "relu"}
    if cpu := _cpu_kernels(x_ND.device, kernels):
        candidates["cpu_feed_forward"] = {**cpu.feed_forward.requirements(x_ND, weight1_FD, dropout_p), **with_relu}
    if triton := _triton_kernels("triton_feed_forward", x_ND, kernels):
        candidates["triton_feed_forward"] = {**triton.requirements(x_ND, weight1_FD), **with_relu}
    return {**candidates, TORCH: {}}


def feed_forward(
    x_ND: Tensor,
    linear1: nn.Linear,
    linear2: nn.Linear,
    dropout_p: float,
    activation: str = "relu",
    kernels: Kernels = "auto",
) -> Tensor:
    """`dropout(activation(x @ W1.T + b1)) @ W2.T + b2` of rows (N, D); see `plain_ops.feed_forward`."""
    implementation = pick(feed_forward_candidates(x_ND, linear1.weight, dropout_p, activation, kernels))
    weights = linear1.weight, linear1.bias, linear2.weight, linear2.bias
    if implementation == "cpu_feed_forward":
        cpu = _cpu_kernels(x_ND.device, kernels)
        return cpu.feed_forward.CpuFeedForward.apply(x_ND, *weights, dropout_p, draw_seed(x_ND.device))
    if implementation == "triton_feed_forward":
        triton = _triton_kernels("triton_feed_forward", x_ND, kernels)
        return triton.TritonFeedForward.apply(_as_autocast(x_ND), *weights, dropout_p, draw_seed(x_ND.device))
    # The plain form, except that its dropout may use a kernel: that one has fewer requirements.
    return linear2(dropout(plain_ops.ACTIVATIONS[activation](linear1(x_ND)), dropout_p, kernels))


def dropout_candidates(x: Tensor, dropout_p: float, kernels: Kernels = "auto") -> Candidates:
    """The implementations of `dropout` for such inputs."""
    candidates: Candidates = {}
    if cpu := _cpu_kernels(x.device, kernels):
        candidates["cpu_dropout"] = {"probability above 0": dropout_p > 0, **cpu.dropout.requirements(x)}
    return {**candidates, TORCH: {}}


def dropout(x: Tensor, dropout_p: float, kernels: Kernels = "auto") -> Tensor:
    """`F.dropout`: set numbers to 0 with probability p, and divide the others by 1 - p (Srivastava et al., 2014)."""
    if pick(dropout_candidates(x, dropout_p, kernels)) == TORCH:
        return F.dropout(x, dropout_p)
    return _cpu_kernels(x.device, kernels).dropout.CpuDropout.apply(x, dropout_p, draw_seed(x.device))


def mlm_head_candidates(
    hidden_ND: Tensor, weight_VD: Tensor, kernels: Kernels = "auto", every_row_has_target: bool = True
) -> Candidates:
    """The implementations of `mlm_head_loss` for such inputs."""
    if kernels == "plain":
        return {TORCH: {}}
    candidates: Candidates = {}
    if cpu := _cpu_kernels(hidden_ND.device, kernels):
        targets = {"a target in every row": every_row_has_target}
        candidates["cpu_bf16_head"] = cpu.bf16_head.requirements(hidden_ND, weight_VD)
        candidates["cpu_narrow_head"] = {**cpu.narrow_head.requirements(hidden_ND, weight_VD), **targets}
        candidates["cpu_wide_head"] = {**cpu.wide_head.requirements(hidden_ND, weight_VD), **targets}
    if triton := _triton_kernels("triton_head", hidden_ND, kernels):
        candidates["triton_head"] = triton.requirements(hidden_ND, weight_VD)
    return {**candidates, "chunked_head": {}}


def skips_rows_without_target(hidden: Tensor, weight_VD: Tensor, kernels: Kernels) -> bool:
    """Whether rows without a target cost `mlm_head_loss` next to nothing, so that its caller need not remove them."""
    return pick(mlm_head_candidates(hidden, weight_VD, kernels)) == "triton_head"


def mlm_head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    targets_N: Tensor,
    with_rank: bool = False,
    kernels: Kernels = "auto",
    weights: Bf16Weights | None = None,
) -> HeadLoss:
    """Sum of the cross entropies of targets, which may be NO_TARGET; see `plain_ops.mlm_head_loss`.

    Only the plain implementation holds N x V logits. `weights` keeps a copy of the table in bf16 for later calls.
    """
    if kernels == "plain":
        return plain_ops.mlm_head_loss(hidden_ND, weight_VD, bias_V, targets_N, with_rank)
    inputs = hidden_ND, weight_VD, bias_V, targets_N
    positions = (targets_N != NO_TARGET).sum()
    # Only CPU kernels have this requirement. On a GPU it counts as met: reading `positions` would make the host wait.
    every_row_has_target = hidden_ND.device.type != "cpu" or int(positions) == len(targets_N)
    implementation = pick(mlm_head_candidates(hidden_ND, weight_VD, kernels, every_row_has_target))
    cpu = _cpu_kernels(hidden_ND.device, kernels)
    if implementation == "cpu_narrow_head":
        loss_sum, rank_N = cpu.narrow_head.CpuNarrowHeadLoss.apply(*inputs, with_rank)
    elif implementation == "cpu_bf16_head":
        of_table = weights or Bf16Weights()
        loss_sum, rank_N = cpu.bf16_head.CpuBf16HeadLoss.apply(*inputs, of_table, with_rank, torch.is_grad_enabled())
    elif implementation == "cpu_wide_head":
        loss_sum, rank_N = cpu.wide_head.CpuWideHeadLoss.apply(*inputs, torch.is_grad_enabled())
    elif implementation == "triton_head":
        triton = _triton_kernels("triton_head", hidden_ND, kernels)
        loss_sum, rank_N = triton.TritonHeadLoss.apply(_as_autocast(hidden_ND), *inputs[1:], with_rank)
    else:
        loss_sum, rank_N = ChunkedHeadLoss.apply(*inputs, with_rank, torch.is_grad_enabled())
    return HeadLoss(loss_sum, positions, rank_N if with_rank else None)


@torch.inference_mode()
def mlm_head_token_losses(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, kernels: Kernels = "auto"
) -> tuple[Tensor, Tensor]:
    """The cross entropy (N, fp32, nats) and rank (N, int64) of each position: what `mlm_head_loss` adds up.

    Every row must have a target.
    """
    implementation = pick(mlm_head_candidates(hidden_ND, weight_VD, kernels))
    cpu = _cpu_kernels(hidden_ND.device, kernels)
    if implementation == "cpu_narrow_head":
        return cpu.narrow_head.token_losses(hidden_ND, weight_VD, bias_V, targets_N)
    if implementation == "cpu_wide_head":
        return cpu.wide_head.token_losses(hidden_ND, weight_VD, bias_V, targets_N)
    return plain_ops.mlm_head_token_losses(hidden_ND, weight_VD, bias_V, targets_N)


def top_tokens_candidates(decoder: nn.Linear, weights: Iterable[Tensor]) -> Candidates:
    """The implementations of `top_tokens` for a model with this decoder and these weights."""
    candidates: Candidates = {}
    if cpu := _load_cpu_kernels("cpu_top_tokens"):
        candidates["cpu_top_tokens"] = cpu.requirements(decoder.in_features, decoder.out_features, weights)
    return {**candidates, TORCH: {}}


def compile_top_tokens(decoder: nn.Linear, weights: Iterable[Tensor], threads: int) -> CompiledTopTokens | None:
    """A kernel for `top_tokens` that holds a copy of the decoder, or None where the model is not supported.

    `weights` are all weights of the model. The first call of the kernel compiles it, in a second or two.
    """
    if pick(top_tokens_candidates(decoder, weights)) == TORCH:
        return None
    cpu: Any = _load_cpu_kernels("cpu_top_tokens")
    return cpu.TopTokensKernel(decoder.weight, decoder.bias, threads)


def compile_feed_forward(linear1: nn.Linear, linear2: nn.Linear, activation: str) -> Callable[[Tensor], Tensor] | None:
    """A feed-forward kernel without dropout, for models that `compile_top_tokens` supports.

    None for wider layers and for those without ReLU.
    """
    cpu: Any = _load_cpu_kernels("cpu_top_tokens")
    is_supported = activation == "relu" and linear1.in_features <= cpu.WIDEST_FEED_FORWARD
    return cpu.FeedForwardKernel(linear1, linear2) if is_supported else None


def top_tokens(
    hidden_ND: Tensor,
    decoder: nn.Linear,
    k: int,
    row_X: Sequence[int] = (),
    id_X: Sequence[int] = (),
    compiled: CompiledTopTokens | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities and ids (N, K) of the k likeliest tokens at N masks, best first, and those of some targets (X).

    See `plain_ops.top_tokens`. `compiled` is the kernel that `compile_top_tokens` returned for the decoder; without it,
    the plain form runs.
    """
    if compiled is None:
        return plain_ops.top_tokens(hidden_ND, decoder, k, row_X, id_X)
    rows, ids = list(row_X), list(id_X)
    log_sum_N, logits_NK, id_NK = compiled(hidden_ND, k)
    score_NK = np.exp(logits_NK - log_sum_N[:, None])
    target_logit_X = (hidden_ND[rows] * decoder.weight[ids]).sum(-1) + decoder.bias[ids]
    target_score_X = np.exp(target_logit_X.double().numpy() - log_sum_N[rows])
    return torch.from_numpy(score_NK), torch.from_numpy(id_NK), torch.from_numpy(target_score_X)
