"""A trained model that fills masks: the likeliest tokens at each, and their probabilities.

There are two ways to the same numbers. The plain one takes a few positions' logits at a time and their softmax. The
compiled one (`kernels/cpu_top_tokens.py`), for narrow models on a CPU, is two to three times as fast after some seconds
of compiling: worth it for a server, but not for a command that answers once.

Shapes: N masks, D width, K candidates, X targets.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from babybert.model import ops
from babybert.model.bert import BabyBert


class TopTokens(NamedTuple):
    """The likeliest tokens at N masks and the probabilities of X targets, as lists."""

    scores_NK: list[list[float]]  # probabilities over the whole vocabulary, the highest first
    ids_NK: list[list[int]]
    target_scores_X: list[float]


class InferenceModel:
    """A model for inference alone: in evaluation mode, and without kernels that are made for training."""

    def __init__(self, model: BabyBert, compiled: bool = False, threads: int = 1) -> None:
        """`compiled` asks for compiled kernels, where the model is supported; `threads` is how many they may use."""
        self.model = model.eval().set_kernels("plain")
        self._top_tokens = ops.compile_top_tokens(model.mlm_decoder, model.parameters(), threads) if compiled else None
        if self._top_tokens is not None:
            for layer in model.encoder.layers:
                layer.compiled_feed_forward = ops.compile_feed_forward(
                    layer.linear1, layer.linear2, layer.activation_name
                )

    @property
    def uses_compiled_kernels(self) -> bool:
        """Whether masks are filled by compiled kernels, which leave only small operations to PyTorch."""
        return self._top_tokens is not None

    def top_tokens(self, hidden_ND: Tensor, k: int, row_X: Sequence[int], id_X: Sequence[int]) -> TopTokens:
        """The k likeliest tokens at each mask (at least one), and the probabilities of targets.

        Target x is token `id_X[x]` at mask `row_X[x]`. `hidden_ND` are the encoder's hidden states at the masks.
        """
        transformed_ND = self.model.mlm_transform(hidden_ND)
        decoder = self.model.mlm_decoder
        results = ops.top_tokens(transformed_ND, decoder, max(k, 1), row_X, id_X, self._top_tokens)
        score_NK, id_NK, target_score_X = results
        return TopTokens(score_NK.tolist(), id_NK.tolist(), target_score_X.tolist())
