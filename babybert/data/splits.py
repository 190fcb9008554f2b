"""A check that the training and the held-out documents of a corpus both have sentence pairs.

The spool splits documents by a digest. In a small corpus that may leave one split without any document that has pairs;
one is then moved there. A corpus in which both splits have pairs is not changed.
"""

import logging
from collections.abc import Iterator

import numpy as np

from babybert.data.sentences import TokenizedDocuments, split_sentences
from babybert.data.spool import Spool
from babybert.data.tokenizer import UNK, Tokenizer
from babybert.errors import DataError

logger = logging.getLogger(__name__)


def ensure_pairs_in_both_splits(spool: Spool, tokenizer: Tokenizer, final_ids: np.ndarray | None, source: str) -> None:
    """Move a document, with its copies, to a split in which no document has pairs.

    It is the first one in the order of the other split, which depends on digests alone. Raises DataError, with what the
    documents of `source` look like, if there are no two different texts that have pairs.
    """
    end_ids = tokenizer.sentence_end_ids()

    def texts(held_out: bool) -> Iterator[int]:
        return _texts_with_pairs(spool.blocks(held_out, final_ids), end_ids)

    without_pairs = [held_out for held_out in (False, True) if next(texts(held_out), None) is None]
    if not without_pairs:
        return
    if len(without_pairs) == 2:
        raise DataError(f"{source}: no sentence pairs: {_why_no_pairs(spool, tokenizer, final_ids)}")
    (held_out,) = without_pairs
    candidates = texts(not held_out)
    first = next(candidates)
    if all(text == first for text in candidates):
        raise DataError(
            f"{source}: all sentence pairs are from one text or copies of it; "
            "training pairs and held-out pairs must be from different texts, so two are needed"
        )
    spool.move(first, held_out)
    split = "held out" if held_out else "trained on"
    logger.info(f"by the digests, no document with sentence pairs would be {split}; one was moved there")


def _texts_with_pairs(blocks: Iterator[TokenizedDocuments], end_ids: np.ndarray) -> Iterator[int]:
    """Yield the numbers of the texts that have two sentences; a text with more of them several times."""
    for block in blocks:
        sentences = split_sentences(block, end_ids)
        has_next = sentences.document[1:] == sentences.document[:-1]
        yield from sentences.text[1:][has_next].tolist()


def _why_no_pairs(spool: Spool, tokenizer: Tokenizer, final_ids: np.ndarray | None) -> str:
    """What the documents of a corpus without pairs look like, and what to do."""
    documents = sum(spool.documents.values())
    if not documents:
        return "there are no documents"
    if not spool.tokens:
        return f"all {documents:,} documents are empty"
    end_ids = tokenizer.sentence_end_ids()
    unknown = ends = 0
    for held_out in (False, True):
        for block in spool.blocks(held_out, final_ids):
            unknown += int(np.count_nonzero(block.tokens == UNK))
            ends += int(np.count_nonzero(np.isin(block.tokens, end_ids)))
    if unknown == spool.tokens:
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
