"""Clipping changes gradients to the bit as PyTorch does."""

import math

import pytest
import torch
from torch import nn

from babybert.training.step import clip_gradients


def parameters_of_norm(norm: float) -> list[nn.Parameter]:
    """Two parameters with gradients of this norm, and one without a gradient."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (7,), (2,))]
    gradients = [torch.randn(parameter.shape, generator=generator) for parameter in parameters[:2]]
    length = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    for parameter, gradient in zip(parameters, gradients, strict=False):
        parameter.grad = gradient * (norm / length)
    return parameters


@pytest.mark.parametrize("norm", [0.0, 0.3, 1.9, 1.999, 1.9999999, 2.0, 2.0000005, 2.1, 50.0, math.inf, math.nan])
def test_gradients_are_clipped_as_pytorch_clips_them(norm: float) -> None:
    ours, expected = parameters_of_norm(norm), parameters_of_norm(norm)
    our_norm, expected_norm = clip_gradients(iter(ours), 2.0), nn.utils.clip_grad_norm_(expected, 2.0)
    assert torch.equal(our_norm.nan_to_num(-1), expected_norm.nan_to_num(-1))
    for parameter, peer in zip(ours[:2], expected[:2], strict=True):
        assert parameter.grad is not None and peer.grad is not None
        assert torch.equal(parameter.grad.nan_to_num(-1), peer.grad.nan_to_num(-1))
    assert ours[2].grad is None


def test_short_gradients_are_not_touched_on_a_cpu() -> None:
    """Multiplying by 1 costs a pass over all parameters."""
    parameters = parameters_of_norm(0.5)
    versions = [parameter.grad._version for parameter in parameters if parameter.grad is not None]
    clip_gradients(parameters, 2.0)
    assert versions == [parameter.grad._version for parameter in parameters if parameter.grad is not None]
