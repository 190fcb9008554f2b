"""From the items of a request to the token ids that the model reads.

A text becomes `[CLS] text [SEP]`, a pair `[CLS] A [SEP] B [SEP]`. An item that is longer than the model's positions is
refused, or cut if its `truncate` is set: a text loses its end, a pair the end of its longer sentence, as in training.
"""

from collections.abc import Sequence
from typing import NamedTuple

from babybert.data.pairs import SPECIALS_IN_A_PAIR, truncate_longest_first
from babybert.data.tokenizer import CLS, MASK, SEP, UNK, Tokenizer
from babybert.errors import UsageError
from babybert.serving.request_schema import FillMask, Item, NextSentence, quoted

SPECIALS_IN_A_TEXT = 2  # [CLS] text [SEP]


class EncodedItem(NamedTuple):
    """One item as the model reads it.

    Attributes:
        ids: token ids, the special tokens included.
        segments: 1 for `[CLS] A [SEP]` or a text, 2 for `B [SEP]`; as long as `ids`.
        mask_positions: indices of `[MASK]` in `ids`, ascending; empty for a pair, whose masks are not filled in.
        target_ids: ids of the only words to be scored, without duplicates; None for the whole vocabulary.
    """

    ids: list[int]
    segments: list[int]
    mask_positions: list[int]
    target_ids: list[int] | None


class ItemEncoder:
    """Encodes items for a model of `max_positions` positions."""

    def __init__(self, tokenizer: Tokenizer, max_positions: int) -> None:
        self._tokenizer = tokenizer
        self._max_positions = max_positions

    def encode(self, items: Sequence[Item]) -> list[EncodedItem | UsageError]:
        """Encode each item, or return the error of one that cannot be encoded."""
        texts: list[str] = []
        for item in items:
            texts.extend([item.text] if isinstance(item, FillMask) else [item.sentence_a, item.sentence_b])
        token_lists = iter(self._tokenizer.encode_batch(texts))  # one call for all texts is faster than one for each
        results: list[EncodedItem | UsageError] = []
        for item in items:
            try:
                if isinstance(item, FillMask):
                    results.append(self._encode_text(item, next(token_lists)))
                else:
                    results.append(self._encode_pair(item, next(token_lists), next(token_lists)))
            except UsageError as error:
                results.append(error)
        return results

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
        return UsageError(
            f"{name} is {length} tokens long, [CLS] and [SEP] included; the model takes at most "
            f"{self._max_positions}: shorten it, or set 'truncate' to true"
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
