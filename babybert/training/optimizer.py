"""Adam, AdamW, and Muon with AdamW, with the parameter groups of this model.

Embedding tables and matrices decay; biases and norms do not, unless asked for. Decaying the decoder's bias would undo,
step by step, the word frequencies that it starts from.

The MLM decoder has a separate epsilon. Adam divides a gradient by its typical size (Kingma and Ba, 2015, algorithm
1), so with an epsilon near 0 a row moves by a whole learning rate each step, however small its gradient is. The rows of
rare words have gradients around 1e-7, which are noise. An epsilon above that size leaves these rows where they are. The
decoder's rows and the token embeddings also have separate learning rates, as factors of the scheduled rate.

Muon (`muon.py`) is for the matrices of the encoder's layers; embeddings, heads and vectors stay with AdamW.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from babybert.config import PretrainConfig
from babybert.model.bert import BabyBert
from babybert.training.muon import Muon

ADAM_EPSILON = 1e-8  # PyTorch's default


class EagerAdam(torch.optim.Adam):
    """PyTorch's Adam or AdamW, without the wrappers around its methods that import PyTorch's compiler.

    Nothing is compiled here. The import would take two seconds and 0.13 GiB, half as much as a whole training process
    with a model of the reference's sizes.
    """

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Adam.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)


class MuonWithAdam(torch.optim.Optimizer):
    """Muon for some parameters and Adam for the others, used as one optimizer."""

    def __init__(self, muon: Muon, adam: EagerAdam) -> None:
        self.muon, self.adam = muon, adam
        self.param_groups = muon.param_groups + adam.param_groups

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        self.muon.step()
        self.adam.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove all gradients."""
        self.muon.zero_grad(set_to_none)
        self.adam.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of both."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of both. Raises KeyError or ValueError if it is another optimizer's."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adam.load_state_dict(state_dict["adam"])
        self.param_groups = self.muon.param_groups + self.adam.param_groups


def make_optimizer(bert: BabyBert, config: PretrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` asks for. Each parameter group has a `factor` of the scheduled learning rate.

    The fused implementation runs the loop over parameters in C++. The order of the groups is part of the checkpoint
    format.
    """
    decoder = bert.mlm_decoder
    embedding = bert.embedding.token_embedding.embedding
    tables = [] if embedding.weight is decoder.weight else [embedding.weight]  # tied: it is the decoder's
    with_muon = [p for p in bert.encoder.layers.parameters() if p.dim() > 1] if config.optimizer == "muon" else []
    special = {decoder.weight, decoder.bias, embedding.weight, *with_muon}
    others = [parameter for parameter in bert.parameters() if parameter not in special]
    matrices = [parameter for parameter in others if parameter.dim() > 1]
    vectors = [parameter for parameter in others if parameter.dim() == 1]
    matrix_decay = config.weight_decay
    vector_decay = config.weight_decay if config.decay_vectors else 0.0

    def group(parameters: Sequence[torch.Tensor], factor: float, epsilon: float, decay: float) -> dict[str, Any]:
        lr = config.lr * factor
        return {"params": list(parameters), "factor": factor, "eps": epsilon, "lr": lr, "weight_decay": decay}

    groups = [
        group([decoder.weight], config.decoder_lr_factor, config.decoder_epsilon, matrix_decay),
        group([decoder.bias], 1.0, config.decoder_epsilon, vector_decay),
        group(tables, config.embedding_lr_factor, ADAM_EPSILON, matrix_decay),
        group(matrices, 1.0, ADAM_EPSILON, matrix_decay),
        group(vectors, 1.0, ADAM_EPSILON, vector_decay),
    ]
    adam = EagerAdam(groups, lr=config.lr, decoupled_weight_decay=config.optimizer != "adam", fused=True)
    if config.optimizer != "muon":
        return adam
    in_projections = [layer.self_attn.in_proj_weight for layer in bert.encoder.layers]  # query, key and value weights
    muon_groups = [
        {"params": matrices, "parts": parts, "factor": 1.0, "lr": config.lr, "weight_decay": matrix_decay}
        for matrices, parts in ((in_projections, 3), ([p for p in with_muon if p not in set(in_projections)], 1))
    ]
    return MuonWithAdam(Muon(muon_groups), adam)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set each parameter group to its factor of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
