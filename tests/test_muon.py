"""Muon: equal to PyTorch's, orthogonal updates in both precisions, and an exact resume."""

from typing import Any

import pytest
import torch
from torch import nn

from babybert.training import muon as muon_module
from babybert.training.muon import Muon, orthogonalize

SHAPES = ((16, 16), (16, 48), (48, 16), (16, 48))


def make_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def make_muon(parameters: list[nn.Parameter], parts: int = 1) -> Muon:
    return Muon([{"params": parameters, "parts": parts, "lr": 0.01, "weight_decay": 0.1}])


def train(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


def test_it_equals_pytorchs_muon() -> None:
    ours, theirs = make_parameters(), make_parameters()
    train(ours, make_muon(ours), range(4))
    train(theirs, torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), range(4))
    for parameter, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(parameter, other, atol=1e-3, rtol=0)  # updates of 0.01, computed in bf16 there


def test_parts_are_updated_like_matrices_of_their_own() -> None:
    whole, parts = nn.Parameter(torch.zeros(48, 16)), [nn.Parameter(torch.zeros(16, 16)) for _ in range(3)]
    whole.grad = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
    for part, grad in zip(parts, whole.grad.chunk(3), strict=True):
        part.grad = grad
    make_muon([whole], parts=3).step()
    make_muon(parts).step()
    torch.testing.assert_close(whole, torch.cat(tuple(parts)))


@pytest.mark.parametrize("has_fast_bf16", [True, False])
@pytest.mark.parametrize("shape", [(2, 20, 50), (2, 50, 20), (1, 24, 24)])
def test_singular_values_become_near_one_and_their_vectors_stay(
    has_fast_bf16: bool, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon_module, "has_fast_bf16", lambda device: has_fast_bf16)
    x_KMN = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    result_KMN = orthogonalize(x_KMN)
    assert result_KMN.dtype == (torch.bfloat16 if has_fast_bf16 else torch.float32)
    u_KMR, _, v_KRN = torch.linalg.svd(x_KMN.double(), full_matrices=False)
    values_KRR = u_KMR.mT @ result_KMN.double() @ v_KRN.mT  # diagonal if the singular vectors are the same
    diagonal_KR = values_KRR.diagonal(dim1=1, dim2=2)
    assert diagonal_KR.min() > 0.4 and diagonal_KR.max() < 1.3
    assert (values_KRR - torch.diag_embed(diagonal_KR)).abs().max() < 0.05


def test_a_resumed_optimizer_continues_to_the_bit() -> None:
    whole, stopped = make_parameters(), make_parameters()
    train(whole, make_muon(whole), range(6))
    optimizer = make_muon(stopped)
    train(stopped, optimizer, range(3))
    saved: dict[str, Any] = optimizer.state_dict()
    resumed = make_muon(stopped)
    resumed.load_state_dict(saved)
    train(stopped, resumed, range(3, 6))
    assert all(torch.equal(parameter, other) for parameter, other in zip(whole, stopped, strict=True))


def test_a_parameter_without_gradient_stays() -> None:
    parameters = make_parameters()
    before = parameters[0].detach().clone()
    optimizer = make_muon(parameters)
    for parameter in parameters[1:]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(parameters[0], before) and parameters[0] not in optimizer.state
