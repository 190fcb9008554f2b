"""Which implementation `ops` picks for the presets' sizes, and why: what `babybert info --ops` prints.

The rows come from the functions that pick in training. Inputs are placeholders without memory: one number, expanded to
the shape of a batch.

Shapes: N packed tokens or masked positions, D width, V vocabulary, F hidden units.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from babybert.config import PRESETS, ModelConfig, model_config
from babybert.model import ops

TOKENS, MASKED = 1280, 190  # of a usual batch; the choice depends on whether there are any
DROPOUT = 0.1  # for presets that have none, to show what `--dropout` would change


@dataclass(frozen=True)
class OperationChoice:
    """One row of the table."""

    operation: str
    preset: str
    sizes: str
    implementation: str  # a module of `babybert/model/kernels/`, or "torch" for the plain form
    why: str


def choices(device: torch.device, kernels: ops.Kernels = "auto") -> list[OperationChoice]:
    """The implementation of each operation on this device, for each preset with the reference's vocabulary."""
    rows = []
    for preset in PRESETS:
        config = model_config(preset, ModelConfig().vocab_size)
        for operation, sizes, candidates in _operations(config, device, kernels):
            implementation = ops.pick(candidates)
            rows.append(OperationChoice(operation, preset, sizes, implementation, _reason(candidates, device)))
    return sorted(rows, key=lambda row: row.operation)


def _operations(
    config: ModelConfig, device: torch.device, kernels: ops.Kernels
) -> Iterator[tuple[str, str, ops.Candidates]]:
    """Name, sizes and candidates of each operation of a model."""
    width, vocab = config.width, config.vocab_size
    x_ND, qkv_N3D = _placeholder(device, TOKENS, width), _placeholder(device, TOKENS, 3 * width)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cpu"):
        shape = f"{config.layers} layers of {width} in bf16"
        yield "encoder", shape, ops.encoder_candidates(x_ND, kernels)
    weight1_FD, weight_VD = _placeholder(device, config.feed_forward, width), _placeholder(device, vocab, width)
    for dropout_p, phase in ((DROPOUT, f"dropout {DROPOUT}"), (0.0, "no dropout")):
        heads = f"{config.heads} heads of {width // config.heads}, {phase}"
        yield "attention", heads, ops.attention_candidates(qkv_N3D, config.heads, dropout_p, kernels)
        units = f"{width} -> {config.feed_forward}, {phase}"
        yield (
            "feed_forward",
            units,
            ops.feed_forward_candidates(x_ND, weight1_FD, dropout_p, config.activation, kernels),
        )
    yield "dropout", f"width {width}", ops.dropout_candidates(x_ND, DROPOUT, kernels)
    table = f"width {width}, {vocab:,} tokens"
    hidden_ND = _placeholder(device, MASKED, width)
    yield "mlm_head_loss", table, ops.mlm_head_candidates(hidden_ND, weight_VD, kernels)
    with torch.device("meta"):
        decoder = nn.Linear(width, vocab)
    weights = [torch.zeros(1, device=device)]
    yield "top_tokens", f"{table}, in the server", ops.top_tokens_candidates(decoder, weights)


def _placeholder(device: torch.device, rows: int, columns: int) -> Tensor:
    return torch.zeros((), device=device).expand(rows, columns)


def _reason(candidates: ops.Candidates, device: torch.device) -> str:
    """What the chosen implementation requires, or which requirements of the preferred ones are not met."""
    chosen = ops.pick(candidates)
    if candidates[chosen]:
        return ", ".join(candidates[chosen])
    rejected = [f"{name} needs {_unmet(requirements)}" for name, requirements in candidates.items() if name != chosen]
    return "; ".join(rejected) or f"there is no kernel for device {device.type}"


def _unmet(requirements: dict[str, bool]) -> str:
    return " and ".join(text for text, is_met in requirements.items() if not is_met)
