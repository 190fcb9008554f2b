"""Answers from a trained model: which words fit at each `[MASK]`, and does sentence B follow sentence A.

The command line and the TorchServe handler both ask here. A batch of requests of either kind takes one forward pass,
padded together; only `[MASK]` positions reach the vocabulary.

Shapes: B requests, T positions, D width, N masks, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from babybert.data.tokenizer import CLS, MASK, PAD, SEP, Tokenizer
from babybert.errors import UsageError
from babybert.model.bert import BabyBert
from babybert.model.saved import load_model

MAX_TOP_K = 100
DEFAULT_TOP_K = 5


@dataclass(frozen=True)
class FillMask:
    """Which words fit at each `[MASK]` of `text`?"""

    text: str
    top_k: int = DEFAULT_TOP_K

    def __post_init__(self) -> None:
        _require_text("text", self.text)
        if "[MASK]" not in self.text:
            raise UsageError("'text' has no [MASK]; put one where a word is to be found, as in \"the movie was [MASK].\"")
        if type(self.top_k) is not int or not 1 <= self.top_k <= MAX_TOP_K:
            raise UsageError(f"'top_k' is {self.top_k!r}; it must be a whole number from 1 to {MAX_TOP_K}")


@dataclass(frozen=True)
class NextSentence:
    """Does `sentence_b` follow `sentence_a`?"""

    sentence_a: str
    sentence_b: str

    def __post_init__(self) -> None:
        _require_text("sentence_a", self.sentence_a)
        _require_text("sentence_b", self.sentence_b)


Request = FillMask | NextSentence


def parse_request(body: Any) -> Request:
    """The request in a parsed JSON body. Raises UsageError that says what is wrong with it."""
    if not isinstance(body, dict):
        raise UsageError(f"the body must be a JSON object, not {_json_type(body)}")
    kind: type[FillMask] | type[NextSentence]
    if "text" in body:
        kind = FillMask
    elif "sentence_a" in body or "sentence_b" in body:
        kind = NextSentence
    else:
        raise UsageError("the body has neither 'text' (fill-mask) nor 'sentence_a' and 'sentence_b' (next-sentence)")
    fields = dataclasses.fields(kind)
    known = [field.name for field in fields]
    for key in body:
        if key not in known:
            raise UsageError(f"unknown key '{key}'; this task takes {', '.join(known)}")
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in body:
            raise UsageError(f"'{field.name}' is missing; this task takes {', '.join(known)}")
    return kind(**body)


class Predictor:
    """A model ready to answer; deterministic, and each answer its own whatever else is in the batch."""

    def __init__(self, model: BabyBert, tokenizer: Tokenizer) -> None:
        # A server is told to be ready when it is: nothing is to be compiled at the first request.
        self.model = model.eval().choose_kernels("plain")
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> "Predictor":
        """Load the model saved in `folder`. Raises DataError."""
        return cls(*load_model(folder))

    def fill_mask(self, texts: Sequence[str], top_k: int = DEFAULT_TOP_K) -> list[dict[str, Any]]:
        """`{"masks": [{"position", "candidates": [{"token", "id", "score", "sequence"}]}]}` for each text.

        `position` counts the text's tokens from 0; `score` is a probability; `sequence` is the text with the candidate
        in the mask's place. Raises UsageError for the first text that cannot be answered.
        """
        return self._answer_or_raise([FillMask(text, top_k) for text in texts])

    def next_sentence(self, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """`{"is_next": bool, "probability": float}` for each pair: the probability that B follows A. Raises UsageError."""
        return self._answer_or_raise([NextSentence(a, b) for a, b in pairs])

    def answer(self, requests: Sequence[Request]) -> list[dict[str, Any] | UsageError]:
        """An answer for each request, or the error of those that cannot be answered; one never harms another."""
        answers: list[dict[str, Any] | UsageError] = []
        encoded: dict[int, tuple[list[int], list[int]]] = {}
        for index, request in enumerate(requests):
            try:
                encoded[index] = self._encode(request)
                answers.append({})
            except UsageError as error:
                answers.append(error)
        if encoded:
            hidden_BTD = self._hidden([encoded[index] for index in encoded])
            for hidden_TD, index in zip(hidden_BTD, encoded, strict=True):
                request, ids = requests[index], encoded[index][0]
                answers[index] = self._fill(hidden_TD, ids, request.top_k) if isinstance(request, FillMask) else self._follows(hidden_TD)
        return answers

    def _answer_or_raise(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        answers = []
        for answer in self.answer(requests):
            if isinstance(answer, UsageError):
                raise answer
            answers.append(answer)
        return answers

    def _encode(self, request: Request) -> tuple[list[int], list[int]]:
        """Ids and segments of `[CLS] text [SEP]` or `[CLS] A [SEP] B [SEP]`."""
        if isinstance(request, FillMask):
            parts = {"text": self.tokenizer.encode(request.text)}
        else:
            parts = {name: self.tokenizer.encode(getattr(request, name)) for name in ("sentence_a", "sentence_b")}
        ids, segments = [CLS], [1]
        for number, (name, tokens) in enumerate(parts.items(), start=1):
            if not tokens:
                raise UsageError(f"'{name}' has no words in it")
            ids += [*tokens, SEP]
            segments += [number] * (len(tokens) + 1)
        limit = self.model.config.max_positions
        if len(ids) > limit:
            raise UsageError(f"the input is {len(ids)} tokens long, [CLS] and [SEP] included; the model takes at most {limit}: shorten it")
        return ids, segments

    @torch.inference_mode()
    def _hidden(self, encoded: list[tuple[list[int], list[int]]]) -> Tensor:
        longest = max(len(ids) for ids, _ in encoded)
        ids_BT = torch.tensor([ids + [PAD] * (longest - len(ids)) for ids, _ in encoded])
        segments_BT = torch.tensor([segments + [0] * (longest - len(segments)) for _, segments in encoded])
        return self.model(ids_BT, segments_BT)

    @torch.inference_mode()
    def _fill(self, hidden_TD: Tensor, ids: list[int], top_k: int) -> dict[str, Any]:
        positions = [position for position, token_id in enumerate(ids) if token_id == MASK]
        probability_NV = self.model.mlm_logits(hidden_TD[positions]).softmax(-1)
        best = probability_NV.topk(min(top_k, probability_NV.shape[1]))
        words = self.tokenizer.tokens(ids)[1:-1]
        masks = []
        for position, scores, best_ids in zip(positions, best.values.tolist(), best.indices.tolist(), strict=True):
            candidates = []
            for score, token_id in zip(scores, best_ids, strict=True):
                token = self.tokenizer.token(token_id)
                sequence = self.tokenizer.join([*words[: position - 1], token, *words[position:]])
                candidates.append({"token": token, "id": token_id, "score": score, "sequence": sequence})
            masks.append({"position": position - 1, "candidates": candidates})
        return {"masks": masks}

    @torch.inference_mode()
    def _follows(self, hidden_TD: Tensor) -> dict[str, Any]:
        probability = self.model.nsp_logits(hidden_TD[None]).softmax(-1)[0, 1].item()
        return {"is_next": probability >= 0.5, "probability": probability}


def _require_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise UsageError(f"'{name}' must be a string, not {_json_type(value)}")
    if not value.strip():
        raise UsageError(f"'{name}' is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"'{name}' has half of a surrogate pair, which is not a character") from None


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), "that")
