"""Adam and AdamW with the parameter groups of this model.

Embedding tables and matrices decay; biases and norms do not, unless asked for. Decaying the decoder's bias would undo,
step by step, the word frequencies that it starts from.

The MLM decoder has a separate epsilon. Adam divides a gradient by its typical size (Kingma and Ba, 2015, algorithm
1), so with an epsilon near 0 a row moves by a whole learning rate each step, however small its gradient is. The rows of
rare words have gradients around 1e-7, which are noise. An epsilon above that size leaves these rows where they are. The
decoder's rows and the token embeddings also have separate learning rates, as factors of the scheduled rate.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from babybert.config import PretrainConfig
from babybert.model.bert import BabyBert

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


def make_optimizer(bert: BabyBert, config: PretrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` asks for. Each parameter group has a `factor` of the scheduled learning rate.

    The fused implementation runs the loop over parameters in C++. The order of the groups is part of the checkpoint
    format.
    """
    decoder = bert.mlm_decoder
    embedding = bert.embedding.token_embedding.embedding
    tables = [] if embedding.weight is decoder.weight else [embedding.weight]  # tied: it is the decoder's
    special = {decoder.weight, decoder.bias, embedding.weight}
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
    return EagerAdam(groups, lr=config.lr, decoupled_weight_decay=config.optimizer == "adamw", fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set each parameter group to its factor of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
