"""Muon (Jordan et al., 2024): momentum whose update of a matrix is made orthogonal, so all directions move alike.

With Adam a few directions of a matrix dominate its update, and the others hardly learn. With Muon, `small` is 0.46 nats
ahead of AdamW after 8 million tokens (docs/learning.md). An update is scaled to the usual size of Adam's (Liu et al.,
2025), so one learning rate serves both optimizers.

`torch.optim.Muon` keeps the state. The step is written anew for two reasons. PyTorch computes in bf16 on every device,
which is 40 times slower than fp32 on a CPU with AVX2 alone; here the products are in bf16 only where the device has
instructions for it. And PyTorch orthogonalizes one matrix at a time, with query, key and value weights as one; here
matrices of one shape are one batched product, and the three are separate matrices.

Cost: about 60 K M^2 N operations for K matrices of M x N, M <= N. With `small` this is a tenth of a step of 64 pairs.

Shapes: K matrices, M rows, N columns.
"""

import inspect
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from babybert.model.device import has_fast_bf16

# The coefficients of the quintic iteration, and how often it is applied (Jordan et al., 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
TYPICAL_ADAM_UPDATE = 0.2  # root mean square, in units of the learning rate (Liu et al., 2025)


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with batched products in the precision that suits the device.

    Each parameter group has `parts`: the number of matrices of the same shape, one below the other, that a parameter
    consists of.
    """

    # Without the wrappers around these methods, PyTorch's compiler is not imported. See `EagerAdam`.
    add_param_group = inspect.unwrap(torch.optim.Muon.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Muon.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Muon.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Muon.zero_grad)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one shape."""
        rows, columns = parameters[0].shape[0] // group["parts"], parameters[0].shape[1]
        direction_KMN = torch.stack([self._direction(parameter, group) for parameter in parameters])
        orthogonal_KMN = orthogonalize(direction_KMN.view(-1, rows, columns))
        scale = group["lr"] * TYPICAL_ADAM_UPDATE * math.sqrt(max(rows, columns))
        for parameter, update in zip(parameters, orthogonal_KMN.view_as(direction_KMN), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-scale)

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The gradient's running mean, one step ahead (Nesterov momentum)."""
        assert parameter.grad is not None
        state, momentum = self.state[parameter], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(mean, momentum)


def orthogonalize(x_KMN: Tensor) -> Tensor:
    """For each matrix U S V' about U V': its singular values become numbers near 1, between 0.5 and 1.5.

    The Newton-Schulz iteration applies an odd polynomial to the singular values. It needs products alone, and works in
    bf16 as well.
    """
    if x_KMN.shape[1] > x_KMN.shape[2]:
        return orthogonalize(x_KMN.mT).mT
    a, b, c = COEFFICIENTS
    norm_K11 = x_KMN.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # at least the largest singular value
    x_KMN = (x_KMN / norm_K11).to(torch.bfloat16 if has_fast_bf16(x_KMN.device) else torch.float32)
    for _ in range(ITERATIONS):
        gram_KMM = x_KMN @ x_KMN.mT
        polynomial_KMM = torch.baddbmm(gram_KMM, gram_KMM, gram_KMM, beta=b, alpha=c)
        x_KMN = torch.baddbmm(x_KMN, polynomial_KMM, x_KMN, beta=a)
    return x_KMN
