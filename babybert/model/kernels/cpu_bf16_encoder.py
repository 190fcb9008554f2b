"""The encoder in bf16 on a CPU with matrix units, forward and backward: products by oneDNN, numba kernels between them.

PyTorch's bf16 autocast loses most of what matrix units give: its attention's backward does not use them, and all that
stands between two products is several passes over memory. Here each of these steps is one pass: attention, bias and
activation, residual sum and layer norm. Biases are added by the pass that follows a product, and their gradients are
added up by the pass that comes before one. The residual stream is fp32, what is multiplied is bf16, sums are fp32.

If only some positions are asked for, the last layer computes only them after its attention.

Shapes: N tokens of all pairs, M positions that are asked for, D width.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from babybert.model.bf16_weights import Bf16Weights
from babybert.model.kernels import Requirements
from babybert.model.kernels.cpu_bf16_activation import activate, activate_backward
from babybert.model.kernels.cpu_bf16_attention import Attended, Buckets, attend, attend_backward
from babybert.model.kernels.cpu_bf16_math import round_up
from babybert.model.kernels.cpu_bf16_norm import AddNorm, NormGradients, add_norm, add_norm_backward

PARAMETERS_OF_LAYER = 12
FEWEST_PAIRS = 8  # of a batch; with fewer, the casts of the weights cost as much as the products gain
ROW_BITS = 5  # significant bits of the number of rows: at most 6 % of them are filled with zeros
NARROWEST = 128  # below, the kernels in fp32 are as fast (benchmarks/pretrain.py)


@dataclass(frozen=True)
class EncoderShape:
    """What is the same for all layers."""

    heads: int
    is_pre: bool  # layer norms before each sublayer, not after each residual sum
    activation: str
    dropout_p: float


class LayerWeights(NamedTuple):
    """The matrices and biases of a layer, or their gradients, in the order in which `CpuBf16Encoder` takes them."""

    qkv: Tensor
    qkv_bias: Tensor
    projection: Tensor
    projection_bias: Tensor
    linear1: Tensor
    bias1: Tensor
    linear2: Tensor
    bias2: Tensor


@dataclass
class SavedLayer:
    """What the backward of a layer needs."""

    input_ND: Tensor
    attended_ND: Tensor
    attention: Attended
    seeds_42: Tensor
    middle_ND: Tensor = field(init=False)  # the input of the feed-forward
    a_NF: Tensor = field(init=False)
    slope_NF: Tensor = field(init=False)
    add_norm1: AddNorm = field(init=False)
    add_norm2: AddNorm = field(init=False)


def requirements(x_ND: Tensor) -> Requirements:
    """What must hold for this encoder to be correct, and faster than PyTorch's operations and the fp32 kernels."""
    return {
        "on a CPU": x_ND.device.type == "cpu",
        "bf16": torch.is_autocast_enabled("cpu"),
        f"width >= {NARROWEST}": x_ND.shape[1] >= NARROWEST,
        "at least one token": len(x_ND) > 0,
    }


def _weight_gradient(d_y_NE: Tensor, x_ND: Tensor) -> Tensor:
    """The gradient (E, D, fp32) of the matrix in `y = x @ weight.T`."""
    return (d_y_NE.t() @ x_ND).float()


class CpuBf16Encoder(torch.autograd.Function):
    """Hidden states (M, D, bf16) of embeddings (N, D, fp32) after all layers and the last norm.

    `query_M` are rows of the packed tokens, each at most once, or None for all. `parameters` are those of
    `LayerWeights` for each layer, and the last norm's weight and shift.
    """

    @staticmethod
    def forward(
        context: Any,
        x_ND: Tensor,
        cu_seqlens: Tensor,
        query_M: Tensor | None,
        shape: EncoderShape,
        weights: Bf16Weights,
        *parameters: Tensor,
    ) -> Tensor:
        layers, outer_norm, norms = _split(parameters, shape.is_pre)
        buckets, saved, outer = Buckets.of(cu_seqlens), [], None
        stream_ND = F.pad(x_ND.detach(), (0, 0, 0, round_up(len(x_ND), ROW_BITS) - len(x_ND)))
        context.padded_rows = len(stream_ND)
        if shape.is_pre:
            stream_ND, n_ND, outer = add_norm(stream_ND, None, outer_norm, True)
        else:
            n_ND = stream_ND.bfloat16()
        for index, layer in enumerate(layers):
            of_layer = norms[2 * index : 2 * index + 2]
            row_M = query_M if index == len(layers) - 1 else None
            stream_ND, n_ND, saved_layer = _layer(stream_ND, n_ND, layer, of_layer, buckets, row_M, shape, weights)
            saved.append(saved_layer)
        if not shape.is_pre:
            _, n_ND, outer = add_norm(stream_ND, None, outer_norm, True)
        context.layers, context.saved, context.outer = layers, saved, outer
        context.buckets, context.shape, context.weights = buckets, shape, weights
        context.query_M, context.rows = query_M, len(x_ND)
        return n_ND if query_M is not None else n_ND[: len(x_ND)]

    @staticmethod
    def backward(context: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        is_pre, layers = context.shape.is_pre, context.layers
        d_n_ND, d_stream_ND, outer = d_outputs[0].contiguous(), None, None
        if context.query_M is None:
            d_n_ND = F.pad(d_n_ND, (0, 0, 0, context.padded_rows - context.rows))
        of_layers: list[LayerWeights] = []
        of_norms: list[tuple[Tensor, Tensor]] = []  # of all sums, the last one first
        if not is_pre:
            outer = add_norm_backward(context.outer, d_n_ND, None)
            d_stream_ND, d_n_ND = outer.x_ND, torch.zeros_like(d_n_ND)
        for index in reversed(range(len(layers))):
            row_M = context.query_M if index == len(layers) - 1 else None
            saved, context.saved[index] = context.saved[index], None  # its memory is free after this layer
            d_stream_ND, d_n_ND, of_layer, first, second = _layer_backward(
                d_stream_ND, d_n_ND, layers[index], saved, context, row_M
            )
            of_layers.append(of_layer)
            of_norms += [(second.weight_D, second.shift_D), (first.weight_D, first.shift_D)]
        if is_pre:
            outer = add_norm_backward(context.outer, d_n_ND, d_stream_ND)
        assert outer is not None
        assert d_stream_ND is not None
        d_x_ND = outer.x_ND if is_pre else d_stream_ND.add_(d_n_ND)
        of_outer = (outer.weight_D, outer.shift_D)
        of_norms = [of_outer, *of_norms[::-1]] if is_pre else [*of_norms[::-1], of_outer]
        gradients: list[Tensor] = []
        for index, of_layer in enumerate(of_layers[::-1]):
            gradients += [*of_layer, *of_norms[2 * index], *of_norms[2 * index + 1]]
        return d_x_ND[: context.rows], None, None, None, None, *gradients, *of_norms[-1]


Norm = tuple[Tensor, Tensor]  # weight and shift


def _split(parameters: tuple[Tensor, ...], is_pre: bool) -> tuple[list[LayerWeights], Norm, list[Norm]]:
    """The layers' matrices, the norm before (pre) or after (post) all layers, and the norm of each residual sum.

    A pre-norm network has its norms before its sublayers. So a sum is followed by the norm of the next sublayer.
    """
    layers, norms = [], []
    for start in range(0, len(parameters) - 2, PARAMETERS_OF_LAYER):
        of_layer = parameters[start : start + PARAMETERS_OF_LAYER]
        layers.append(LayerWeights(*of_layer[:8]))
        norms += [(of_layer[8], of_layer[9]), (of_layer[10], of_layer[11])]
    norms.append((parameters[-2], parameters[-1]))
    return (layers, norms[0], norms[1:]) if is_pre else (layers, norms[-1], norms[:-1])


def _layer(
    stream_ND: Tensor,
    n_ND: Tensor,
    layer: LayerWeights,
    norms: list[Norm],
    buckets: Buckets,
    query_M: Tensor | None,
    shape: EncoderShape,
    weights: Bf16Weights,
) -> tuple[Tensor, Tensor, SavedLayer]:
    """The stream after a layer, the next sublayer's input, and what the backward needs."""
    seeds_42 = torch.randint(0, 2**32, (4, 2)) if shape.dropout_p else torch.zeros(4, 2, dtype=torch.int64)
    dropout_p = shape.dropout_p
    qkv_N3D = F.linear(n_ND, weights.of(layer.qkv))
    attended_ND, attention = attend(qkv_N3D, layer.qkv_bias, buckets, shape.heads, dropout_p, seeds_42[0])
    if query_M is not None:
        stream_ND, attended_ND = stream_ND[query_M], attended_ND[query_M]
    saved = SavedLayer(n_ND, attended_ND, attention, seeds_42)
    y_ND = F.linear(attended_ND, weights.of(layer.projection))
    stream_ND, saved.middle_ND, saved.add_norm1 = add_norm(
        stream_ND, (y_ND, layer.projection_bias), norms[0], shape.is_pre, dropout_p, seeds_42[1]
    )
    h_NF = F.linear(saved.middle_ND, weights.of(layer.linear1))
    saved.a_NF, saved.slope_NF = activate(h_NF, layer.bias1, shape.activation, dropout_p, seeds_42[2])
    y_ND = F.linear(saved.a_NF, weights.of(layer.linear2))
    stream_ND, n_ND, saved.add_norm2 = add_norm(
        stream_ND, (y_ND, layer.bias2), norms[1], shape.is_pre, dropout_p, seeds_42[3]
    )
    return stream_ND, n_ND, saved


def _layer_backward(
    d_stream_ND: Tensor | None,
    d_n_ND: Tensor,
    layer: LayerWeights,
    saved: SavedLayer,
    context: Any,
    query_M: Tensor | None,
) -> tuple[Tensor, Tensor, LayerWeights, NormGradients, NormGradients]:
    """The gradients of the stream before the layer, of the layer's input, of its matrices, and of its two sums."""
    shape, weights, buckets = context.shape, context.weights, context.buckets
    second = add_norm_backward(saved.add_norm2, d_n_ND, d_stream_ND)
    d_h_NF, d_bias1 = activate_backward(second.y_ND @ weights.of(layer.linear2), saved.slope_NF)
    d_linear2 = _weight_gradient(second.y_ND, saved.a_NF)
    d_middle_ND, d_linear1 = d_h_NF @ weights.of(layer.linear1), _weight_gradient(d_h_NF, saved.middle_ND)
    first = add_norm_backward(saved.add_norm1, d_middle_ND, second.x_ND)
    d_attended_ND = first.y_ND @ weights.of(layer.projection)
    d_projection, d_stream_ND = _weight_gradient(first.y_ND, saved.attended_ND), first.x_ND
    if query_M is not None:
        d_attended_ND = _at_rows(d_attended_ND, query_M, context.padded_rows)
        d_stream_ND = _at_rows(d_stream_ND, query_M, context.padded_rows)
    d_qkv_N3D, d_qkv_bias = attend_backward(
        d_attended_ND, saved.attention, buckets, shape.heads, shape.dropout_p, saved.seeds_42[0]
    )
    d_qkv, d_input_ND = _weight_gradient(d_qkv_N3D, saved.input_ND), d_qkv_N3D @ weights.of(layer.qkv)
    gradients = LayerWeights(
        d_qkv, d_qkv_bias, d_projection, first.bias_D, d_linear1, d_bias1, d_linear2, second.bias_D
    )
    return d_stream_ND, d_input_ND, gradients, first, second


def _at_rows(x_MD: Tensor, index_M: Tensor, rows: int) -> Tensor:
    """`rows` rows with those of `x_MD` at the index, and zeros elsewhere."""
    return x_MD.new_zeros(rows, x_MD.shape[1]).index_copy_(0, index_M, x_MD)
