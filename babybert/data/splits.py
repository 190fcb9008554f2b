"""A check that the training and the held-out documents of a corpus both have sentence pairs.

Documents are split by a digest. In a small corpus that may leave one split without any document that has pairs; one is
then moved there. A corpus in which both splits have pairs is not changed.
"""

import logging
from collections.abc import Iterable

from babybert.data.blocks import BatchSurvey, MovedText, PairSurvey
from babybert.errors import DataError

logger = logging.getLogger(__name__)


def find_text_to_move(surveys: Iterable[BatchSurvey], documents: int, tokens: int, source: str) -> MovedText | None:
    """Return a text that has to be in the other split; None if both splits have pairs.

    It is the first one in the order of its split, which depends on digests alone. Raises DataError, with what the
    documents of `source` look like, if there are no two different texts that have pairs.

    Args:
        surveys: of all batches; they are asked for only until both splits have pairs.
        documents: how many documents there are.
        tokens: how many tokens they have.
        source: where they are from.
    """
    pairs = (PairSurvey(), PairSurvey())
    unknown = ends = 0
    for survey in surveys:
        pairs = (pairs[0].merge(survey.pairs[0]), pairs[1].merge(survey.pairs[1]))
        unknown += survey.unknown
        ends += survey.ends
        if all(split.first for split in pairs):
            return None
    without_pairs = [index for index, split in enumerate(pairs) if split.first is None]
    if len(without_pairs) == 2:
        raise DataError(f"{source}: no sentence pairs: {_why_no_pairs(documents, tokens, unknown, ends)}")
    held_out = without_pairs[0] == 1
    other = pairs[int(not held_out)]
    assert other.first is not None
    if not other.has_another:
        raise DataError(
            f"{source}: all sentence pairs are from one text or copies of it; "
            "training pairs and held-out pairs must be from different texts, so two are needed"
        )
    split = "held out" if held_out else "trained on"
    logger.info(f"by the digests, no document with sentence pairs would be {split}; one was moved there")
    return MovedText(other.first[1], held_out)


def _why_no_pairs(documents: int, tokens: int, unknown: int, ends: int) -> str:
    """What the documents of a corpus without pairs look like, and what to do."""
    if not documents:
        return "there are no documents"
    if not tokens:
        return f"all {documents:,} documents are empty"
    if unknown == tokens:
        return (
            f"all {unknown:,} tokens are unknown to the tokenizer; use one for this kind of text, "
            "or a larger --vocab-size or a smaller --min-frequency"
        )
    if not ends:
        return (
            "no document has a sentence end that the tokenizer knows (. ! ? or one of another script, "
            "such as U+3002 in Chinese); each sentence must end with one"
        )
    return (
        f"none of the {documents:,} documents has two sentences of at least two tokens each; "
        "a pair is two sentences of one document, so longer documents are needed"
    )
