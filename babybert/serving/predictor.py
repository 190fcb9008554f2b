"""Answers from a trained model: which words fit at each `[MASK]`, and does sentence B follow sentence A.

The command line and the TorchServe handler both ask here. A batch of items of either kind takes one forward pass,
padded together; only `[MASK]` positions reach the vocabulary, all of a batch's at once. Memory is bounded whatever is
asked: a pass takes at most SLICE_POSITIONS padded positions (unless one item alone has more).

Shapes: B items, T positions, D width, M positions asked for, N masks, X targets.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from babybert.checkpoint.format import load_model
from babybert.data.tokenizer import CLS, MASK, PAD, SEP, UNK, Tokenizer
from babybert.errors import DataError, UsageError, UserError
from babybert.model.bert import BabyBert
from babybert.model.inference import InferenceModel
from babybert.serving.request_schema import DEFAULT_TOP_K, FillMask, Item, NextSentence, parse_targets, shown

SLICE_POSITIONS = 4096  # 32 MB for each hidden layer of the baby's feed-forward


class Encoded(NamedTuple):
    """One item as the model reads it."""

    ids: list[int]
    segments: list[int]
    masks: list[int]  # positions of `[MASK]`; none in a pair, whatever it holds
    targets: list[int] | None


class Candidates(NamedTuple):
    """What fits at one mask, best first."""

    scores: list[float]
    ids: list[int]


@dataclass
class Work:
    """What a batch took: counts of what the model read, and seconds in each phase."""

    tokens: int = 0
    masks: int = 0
    tokenize_seconds: float = 0.0
    forward_seconds: float = 0.0
    answer_seconds: float = 0.0


class Predictor:
    """A model ready to answer; deterministic, and each answer its own whatever else is in the batch."""

    def __init__(self, model: BabyBert, tokenizer: Tokenizer, compiled: bool = False, threads: int = 1) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.inference = InferenceModel(model, compiled, threads)

    @classmethod
    def load(cls, folder: Path, compiled: bool = False, threads: int = 1) -> "Predictor":
        """Load the model saved in `folder`; `compiled` takes seconds at the first answer and saves time at all others. Raises DataError."""
        return cls(*load_model(folder), compiled, threads)

    def fill_mask(
        self, texts: Sequence[str], top_k: int = DEFAULT_TOP_K, targets: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """`{"masks": [{"position", "candidates": [{"token", "id", "score", "sequence"}]}]}` for each text.

        `position` counts the text's tokens from 0; `score` is a probability over the whole vocabulary, also where only
        `targets` are asked for; `sequence` is the text with the candidate in the mask's place. Raises UsageError for the
        first text that cannot be answered.
        """
        known = None if targets is None else parse_targets(targets)
        return self._answer_or_raise([FillMask(text, top_k, known) for text in texts])

    def next_sentence(self, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """`{"is_next": bool, "probability": float}` for each pair: the probability that B follows A. Raises UsageError."""
        return self._answer_or_raise([NextSentence(a, b) for a, b in pairs])

    def _answer_or_raise(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        answers = []
        for answer in self.answer(items):
            if isinstance(answer, UserError):
                raise answer
            answers.append(answer)
        return answers

    @torch.inference_mode()
    def answer(self, items: Sequence[Item], work: Work | None = None) -> list[Any]:
        """An answer for each item, or the UserError of one that cannot be answered; none harms another.

        A UsageError is the asker's, a DataError the model's: weights that give no finite score. Adds to `work`.
        """
        work = work or Work()
        start = time.perf_counter()
        encoded = self._encode(items)
        work.tokenize_seconds += time.perf_counter() - start
        answers: list[Any] = list(encoded)
        for part in _slices(encoded):
            start = time.perf_counter()
            rows = [(items[index], row) for index, row in part]
            results = self._forward(rows)
            middle = time.perf_counter()
            for (index, row), result in zip(part, results, strict=True):
                answers[index] = self._in_words(items[index], row, result)
            work.tokens += sum(len(row.ids) for _, row in part)
            work.masks += sum(len(row.masks) for _, row in part)
            work.forward_seconds += middle - start
            work.answer_seconds += time.perf_counter() - middle
        return answers

    def encode(self, item: Item) -> Encoded:
        """What the model reads for one item. Raises UsageError."""
        (encoded,) = self._encode([item])
        if isinstance(encoded, UsageError):
            raise encoded
        return encoded

    def _encode(self, items: Sequence[Item]) -> list[Encoded | UsageError]:
        """What the model reads for each item, or why it cannot; one call of the tokenizer for all texts."""
        texts = [
            text
            for item in items
            for text in ((item.text,) if isinstance(item, FillMask) else (item.sentence_a, item.sentence_b))
        ]
        tokens = iter(self.tokenizer.encode_batch(texts))
        encoded: list[Encoded | UsageError] = []
        for item in items:
            parts = [next(tokens)] if isinstance(item, FillMask) else [next(tokens), next(tokens)]
            try:
                encoded.append(
                    self._encode_text(item, *parts) if isinstance(item, FillMask) else self._encode_pair(item, *parts)
                )
            except UsageError as error:
                encoded.append(error)
        return encoded

    def _encode_text(self, item: FillMask, tokens: list[int]) -> Encoded:
        """`[CLS] text [SEP]`; what is too long loses its end, which must hold no mask."""
        over = self._over(item, len(tokens) + 2)
        kept = tokens[: len(tokens) - over]
        lost = tokens.count(MASK) - kept.count(MASK)
        if lost:
            raise UsageError(
                f"'{item.name}' cut to {len(kept)} tokens loses {lost} of its {tokens.count(MASK)} [MASK]s: shorten what is before them"
            )
        ids = [CLS, *kept, SEP]
        masks = [position for position, token_id in enumerate(ids) if token_id == MASK]
        return Encoded(ids, [1] * len(ids), masks, None if item.targets is None else self._target_ids(item.targets))

    def _encode_pair(self, item: NextSentence, a: list[int], b: list[int]) -> Encoded:
        """`[CLS] A [SEP] B [SEP]`; what is too long loses from the end of the longer sentence, as in training."""
        for name, tokens in (("sentence_a", a), ("sentence_b", b)):
            if not tokens:
                raise UsageError(f"'{item.prefix}{name}' has no words in it")
        room = len(a) + len(b) - self._over(item, len(a) + len(b) + 3)
        if len(a) + len(b) > room:
            kept_b = min(len(b), max(room - len(a), room // 2))
            a, b = a[: room - kept_b], b[:kept_b]
        return Encoded([CLS, *a, SEP, *b, SEP], [1] * (len(a) + 2) + [2] * (len(b) + 1), [], None)

    def _over(self, item: Item, length: int) -> int:
        """By how many tokens an item of this length is too long: 0 unless it may be cut."""
        limit = self.model.config.max_positions
        if length > limit and not item.truncate:
            name = (
                f"'{item.name}'"
                if isinstance(item, FillMask)
                else f"'{item.prefix}sentence_a' with 'sentence_b'"
                if item.prefix
                else "the pair"
            )
            raise UsageError(
                f"{name} is {length} tokens long, [CLS] and [SEP] included; the model takes at most {limit}: shorten it, or set 'truncate' to true"
            )
        return max(0, length - limit)

    def _target_ids(self, targets: tuple[str, ...]) -> list[int]:
        """Ids of the targets, each once: of the word itself, or of the one word that the tokenizer makes of it."""
        found, unknown = [], []
        for target in targets:
            token_id = self.tokenizer.id_of(target)
            ids = self.tokenizer.encode(target) if token_id is None else [token_id]
            if len(ids) == 1 and (ids[0] != UNK or token_id == UNK):
                found.append(ids[0])
            else:
                unknown.append(target)
        if unknown:
            raise UsageError(f"'targets' has what is not one word of the vocabulary: {', '.join(map(shown, unknown))}")
        return list(dict.fromkeys(found))

    def _forward(self, rows: list[tuple[Item, Encoded]]) -> list[list[Candidates] | float]:
        """The candidates of each text's masks, or the probability of each pair, from one pass for all of them."""
        longest = max(len(row.ids) for _, row in rows)
        ids_BT, segments_BT = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.int64)
        for own_ids_T, own_segments_T, (_, row) in zip(
            ids_BT.numpy(), segments_BT.numpy(), rows, strict=True
        ):  # a third of the time of torch.tensor
            own_ids_T[: len(row.ids)], own_segments_T[: len(row.segments)] = row.ids, row.segments
        texts = [index for index, (item, _) in enumerate(rows) if isinstance(item, FillMask)]
        pairs = [index for index, (item, _) in enumerate(rows) if isinstance(item, NextSentence)]
        masked = [(index, position) for index in texts for position in rows[index][1].masks]
        query_M = torch.tensor(
            [index * longest + position for index, position in [*masked, *((index, 0) for index in pairs)]]
        )
        hidden_ND, cls_ND = self.model.hidden_at(ids_BT, segments_BT, query_M).split([len(masked), len(pairs)])
        follows = iter(self.model.nsp_logits(cls_ND[:, None]).softmax(-1)[:, 1].tolist() if pairs else ())
        best = iter(
            self._fill(
                hidden_ND,
                [(item.top_k, row.targets) for item, row in rows if isinstance(item, FillMask) for _ in row.masks],
            )
        )
        return [[next(best) for _ in row.masks] if isinstance(item, FillMask) else next(follows) for item, row in rows]

    def _fill(self, hidden_ND: Tensor, asked: list[tuple[int, list[int] | None]]) -> list[Candidates]:
        """The best of the vocabulary, or of the targets, at each of N masks."""
        if not asked:
            return []
        most = max((top_k for top_k, targets in asked if targets is None), default=0)
        # Each row's targets end to end, so that they are read in one go.
        row_X = [n for n, (_, targets) in enumerate(asked) for _ in targets or ()]
        ids_X = [token_id for _, targets in asked for token_id in targets or ()]
        words = self.inference.top_tokens(hidden_ND, most, row_X, ids_X)
        score_X = iter(words.target_scores_X)
        filled = []
        for n, (top_k, targets) in enumerate(asked):
            if targets is None:
                filled.append(Candidates(words.scores_NK[n][:top_k], words.ids_NK[n][:top_k]))
            else:
                ranked = sorted(((next(score_X), token_id) for token_id in targets), key=lambda pair: -pair[0])[:top_k]
                filled.append(Candidates([score for score, _ in ranked], [token_id for _, token_id in ranked]))
        return filled

    def _in_words(self, item: Item, row: Encoded, result: list[Candidates] | float) -> Any:
        if isinstance(result, float):
            return {"is_next": result >= 0.5, "probability": result} if math.isfinite(result) else _not_finite()
        assert isinstance(item, FillMask)
        # A softmax with anything that is not finite in it is NaN throughout: its first number tells.
        if not all(math.isfinite(found.scores[0]) for found in result):
            return _not_finite()
        return self._as_pipeline(row, result) if item.pipeline else self._as_masks(row, result)

    def _as_masks(self, row: Encoded, filled: list[Candidates]) -> dict[str, Any]:
        words = self.tokenizer.tokens(row.ids[1:-1])
        masks = []
        for position, found in zip(row.masks, filled, strict=True):
            candidates = []
            for score, token_id in zip(found.scores, found.ids, strict=True):
                words[position - 1] = token = self.tokenizer.token(token_id)
                candidates.append(
                    {"token": token, "id": token_id, "score": score, "sequence": self.tokenizer.join(words)}
                )
            words[position - 1] = "[MASK]"
            masks.append({"position": position - 1, "candidates": candidates})
        return {"masks": masks}

    def _as_pipeline(self, row: Encoded, filled: list[Candidates]) -> list[Any]:
        """As transformers' FillMaskPipeline: one mask's sequence is without special tokens, that of several is with them."""
        masks = []
        for position, found in zip(row.masks, filled, strict=True):
            candidates = []
            for score, token_id in zip(found.scores, found.ids, strict=True):
                ids = [*row.ids[:position], token_id, *row.ids[position + 1 :]]
                sequence = self.tokenizer.decode([i for i in ids if i != PAD], skip_special=len(filled) == 1)
                candidates.append(
                    {
                        "score": score,
                        "token": token_id,
                        "token_str": self.tokenizer.decode([token_id]),
                        "sequence": sequence,
                    }
                )
            masks.append(candidates)
        return masks[0] if len(masks) == 1 else masks


def _slices(encoded: Sequence[Encoded | UsageError]) -> Iterator[list[tuple[int, Encoded]]]:
    """Which items go through the model together, each with its index: all, in order of length, as long as their padded batch is bounded."""
    readable = [(index, row) for index, row in enumerate(encoded) if isinstance(row, Encoded)]
    part: list[tuple[int, Encoded]] = []
    for index, row in sorted(readable, key=lambda pair: len(pair[1].ids)):
        if part and (len(part) + 1) * len(row.ids) > SLICE_POSITIONS:
            yield part
            part = []
        part.append((index, row))
    if part:
        yield part


def _not_finite() -> DataError:
    return DataError("the model gave no finite score for this input: its weights are damaged; serve another checkpoint")
