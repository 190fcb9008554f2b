"""Text of any size for benchmarks: generated as it is read, and never stored.

Words are drawn by Zipf's law, sentences of 4 to 30 of them are put into a pool, and a document is 12 sentences drawn
from the pool. So a document costs a few microseconds, and the number of distinct words does not grow with the corpus.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from babybert.corpus.readers import Document
from babybert.corpus.sources import SourceFiles
from babybert.progress import Progress

WORDS = 100_000
SENTENCES_OF_POOL = 50_000
SENTENCES_OF_DOCUMENT = 12
DOCUMENTS_AT_ONCE = 1000
LETTERS = "etaoinshrdlucmfwypvbgk"


@dataclass(frozen=True)
class GeneratedText:
    """A `Corpus` of about `size` bytes. The same seed gives the same documents, and a larger one starts with them."""

    size: int
    seed: int = 0

    @property
    def files(self) -> SourceFiles:
        """No files."""
        return SourceFiles()

    def require_documents(self, count: int) -> None:
        """There are always some."""

    def documents(self, task: str) -> Iterator[Document]:
        """Yield documents until their size is reached."""
        rng = np.random.default_rng(self.seed)
        pool = make_sentences(rng)
        produced = 0
        with Progress(task, self.size, "bytes") as progress:
            for first in itertools.count(0, DOCUMENTS_AT_ONCE):
                choices = rng.integers(len(pool), size=(DOCUMENTS_AT_ONCE, SENTENCES_OF_DOCUMENT)).tolist()
                for index, choice in enumerate(choices, first):
                    text = " ".join([pool[sentence] for sentence in choice])
                    yield Document(f"generated document {index}", text)
                    progress.advance(len(text))
                    produced += len(text)
                    if produced >= self.size:
                        return


def make_sentences(rng: np.random.Generator) -> list[str]:
    """Return the sentences of the pool."""
    # The k-th most frequent word has a share of 1/k, and more letters the larger k is.
    word_lengths = (rng.integers(2, 5, WORDS) + np.log10(1 + np.arange(WORDS))).astype(int)
    letters = rng.choice(list(LETTERS), (WORDS, int(word_lengths.max()))).tolist()
    words = ["".join(row[:length]) for row, length in zip(letters, word_lengths.tolist(), strict=True)]
    shares = 1 / np.arange(1, WORDS + 1)
    lengths = rng.integers(4, 31, SENTENCES_OF_POOL)
    drawn = rng.choice(WORDS, int(lengths.sum()), p=shares / shares.sum()).tolist()
    sentences = []
    start = 0
    for length in lengths.tolist():
        sentences.append(" ".join([words[rank] for rank in drawn[start : start + length]]).capitalize() + ".")
        start += length
    return sentences
