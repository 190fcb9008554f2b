"""Predictions of a trained model: candidates for each `[MASK]`, and whether sentence B follows sentence A.

A fine-tuned model predicts the class of a text or of a pair of texts instead.

The command line, the playground and the TorchServe handler all use the `Predictor`. A batch may mix texts and pairs:
they are padded together and share one forward pass. Only `[MASK]` positions are compared with the vocabulary, all
masks of a batch at once. Memory is bounded for any input: a forward pass has at most MAX_BATCH_POSITIONS padded
positions, unless a single item is longer than that.

Shapes: B items, T positions, D width, M query positions, N masks, P pairs, X targets.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from babybert.checkpoint.format import load_encoder
from babybert.config import ClassifierConfig
from babybert.data.tokenizer import PAD, Tokenizer
from babybert.errors import DataError, UsageError, UserError
from babybert.model.bert import BabyBert, BertEncoder
from babybert.model.classifier import TextClassifier
from babybert.model.inference import InferenceModel
from babybert.serving.answer_format import (
    MaskCandidates,
    format_class_pipeline,
    format_classes,
    format_masks,
    format_next_sentence,
    format_pipeline,
)
from babybert.serving.int8_encoder import INT8_ENCODER, Int8Encoder
from babybert.serving.item_encoder import EncodedItem, ItemEncoder
from babybert.serving.request_schema import (
    DEFAULT_TOP_K,
    NOT_PRETRAINED,
    Classify,
    FillMask,
    Item,
    NextSentence,
    parse_targets,
)

MAX_BATCH_POSITIONS = 4096  # 32 MB for each feed-forward layer of the `baby` preset


@dataclass
class BatchStats:
    """What `Predictor.predict` has read, and how long each phase took.

    Attributes:
        tokens: tokens that the model has read, with [CLS] and [SEP] but without padding.
        masks: `[MASK]`s that were filled in.
        tokenize_seconds: time for tokenizing all items.
        forward_seconds: time for the forward passes, with the search of the vocabulary.
        answer_seconds: time for turning scores into answers.
    """

    tokens: int = 0
    masks: int = 0
    tokenize_seconds: float = 0.0
    forward_seconds: float = 0.0
    answer_seconds: float = 0.0


class _Entry(NamedTuple):
    """An encoded item; `item_index` is its place among all items of `predict`."""

    item_index: int
    item: Item
    encoded: EncodedItem


class ClassProbabilities(NamedTuple):
    """The probability of each class of one text."""

    of_classes: list[float]


Result = list[MaskCandidates] | float | ClassProbabilities  # of one item


class Predictor:
    """A model with its tokenizer, ready for inference.

    Predictions are deterministic, and up to rounding they do not depend on the other items of a batch.
    """

    def __init__(self, model: BertEncoder, tokenizer: Tokenizer, compiled: bool = False, threads: int = 1) -> None:
        self.tokenizer = tokenizer
        self._inference = InferenceModel(model, compiled, threads) if isinstance(model, BabyBert) else None
        self._text_classifier = model.eval().set_kernels("plain") if isinstance(model, TextClassifier) else None
        self._encoder = ItemEncoder(tokenizer, model.config.max_positions, self.classifier)
        self._int8_encoder: Int8Encoder | None = None

    @classmethod
    def load(cls, folder: Path, compiled: bool = False, threads: int = 1) -> "Predictor":
        """Load the model saved in `folder`, with int8 weights if they are there. Raises DataError.

        Args:
            folder: a checkpoint, or any folder with the same model files.
            compiled: compile kernels, where the model has them: the first prediction takes seconds longer, all others
                are faster.
            threads: threads of the compiled kernels, and texts that are computed at once in int8.
        """
        predictor = cls(*load_encoder(folder), compiled, threads)
        if (folder / INT8_ENCODER).is_file():
            predictor._int8_encoder = Int8Encoder(folder / INT8_ENCODER, predictor.encoder, threads)
        return predictor

    @property
    def is_compiled(self) -> bool:
        """Whether compiled kernels search the vocabulary."""
        return self._inference is not None and self._inference.uses_compiled_kernels

    @property
    def model(self) -> BabyBert:
        """The pretrained model. Raises UsageError if it is fine-tuned: its heads for masks and pairs are gone."""
        if self._inference is None:
            raise UsageError(NOT_PRETRAINED)
        return self._inference.model

    @property
    def encoder(self) -> BertEncoder:
        """The model, pretrained or fine-tuned."""
        return self.model if self._text_classifier is None else self._text_classifier

    @property
    def classifier(self) -> ClassifierConfig | None:
        """The classes of a fine-tuned model, and how it reads a text; None for a pretrained one."""
        return None if self._text_classifier is None else self._text_classifier.classifier

    def warm_up_items(self) -> list[Item]:
        """Items that make the model do all that it can, so that its kernels are compiled."""
        if self.classifier is not None:
            return [Classify("a", "b" if self.classifier.pairs else None)]
        return [FillMask("[MASK]"), NextSentence("a", "b")]

    def fill_mask(
        self, texts: Sequence[str], top_k: int = DEFAULT_TOP_K, targets: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """`{"masks": [{"position", "candidates": [{"token", "id", "score", "sequence"}]}]}` for each text.

        `position` counts the tokens of the text from 0. `score` is a probability over the whole vocabulary, also with
        `targets`. `sequence` is the text with the candidate in place of the mask. Raises UsageError for the first
        invalid text, DataError for damaged weights.
        """
        target_words = None if targets is None else parse_targets(targets)
        return self._predict_or_raise([FillMask(text, top_k, target_words) for text in texts])

    def next_sentence(self, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """`{"is_next": bool, "probability": float}` for each pair: the probability that B follows A.

        Raises UsageError for the first invalid pair, DataError for damaged weights.
        """
        return self._predict_or_raise([NextSentence(a, b) for a, b in pairs])

    def classify(self, texts: Sequence[tuple[str, str | None]], truncate: bool = False) -> list[dict[str, Any]]:
        """`{"label", "probability", "probabilities"}` for each text, or pair of texts if the model reads pairs.

        Raises UsageError for the first invalid text, DataError for damaged weights.
        """
        return self._predict_or_raise([Classify(text, pair, truncate, name="the text") for text, pair in texts])

    def _predict_or_raise(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        answers = self.predict(items)
        for answer in answers:
            if isinstance(answer, UserError):
                raise answer
        return answers

    @torch.inference_mode()
    def predict(self, items: Sequence[Item], stats: BatchStats | None = None) -> list[Any]:
        """The answer to each item, or the UserError of an item that has none; such an item does not affect the others.

        A UsageError means that the item is invalid, a DataError that the weights give no finite score for it. Counts
        and times are added to `stats`.
        """
        stats = stats or BatchStats()
        start = time.perf_counter()
        encoded_items = self._encoder.encode(items)
        stats.tokenize_seconds += time.perf_counter() - start
        answers: list[Any] = list(encoded_items)  # errors stay where they are; each EncodedItem is replaced below
        entries = [
            _Entry(item_index, item, encoded)
            for item_index, (item, encoded) in enumerate(zip(items, encoded_items, strict=True))
            if isinstance(encoded, EncodedItem)
        ]
        for batch in _bounded_batches(entries):
            forward_start = time.perf_counter()
            results = self._run_model(batch)
            forward_end = time.perf_counter()
            for entry, result in zip(batch, results, strict=True):
                answers[entry.item_index] = self._format(entry, result)
            stats.tokens += sum(len(entry.encoded.ids) for entry in batch)
            stats.masks += sum(len(entry.encoded.mask_positions) for entry in batch)
            stats.forward_seconds += forward_end - forward_start
            stats.answer_seconds += time.perf_counter() - forward_end
        return answers

    def encode(self, item: Item) -> EncodedItem:
        """What the model reads for one item. Raises UsageError."""
        (encoded,) = self._encoder.encode([item])
        if isinstance(encoded, UsageError):
            raise encoded
        return encoded

    def _run_model(self, batch: list[_Entry]) -> list[Result]:
        """One forward pass: the candidates of each mask of a text, or the probability that B follows A.

        For a fine-tuned model, the probabilities of the classes.
        """
        ids_BT, segments_BT = _pad([entry.encoded for entry in batch])
        encoder = self._int8_encoder or self.encoder
        if self._text_classifier is not None:
            first_B = torch.arange(len(batch)) * ids_BT.shape[1]
            cls_BD = encoder.hidden_at(ids_BT, segments_BT, first_B)
            return list(map(ClassProbabilities, self._text_classifier.class_head(cls_BD).softmax(-1).tolist()))
        query_M = _query_positions(batch, row_length=ids_BT.shape[1])
        hidden_MD = encoder.hidden_at(ids_BT, segments_BT, query_M)
        mask_count = sum(len(entry.encoded.mask_positions) for entry in batch)
        candidates = iter(self._rank_candidates(batch, hidden_MD[:mask_count]))
        probabilities = iter(self._next_sentence_probabilities(hidden_MD[mask_count:]))
        results: list[Result] = []
        for entry in batch:
            if isinstance(entry.item, FillMask):
                results.append([next(candidates) for _ in entry.encoded.mask_positions])
            else:
                results.append(next(probabilities))
        return results

    def _rank_candidates(self, batch: list[_Entry], hidden_ND: Tensor) -> list[MaskCandidates]:
        """The best words of the vocabulary, or of the targets, for each of the N masks of a batch."""
        mask_items = [
            (entry.item, entry.encoded.target_ids)
            for entry in batch
            if isinstance(entry.item, FillMask)
            for _ in entry.encoded.mask_positions
        ]
        if not mask_items:
            return []
        # Masks with targets need no search of the vocabulary; with targets alone, `top_k` is 0.
        top_k = max((item.top_k for item, target_ids in mask_items if target_ids is None), default=0)
        # The targets of all masks end to end, so that they are scored in one operation.
        mask_X = [mask for mask, (_, target_ids) in enumerate(mask_items) for _ in target_ids or ()]
        target_X = [target_id for _, target_ids in mask_items for target_id in target_ids or ()]
        assert self._inference is not None
        top_words = self._inference.top_tokens(hidden_ND, top_k, mask_X, target_X)
        target_scores = iter(top_words.target_scores_X)
        candidates = []
        for mask, (item, target_ids) in enumerate(mask_items):
            if target_ids is None:
                scores = top_words.scores_NK[mask][: item.top_k]
                candidates.append(MaskCandidates(scores, top_words.ids_NK[mask][: item.top_k]))
            else:
                scores = list(islice(target_scores, len(target_ids)))
                candidates.append(_rank_targets(scores, target_ids, item.top_k))
        return candidates

    def _next_sentence_probabilities(self, cls_PD: Tensor) -> list[float]:
        """The probability that B follows A, from the hidden state at each pair's `[CLS]`."""
        if not len(cls_PD):
            return []
        probabilities: list[float] = self.model.nsp_logits(cls_PD[:, None]).softmax(-1)[:, 1].tolist()
        return probabilities

    def _format(self, entry: _Entry, result: Result) -> Any:
        """The JSON-ready answer, or a DataError if a score is not finite."""
        # A softmax over anything non-finite is NaN at every word, so the first score of a mask is enough to check.
        if isinstance(result, ClassProbabilities):
            first_scores = result.of_classes
        else:
            first_scores = [result] if isinstance(result, float) else [mask.scores[0] for mask in result]
        if not all(map(math.isfinite, first_scores)):
            return DataError(
                "the model gave no finite score for this input: its weights are damaged; serve another checkpoint"
            )
        if isinstance(result, float):
            return format_next_sentence(result)
        if isinstance(result, ClassProbabilities):
            assert self.classifier is not None and isinstance(entry.item, Classify)
            if entry.item.pipeline:
                return format_class_pipeline(self.classifier.classes, result.of_classes, entry.item)
            return format_classes(self.classifier.classes, result.of_classes)
        assert isinstance(entry.item, FillMask)
        format_answer = format_pipeline if entry.item.pipeline else format_masks
        return format_answer(self.tokenizer, entry.encoded, result)


def _bounded_batches(entries: list[_Entry]) -> Iterator[list[_Entry]]:
    """Split the entries, ordered by length, into batches of at most MAX_BATCH_POSITIONS padded positions."""
    batch: list[_Entry] = []
    for entry in sorted(entries, key=lambda entry: len(entry.encoded.ids)):
        padded_positions = (len(batch) + 1) * len(entry.encoded.ids)  # this entry is the longest so far
        if batch and padded_positions > MAX_BATCH_POSITIONS:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def _pad(encoded_items: list[EncodedItem]) -> tuple[Tensor, Tensor]:
    """Ids and segments (B, T) as int64, padded to the longest item."""
    shape = (len(encoded_items), max(len(encoded.ids) for encoded in encoded_items))
    ids_BT = torch.full(shape, PAD)
    segments_BT = torch.zeros(shape, dtype=torch.int64)
    # Assigning lists to rows of numpy views takes a third of the time of torch.tensor on padded lists.
    ids_array, segments_array = ids_BT.numpy(), segments_BT.numpy()
    for row, encoded in enumerate(encoded_items):
        length = len(encoded.ids)
        ids_array[row, :length] = encoded.ids
        segments_array[row, :length] = encoded.segments
    return ids_BT, segments_BT


def _query_positions(batch: list[_Entry], row_length: int) -> Tensor:
    """Query positions as indices (M) into the flattened (B, T): all masks first, then `[CLS]` of each pair."""
    mask_queries: list[int] = []
    cls_queries: list[int] = []
    for row, entry in enumerate(batch):
        row_start = row * row_length
        if isinstance(entry.item, FillMask):
            mask_queries.extend(row_start + position for position in entry.encoded.mask_positions)
        else:
            cls_queries.append(row_start)
    return torch.tensor(mask_queries + cls_queries)


def _rank_targets(scores: list[float], target_ids: list[int], top_k: int) -> MaskCandidates:
    """The `top_k` targets with the highest scores; equal scores stay in the order of the request."""
    ranked = sorted(zip(scores, target_ids, strict=True), key=lambda pair: -pair[0])[:top_k]
    return MaskCandidates([score for score, _ in ranked], [target_id for _, target_id in ranked])
