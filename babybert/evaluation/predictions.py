"""The evaluation loop: run a model on examples and keep what its scores are computed from.

Both training's validation and `babybert evaluate` call `predict`. It keeps one rank, and on request one loss, for each
masked token and two logits for each pair. Logits over the vocabulary exist only for a few masked tokens at a time: at
V = 147,161 they take 0.6 MB for each token.

Shapes: B pairs of a batch, T positions, D width, N masked tokens, P pairs in all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from babybert.data.loader import Batch, ordered_batches
from babybert.data.table import Examples
from babybert.model.bert import BabyBert, keep_bf16_weights
from babybert.model.loss import IGNORED, mlm_loss, nsp_loss
from babybert.model.ops import mlm_head_token_losses
from babybert.progress import Progress


class EvaluationStopped(Exception):
    """The caller of an evaluation asked it to stop before it was done."""


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for N masked tokens and P pairs, in the order of the examples."""

    rank_N: np.ndarray
    """int64: how many words of the vocabulary the model ranks above the original one; 0 is a correct prediction."""
    loss_N: np.ndarray
    """float64, nats: the cross entropy of each masked token. Empty unless `predict` was asked for token losses."""
    mlm_loss_sum: float
    """Sum of the cross entropies of all masked tokens, nats."""
    nsp_logits_P2: np.ndarray
    """float32: logits of next sentence prediction; class 1 is "B follows A"."""
    nsp_loss_sum: float
    """Sum of the cross entropies of all pairs, nats."""

    def is_next_probabilities(self) -> np.ndarray:
        """The probability (P, float64) that B follows A."""
        probability_P2 = torch.from_numpy(self.nsp_logits_P2).double().softmax(-1)
        return probability_P2[:, 1].numpy()


@torch.inference_mode()
def predict(
    model: BabyBert,
    examples: Examples,
    batch_size: int,
    device: torch.device,
    task: str = "evaluate",
    should_stop: Callable[[], bool] = lambda: False,
    token_losses: bool = False,
    bf16: bool = False,
) -> Predictions:
    """Run `model`, which must be on `device`, on all `examples` in evaluation mode, then restore its mode.

    `task` names the progress bar. `token_losses` asks for `Predictions.loss_N`; without it only the sum is computed,
    which has a fused kernel on a GPU. `bf16` runs the encoder under bf16 autocast; the heads stay in fp32, because
    ranks need exact logits. Raises EvaluationStopped after the first batch at which `should_stop()` is true.
    """
    batches = []
    was_training = model.training
    model.eval()
    try:
        with keep_bf16_weights(model), Progress(task, len(examples), "pairs") as progress:
            for batch in ordered_batches(examples, batch_size):
                batches.append(_predict_batch(model, batch.to(device), token_losses, bf16))
                progress.advance(len(batch.is_next_B))
                if should_stop():
                    raise EvaluationStopped
    finally:
        model.train(was_training)
    return _concatenate(batches)


def _predict_batch(model: BabyBert, batch: Batch, token_losses: bool, bf16: bool) -> Predictions:
    with torch.autocast(batch.ids_BT.device.type, torch.bfloat16, enabled=bf16):
        hidden_BTD = model(batch.ids_BT, batch.segments_BT).float()
    if token_losses:
        loss_N, rank_N = _token_losses(model, hidden_BTD, batch.labels_BT)
        mlm_loss_sum = float(loss_N.sum())
    else:
        mlm = mlm_loss(model, hidden_BTD, batch.labels_BT, with_rank=True)
        assert mlm.rank_N is not None
        loss_N, rank_N = np.zeros(0), mlm.rank_N.cpu().numpy()
        mlm_loss_sum = mlm.loss_sum.item()
    nsp_logits_B2 = model.nsp_logits(hidden_BTD)
    return Predictions(
        rank_N=rank_N,
        loss_N=loss_N,
        mlm_loss_sum=mlm_loss_sum,
        nsp_logits_P2=nsp_logits_B2.float().cpu().numpy(),
        nsp_loss_sum=nsp_loss(nsp_logits_B2, batch.is_next_B).item(),
    )


def _token_losses(model: BabyBert, hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Cross entropy (N, float64) and rank (N) of each masked token."""
    masked_BT = labels_BT != IGNORED
    decoder = model.mlm_decoder
    transformed_ND = model.mlm_transform(hidden_BTD[masked_BT])
    loss_N, rank_N = mlm_head_token_losses(
        transformed_ND, decoder.weight, decoder.bias, labels_BT[masked_BT], model.kernels
    )
    return loss_N.double().cpu().numpy(), rank_N.cpu().numpy()


def _concatenate(batches: Sequence[Predictions]) -> Predictions:
    # Not `sum`: from Python 3.12 on it compensates rounding errors, so losses would differ between versions of Python.
    mlm_loss_sum = nsp_loss_sum = 0.0
    for batch in batches:
        mlm_loss_sum += batch.mlm_loss_sum
        nsp_loss_sum += batch.nsp_loss_sum
    return Predictions(
        rank_N=np.concatenate([batch.rank_N for batch in batches]),
        loss_N=np.concatenate([batch.loss_N for batch in batches]),
        mlm_loss_sum=mlm_loss_sum,
        nsp_logits_P2=np.concatenate([batch.nsp_logits_P2 for batch in batches]),
        nsp_loss_sum=nsp_loss_sum,
    )
