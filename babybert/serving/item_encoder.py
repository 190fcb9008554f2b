"""From the items of a request to the token ids that the model reads.

A text becomes `[CLS] text [SEP]`, a pair `[CLS] A [SEP] B [SEP]`. An item that is longer than the model's positions is
refused, or cut if its `truncate` is set: a text loses its end, a pair the end of its longer sentence, as in training. A
text to classify is read as in fine-tuning, and loses its middle.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from babybert.config import ClassifierConfig
from babybert.data.classifier_input import SPECIALS_IN_A_TEXT, classifier_input, input_length
from babybert.data.pairs import SPECIALS_IN_A_PAIR, truncate_longest_first
from babybert.data.tokenizer import CLS, MASK, SEP, UNK, Tokenizer
from babybert.errors import UsageError
from babybert.serving.request_schema import (
    NO_CLASSES,
    NOT_PRETRAINED,
    Classify,
    FillMask,
    Item,
    NextSentence,
    quoted,
)


class EncodedItem(NamedTuple):
    """One item as the model reads it.

    Attributes:
        ids: token ids, the special tokens included.
        segments: 1 for `[CLS] A [SEP]` or a text, 2 for `B [SEP]`; as long as `ids`.
        mask_positions: indices of `[MASK]` in `ids`, ascending; empty unless masks are to be filled in.
        target_ids: ids of the only words to be scored, without duplicates; None for the whole vocabulary.
    """

    ids: list[int]
    segments: list[int]
    mask_positions: list[int]
    target_ids: list[int] | None


class ItemEncoder:
    """Encodes items for a model of `max_positions` positions; for a fine-tuned one with its `classifier`."""

    def __init__(self, tokenizer: Tokenizer, max_positions: int, classifier: ClassifierConfig | None = None) -> None:
        self._tokenizer = tokenizer
        self._max_positions = max_positions
        self._classifier = classifier

    def encode(self, items: Sequence[Item]) -> list[EncodedItem | UsageError]:
        """Encode each item, or return the error of one that cannot be encoded."""
        if self._classifier is not None:
            return self._encode_to_classify(items, self._classifier)
        texts: list[str] = []
        for item in items:
            if isinstance(item, FillMask):
                texts.append(item.text)
            elif isinstance(item, NextSentence):
                texts.extend([item.sentence_a, item.sentence_b])
        token_lists = iter(self._tokenizer.encode_batch(texts))  # one call for all texts is faster than one for each
        results: list[EncodedItem | UsageError] = []
        for item in items:
            try:
                if isinstance(item, FillMask):
                    results.append(self._encode_text(item, next(token_lists)))
                elif isinstance(item, NextSentence):
                    results.append(self._encode_pair(item, next(token_lists), next(token_lists)))
                else:
                    results.append(UsageError(NO_CLASSES))
            except UsageError as error:
                results.append(error)
        return results

    def _encode_to_classify(
        self, items: Sequence[Item], classifier: ClassifierConfig
    ) -> list[EncodedItem | UsageError]:
        """Encode texts and pairs as in fine-tuning, where `[MASK]` is ordinary text."""
        texts = [text for item in items if isinstance(item, Classify) for text in (item.text, item.pair) if text]
        token_lists = iter(self._tokenizer.encode_documents(texts))
        results: list[EncodedItem | UsageError] = []
        for item in items:
            if not isinstance(item, Classify):
                results.append(UsageError(NOT_PRETRAINED))
                continue
            a = next(token_lists)
            b = None if item.pair is None else next(token_lists)
            try:
                results.append(self._encode_class_input(item, a, b, classifier))
            except UsageError as error:
                results.append(error)
        return results

    def _encode_class_input(
        self, item: Classify, a: np.ndarray, b: np.ndarray | None, classifier: ClassifierConfig
    ) -> EncodedItem:
        """What the classifier reads. Raises UsageError if a text has no words, or the item is too long."""
        if (b is not None) != classifier.pairs:
            wanted = "pairs" if classifier.pairs else "single texts"
            raise UsageError(f"'{item.name}': this model was trained on {wanted}")
        if not len(a) or (b is not None and not len(b)):
            raise UsageError(f"'{item.name}' has no words in it")
        length = input_length(len(a), None if b is None else len(b))
        if length > classifier.positions and not item.truncate:
            raise self._too_long(f"'{item.name}'", length)
        ids, length_a = classifier_input(a, b, classifier)
        segments = [1] * length_a + [2] * (len(ids) - length_a)
        return EncodedItem(ids.tolist(), segments, mask_positions=[], target_ids=None)

    def _encode_text(self, item: FillMask, tokens: list[int]) -> EncodedItem:
        """`[CLS] text [SEP]`. Raises UsageError if it is too long, or if cutting it would lose a mask."""
        length = len(tokens) + SPECIALS_IN_A_TEXT
        if length > self._max_positions:
            if not item.truncate:
                raise self._too_long(f"'{item.name}'", length)
            tokens = self._cut_text(item, tokens)
        ids = [CLS, *tokens, SEP]
        mask_positions = [position for position, token_id in enumerate(ids) if token_id == MASK]
        target_ids = None if item.targets is None else self._target_ids(item.targets)
        return EncodedItem(ids, [1] * len(ids), mask_positions, target_ids)

    def _cut_text(self, item: FillMask, tokens: list[int]) -> list[int]:
        kept = tokens[: self._max_positions - SPECIALS_IN_A_TEXT]
        masks = tokens.count(MASK)
        lost_masks = masks - kept.count(MASK)
        if lost_masks:
            raise UsageError(
                f"'{item.name}' cut to {len(kept)} tokens loses {lost_masks} of its {masks} [MASK]s: "
                "shorten what is before them"
            )
        return kept

    def _encode_pair(self, item: NextSentence, a: list[int], b: list[int]) -> EncodedItem:
        """`[CLS] A [SEP] B [SEP]`. Raises UsageError if a sentence has no words, or the pair is too long."""
        for name, tokens in (("sentence_a", a), ("sentence_b", b)):
            if not tokens:
                raise UsageError(f"'{item.prefix}{name}' has no words in it")
        length = len(a) + len(b) + SPECIALS_IN_A_PAIR
        if length > self._max_positions:
            if not item.truncate:
                raise self._too_long(
                    f"'{item.prefix}sentence_a' with 'sentence_b'" if item.prefix else "the pair", length
                )
            kept_a, kept_b = truncate_longest_first(len(a), len(b), self._max_positions - SPECIALS_IN_A_PAIR)
            a = a[:kept_a]
            b = b[:kept_b]
        segments = [1] * (len(a) + 2) + [2] * (len(b) + 1)
        return EncodedItem([CLS, *a, SEP, *b, SEP], segments, mask_positions=[], target_ids=None)

    def _too_long(self, name: str, length: int) -> UsageError:
        longest = self._max_positions if self._classifier is None else self._classifier.positions
        return UsageError(
            f"{name} is {length} tokens long, [CLS] and [SEP] included; the model takes at most "
            f"{longest}: shorten it, or set 'truncate' to true"
        )

    def _target_ids(self, targets: tuple[str, ...]) -> list[int]:
        """The id of each target: of the word as it is written, or of the one token that the tokenizer makes of it."""
        target_ids: list[int] = []
        unknown: list[str] = []
        for target in targets:
            token_id = self._tokenizer.id_of(target)
            ids = self._tokenizer.encode(target) if token_id is None else [token_id]
            is_unknown_word = ids == [UNK] and token_id != UNK  # `[UNK]` itself is a valid target
            if len(ids) == 1 and not is_unknown_word:
                target_ids.append(ids[0])
            else:
                unknown.append(target)
        if unknown:
            raise UsageError(f"'targets' has what is not one word of the vocabulary: {', '.join(map(quoted, unknown))}")
        return list(dict.fromkeys(target_ids))
