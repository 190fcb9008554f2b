"""Pseudo-log-likelihood: how probable a masked language model finds a sentence (Salazar et al., 2020).

Each token is masked in turn. The sum of its log-probabilities, given all the other tokens, is the sentence's score.
Pieces of one word give each other away, so words of several pieces get too high a score. The within-word variant
(PLL-word-l2r: Kauf and Ivanova, 2023) masks, together with a piece, the later pieces of the same word.

The masked copies of all sentences of one length form batches without padding. Only the position that is asked about
goes through the end of the last layer and meets the vocabulary.

Cost: a sentence of n tokens, of which m are pieces that a later piece of the word follows, takes n + m passes of the
model over n + 2 positions.

Shapes: S sentences, T positions with `[CLS]` and `[SEP]`, C masked copies of them, B copies of a batch, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from babybert.data.tokenizer import CLS, MASK, SEP
from babybert.errors import DataError
from babybert.model.bert import BabyBert, keep_bf16_weights
from babybert.model.ops import mlm_head_token_losses
from babybert.progress import Progress

BATCH_POSITIONS = 4096  # tokens of a batch; with more, a layer's hidden states do not fit the cache
SHORT_SENTENCE = 64  # tokens; a batch has at least BATCH_POSITIONS / 64 copies of such a sentence
SEGMENT_A = 1


@dataclass(frozen=True)
class SentenceScores:
    """The log-probabilities of the tokens of one sentence, in nats."""

    plain: np.ndarray
    """float64: of each token, given all the others."""
    within_word: np.ndarray
    """float64: the same without the later pieces of the token's word; equal to `plain` for whole words."""

    @property
    def plain_sum(self) -> float:
        """The pseudo-log-likelihood."""
        return math.fsum(self.plain)  # exact: the same tokens in another order have the same sum

    @property
    def within_word_sum(self) -> float:
        """The pseudo-log-likelihood of the within-word variant."""
        return math.fsum(self.within_word)


@dataclass(frozen=True)
class _MaskedCopies:
    """C copies of the sentences of one length: copy c asks for token `first_C[c]` of sentence `row_C[c]`.

    Positions `first_C[c]` to `end_C[c] - 1` of it are masked.
    """

    row_C: np.ndarray
    first_C: np.ndarray
    end_C: np.ndarray

    def __len__(self) -> int:
        return len(self.row_C)

    def part(self, first: int, end: int) -> "_MaskedCopies":
        """Copies `first` to `end - 1`."""
        return _MaskedCopies(self.row_C[first:end], self.first_C[first:end], self.end_C[first:end])


def score_sentences(
    model: BabyBert,
    sentences: Sequence[np.ndarray],
    continues_word_V: np.ndarray,
    device: torch.device,
    bf16: bool = False,
    batch_positions: int = BATCH_POSITIONS,
    show_progress: bool = True,
) -> list[SentenceScores]:
    """Score sentences of ids without special tokens, each of at least one token and short enough for the model.

    `model` must be on `device`; its mode is restored. `continues_word_V` flags the pieces that continue a word. `bf16`
    runs the encoder under bf16 autocast; the vocabulary head stays in fp32, because logits have to be exact. A batch
    has at most `batch_positions` positions, or one copy. Raises DataError if the model gives a score that is not
    finite.
    """
    lengths = np.array([len(sentence) for sentence in sentences])
    groups = [np.flatnonzero(lengths == length).tolist() for length in np.unique(lengths)]
    ids_of_groups = [_with_special_tokens([sentences[index] for index in group]) for group in groups]
    copies_of_groups = [_masked_copies(ids_ST, continues_word_V) for ids_ST in ids_of_groups]
    scores: dict[int, SentenceScores] = {}
    was_training = model.training
    model.eval()
    try:
        total = sum(map(len, copies_of_groups))
        with (
            keep_bf16_weights(model),
            Progress("pseudo-log-likelihood", total, "tokens", show=show_progress) as progress,
        ):
            for group, ids_ST, copies in zip(groups, ids_of_groups, copies_of_groups, strict=True):
                score_C = np.empty(len(copies))
                batch = max(1, batch_positions // ids_ST.shape[1])
                for first in range(0, len(copies), batch):
                    part = copies.part(first, first + batch)
                    score_C[first : first + batch] = _log_probabilities(model, ids_ST, part, device, bf16)
                    progress.advance(len(part))
                scores.update(zip(group, _split(ids_ST, copies, score_C), strict=True))
    finally:
        model.train(was_training)
    return [scores[index] for index in range(len(sentences))]


def _with_special_tokens(sentences: list[np.ndarray]) -> np.ndarray:
    """`[CLS] sentence [SEP]` (S, T) of sentences of one length."""
    ids_ST = np.full((len(sentences), len(sentences[0]) + 2), CLS, np.int64)
    ids_ST[:, 1:-1] = sentences
    ids_ST[:, -1] = SEP
    return ids_ST


def _masked_copies(ids_ST: np.ndarray, continues_word_V: np.ndarray) -> _MaskedCopies:
    """The copies that both variants need: one for each token, then one for each that a piece of its word follows."""
    sentences, length = ids_ST.shape
    position_ST = np.broadcast_to(np.arange(length), ids_ST.shape)
    word_end_ST = position_ST + 1
    for position in range(length - 2, 0, -1):  # from right to left: a piece's word ends where the next piece's does
        continues_S = continues_word_V[ids_ST[:, position + 1]]
        word_end_ST[:, position] = np.where(continues_S, word_end_ST[:, position + 1], position + 1)
    row_plain, first_plain = np.divmod(np.arange(sentences * (length - 2)), length - 2)
    row_word, first_word = np.nonzero(word_end_ST[:, 1:-1] > position_ST[:, 1:-1] + 1)
    row_C = np.concatenate([row_plain, row_word])
    first_C = np.concatenate([first_plain, first_word]) + 1
    end_C = np.concatenate([first_plain + 2, word_end_ST[row_word, first_word + 1]])
    return _MaskedCopies(row_C, first_C, end_C)


@torch.inference_mode()
def _log_probabilities(
    model: BabyBert, ids_ST: np.ndarray, copies: _MaskedCopies, device: torch.device, bf16: bool
) -> np.ndarray:
    """The log-probability (B, float64) of the token that each copy asks for."""
    ids_BT = ids_ST[copies.row_C]
    count, length = ids_BT.shape
    target_B = torch.from_numpy(ids_BT[np.arange(count), copies.first_C]).to(device)
    position_T = np.arange(length)
    ids_BT[(position_T >= copies.first_C[:, None]) & (position_T < copies.end_C[:, None])] = MASK
    inputs_BT = torch.from_numpy(ids_BT).to(device)
    query_B = torch.from_numpy(np.arange(count) * length + copies.first_C).to(device)
    segments_BT = torch.full_like(inputs_BT, SEGMENT_A)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        hidden_BD = model.hidden_at(inputs_BT, segments_BT, query_B, has_padding=False)
    decoder = model.mlm_decoder
    transformed_BD = model.mlm_transform(hidden_BD.float())
    loss_B, _ = mlm_head_token_losses(transformed_BD, decoder.weight, decoder.bias, target_B, model.kernels)
    if not bool(loss_B.isfinite().all()):
        raise DataError(
            "the model gave no finite score for a sentence: its weights are damaged; use another checkpoint"
        )
    return -loss_B.double().cpu().numpy()


def _split(ids_ST: np.ndarray, copies: _MaskedCopies, score_C: np.ndarray) -> list[SentenceScores]:
    """The scores of each sentence of one length."""
    sentences, length = ids_ST.shape
    tokens = sentences * (length - 2)  # the first copies are those of the plain variant, in order
    plain_ST = score_C[:tokens].reshape(sentences, length - 2)
    within_word_ST = plain_ST.copy()
    within_word_ST[copies.row_C[tokens:], copies.first_C[tokens:] - 1] = score_C[tokens:]
    return [SentenceScores(plain, word) for plain, word in zip(plain_ST, within_word_ST, strict=True)]
