"""The optimizer: parameter groups, and Adam equal to PyTorch's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from babybert.checkpoint.format import load_optimizer
from babybert.config import PretrainConfig
from babybert.data.dataset import Dataset
from babybert.errors import UsageError
from babybert.model.bert import BabyBert
from babybert.training.optimizer import EagerAdam, make_optimizer
from babybert.training.setup import new_model
from babybert.training.train import pretrain

Small = Callable[..., PretrainConfig]


def make_bert(config: PretrainConfig, demo: Dataset) -> BabyBert:
    return new_model(config, config.sizes(demo.tokenizer.size), demo.token_counts())


def checkpoint_of(config: PretrainConfig) -> Path:
    result = pretrain(config)
    assert result is not None
    return result.checkpoint


def test_biases_and_norms_do_not_decay(small: Small, demo: Dataset) -> None:
    bert = make_bert(small(), demo)
    optimizer = make_optimizer(bert, small(weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in bert.named_parameters()}
    for parameter in bert.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in bert.named_parameters():
        factor = 1.0 if parameter.dim() == 1 else 1 - small().lr * 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_the_decoder_has_its_own_learning_rate_and_epsilon_so_that_noise_does_not_move_it(
    small: Small, demo: Dataset
) -> None:
    config = small(lr=1e-3, decoder_lr_factor=10.0, decoder_epsilon=1e-3, weight_decay=0.0)
    bert, plain = (make_bert(config, demo) for _ in range(2))
    plain.load_state_dict(bert.state_dict())
    decoder = plain.mlm_decoder
    oracles = [
        torch.optim.AdamW([decoder.weight], lr=1e-2, eps=1e-3, weight_decay=0.0),
        torch.optim.AdamW([decoder.bias], lr=1e-3, eps=1e-3, weight_decay=0.0),
        torch.optim.AdamW(set(plain.parameters()) - set(decoder.parameters()), lr=1e-3, eps=1e-8, weight_decay=0.0),
    ]
    optimizer, before = make_optimizer(bert, config), bert.mlm_decoder.weight.detach().clone()
    for step in range(3):
        for parameter, other in zip(bert.parameters(), plain.parameters(), strict=True):
            parameter.grad = torch.full_like(parameter, 0.01 * (step + 1))
            parameter.grad[-1] = 1e-7  # a rare word's
            other.grad = parameter.grad.clone()
        for each in (optimizer, *oracles):
            each.step()
    for (name, parameter), other in zip(bert.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, msg=name)
    moved = (bert.mlm_decoder.weight.detach() - before).abs()
    assert moved[-1].max() < 1e-3 * moved[0].min()


def test_each_group_has_its_factor_of_the_learning_rate(small: Small) -> None:
    config = small(
        lr=1e-3, decoder_lr_factor=10.0, embedding_lr_factor=5.0, max_steps=3, schedule="constant", warmup_fraction=0.0
    )
    saved = torch.load(checkpoint_of(config) / "training.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [(group["lr"], group["factor"]) for group in saved] == [
        (1e-2, 10.0),
        (1e-3, 1.0),
        (5e-3, 5.0),
        (1e-3, 1.0),
        (1e-3, 1.0),
    ]


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizers_state_is_refused(small: Small, demo: Dataset, before: Any, after: Any) -> None:
    folder = checkpoint_of(small(max_steps=1, optimizer=before))
    with pytest.raises(UsageError, match="another --optimizer"):
        load_optimizer(folder, make_optimizer(make_bert(small(), demo), small(optimizer=after)))


def test_an_optimizer_with_other_groups_is_refused(small: Small, demo: Dataset) -> None:
    folder = checkpoint_of(small(max_steps=1))
    other = torch.optim.AdamW(make_bert(small(), demo).parameters())
    with pytest.raises(UsageError, match="another version of babybert"):
        load_optimizer(folder, other)


def test_muon_trains_the_matrices_of_the_layers_and_adamw_the_rest(small: Small, demo: Dataset) -> None:
    bert = make_bert(small(), demo)
    optimizer = make_optimizer(bert, small(optimizer="muon"))
    names = {parameter: name for name, parameter in bert.named_parameters()}
    with_muon = {names[p] for group in optimizer.param_groups if "parts" in group for p in group["params"]}
    layers = bert.config.layers
    matrices = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert with_muon == {f"encoder.layers.{layer}.{matrix}" for layer in range(layers) for matrix in matrices}
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(names[p] for p in grouped) == sorted(names.values())  # each once


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_the_optimizer_equals_pytorchs_to_the_bit_also_after_a_resume(name: str) -> None:
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    theirs.load_state_dict(ours.state_dict())
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.2, "fused": True}
    one = EagerAdam(ours.parameters(), decoupled_weight_decay=name == "AdamW", **settings)
    other = getattr(torch.optim, name)(theirs.parameters(), **settings)
    for step in range(4):
        for model, optimizer in ((ours, one), (theirs, other)):
            model(torch.full((2, 3), step + 1.0)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 1:
            state = one.state_dict()
            one = EagerAdam(ours.parameters(), decoupled_weight_decay=name == "AdamW", **settings)
            one.load_state_dict(state)
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
