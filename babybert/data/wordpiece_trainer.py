"""Train a WordPiece vocabulary from word counts, so that equal texts give equal vocabularies.

Pieces are made by byte-pair encoding (Sennrich, Haddow and Birch, 2016). Each word starts as its characters, with the
prefix `##` inside the word. Then the most frequent pair of neighbours becomes one piece, again and again, until the
vocabulary is full. `WordPieceTrainer` of Hugging Face's `tokenizers` does the same, but breaks ties in the order of a
hash map, which differs between processes. Here, ties are broken by spelling. A test compares the two.

The result depends on how often each word occurs, and not on the order of the texts, nor on the processes that count
them.
"""

import heapq
import itertools
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Mapping

from babybert.data.sentence_splitter import LINE_BREAK
from babybert.data.tokenizer import FIRST_ORDINARY, MAX_WORD_CHARACTERS, Tokenizer

logger = logging.getLogger(__name__)

Pair = tuple[str, str]

INSIDE = "##"  # prefix of a piece that continues a word
WHITE_SPACE = re.compile("[ \t\n\r]+")  # BERT removes other ASCII control characters, which joins what is beside them
CHUNK_CHARACTERS = 1 << 26  # of text, whose distinct chunks are in memory until they are split into words
MOST_CHARACTERS = 1 << 30  # of text to train on; more of it would hardly change the vocabulary
BITS_PER_LEVEL = 2
MOST_WORDS = 1_000_000  # the most frequent ones are trained on: rarer ones hardly matter, and would fill the memory


class ChunkCounts:
    """How often each chunk of text between white space occurs, by the level of the document that it is in.

    Three quarters of the documents have level 0, three quarters of the others level 1, and so on; a digest of the text
    decides. So the documents from some level on are a sample that depends on the texts alone.

    Attributes:
        chunks: the counts, by level.
        characters: how much text was counted, by level.
    """

    def __init__(self) -> None:
        self.chunks: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self.characters: Counter[int] = Counter()

    def add(self, text: str, level: int = 0) -> None:
        """Count the chunks of one document."""
        self.chunks[level].update(WHITE_SPACE.split(text.replace(LINE_BREAK, " ")))
        self.characters[level] += len(text)

    def merge(self, others: "ChunkCounts") -> None:
        """Add what another process has counted."""
        for level, chunks in others.chunks.items():
            self.chunks[level].update(chunks)
        self.characters.update(others.characters)

    def drop(self, level: int) -> None:
        """Forget the documents of this level."""
        self.chunks.pop(level, None)
        self.characters.pop(level, None)


def level_of(digest: int) -> int:
    """Return the level of a text with this digest of 64 bits; see `ChunkCounts`."""
    return (64 - digest.bit_length()) // BITS_PER_LEVEL


class WordPieceTrainer:
    """Count the words of texts with `add` or `merge`, then train with `finish`.

    If the texts have more than `MOST_CHARACTERS`, a sample of them is trained on: all documents from the first level on
    from which they have fewer.
    """

    def __init__(self) -> None:
        self._splitter = Tokenizer.of_pieces(())
        self._counts = ChunkCounts()  # of the text whose chunks have not been split into words yet
        self._word_counts: defaultdict[int, Counter[str]] = defaultdict(Counter)  # by level
        self._characters: Counter[int] = Counter()  # all text so far, by level
        self._first_level = 0

    def add(self, text: str) -> None:
        """Count the words of one document."""
        counts = ChunkCounts()
        counts.add(text)
        self.merge(counts)

    def merge(self, counts: ChunkCounts) -> None:
        """Add the words of some documents."""
        self._counts.merge(counts)
        self._characters.update(counts.characters)
        for level in range(self._first_level):
            self._drop(level)
        while sum(self._characters.values()) > MOST_CHARACTERS and len(self._characters) > 1:
            level = min(self._characters)
            self._drop(level)
            self._first_level = level + 1
        if sum(self._counts.characters.values()) > CHUNK_CHARACTERS:
            self._split_chunks()

    def word_counts(self) -> Counter[str]:
        """Return how often each word has occurred. Words of more than `MAX_WORD_CHARACTERS` are left out."""
        merged = ChunkCounts()  # levels do not matter any more, and one is split faster than several
        for chunks in self._counts.chunks.values():
            merged.chunks[0].update(chunks)
        self._counts = merged
        self._split_chunks()
        return sum(self._word_counts.values(), Counter[str]())

    def finish(self, min_frequency: int, vocab_size: int) -> Tokenizer:
        """Make the tokenizer.

        Args:
            min_frequency: pairs that are rarer do not become a piece.
            vocab_size: the most tokens, special tokens included.
        """
        if self._first_level:
            logger.info(f"the vocabulary is trained on a sample of {sum(self._characters.values()):,} characters")
        return Tokenizer.of_pieces(train_pieces(self.word_counts(), min_frequency, vocab_size - FIRST_ORDINARY))

    def _drop(self, level: int) -> None:
        """Forget the documents of a level that is not part of the sample."""
        self._counts.drop(level)
        self._word_counts.pop(level, None)
        self._characters.pop(level, None)

    def _split_chunks(self) -> None:
        # Chunks between white space are counted first: only distinct ones must be split by the rules of BERT.
        for level, chunks in self._counts.chunks.items():
            for chunk, count in chunks.items():
                for word in self._splitter.words(chunk):
                    if len(word) <= MAX_WORD_CHARACTERS:
                        self._word_counts[level][word] += count
        self._counts = ChunkCounts()


def train_pieces(word_counts: Mapping[str, int], min_frequency: int, most_pieces: int) -> list[str]:
    """Return at most `most_pieces` pieces: single characters in the order of code points, then longer ones as merged.

    Pairs that are rarer than `min_frequency` are not merged.
    """
    words = sorted(word_counts.items(), key=lambda word: (-word[1], word[0]))
    pieces = _choose_alphabet(words, most_pieces)
    known = set(pieces)
    pairs = _PairCounts()
    for word, count in itertools.islice(words, MOST_WORDS):
        characters = [word[0], *(INSIDE + character for character in word[1:])]
        if known.issuperset(characters):  # all other words become [UNK]
            pairs.add(characters, count)
    while len(pieces) < most_pieces:
        pair, count = pairs.most_frequent()
        if count < min_frequency or not count:
            break
        piece = pairs.merge(pair)
        if piece not in known:  # two different pairs can make the same piece
            known.add(piece)
            pieces.append(piece)
    return pieces


def _choose_alphabet(words: list[tuple[str, int]], most_pieces: int) -> list[str]:
    """Return the characters as pieces, each as the start of a word and, if it occurs there, with `##`.

    If there are more than `most_pieces`, the most frequent characters get half of that, and the rest is for merges.
    """
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for word, count in words:
        inside.update(word[1:])
        for character in word:
            counts[character] += count
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    forms = [(c, INSIDE + c) if c in inside else (c,) for c in by_frequency]
    ends = list(itertools.accumulate(map(len, forms)))  # how many pieces each character and those before it need
    if ends and ends[-1] > most_pieces:
        kept = sum(end <= most_pieces // 2 for end in ends)
        logger.warning(
            f"the vocabulary of {most_pieces + FIRST_ORDINARY:,} tokens is too small for all {len(forms):,} characters "
            f"of the texts: words with one of the {len(forms) - kept:,} rarest become [UNK]; to keep them, set "
            f"vocab_size to more than {ends[-1] + FIRST_ORDINARY:,}"
        )
        forms = forms[:kept]
    return sorted(itertools.chain.from_iterable(forms), key=lambda piece: (piece.startswith(INSIDE), piece))


class _PairCounts:
    """Words as sequences of pieces, and how often each pair of neighbouring pieces occurs in them."""

    def __init__(self) -> None:
        self._words: list[list[str]] = []
        self._frequencies: list[int] = []
        self._counts: defaultdict[Pair, int] = defaultdict(int)
        # Indices of the words that have the pair. Some may have it no longer, and some may be listed twice.
        self._places: defaultdict[Pair, list[int]] = defaultdict(list)
        self._queue: list[tuple[int, str, Pair]] = []

    def add(self, pieces: list[str], frequency: int) -> None:
        """Add a word that occurs `frequency` times. All words must be added before the first merge."""
        for pair in itertools.pairwise(pieces):
            self._counts[pair] += frequency
            self._places[pair].append(len(self._words))
        self._words.append(pieces)
        self._frequencies.append(frequency)

    def most_frequent(self) -> tuple[Pair, int]:
        """Return the most frequent pair and its count; of equally frequent ones, the first by the merged spelling.

        The count is 0 if there is no pair.
        """
        if not self._queue:
            self._queue = [_queue_entry(pair, count) for pair, count in self._counts.items()]
            heapq.heapify(self._queue)
        while self._queue:
            negative_count, _, pair = heapq.heappop(self._queue)
            count = self._counts.get(pair, 0)
            if count == -negative_count:
                return pair, count
            if count:  # it has become rarer since it was queued
                heapq.heappush(self._queue, _queue_entry(pair, count))
        return ("", ""), 0

    def merge(self, pair: Pair) -> str:
        """Replace `pair` by one piece in all words, and return the piece."""
        merged = _join(pair)
        changes: defaultdict[Pair, int] = defaultdict(int)
        for index in self._places.pop(pair):
            before = self._words[index]
            after = _replace(before, pair, merged)
            if len(after) == len(before):
                continue
            self._words[index] = after
            frequency = self._frequencies[index]
            for old_pair in itertools.pairwise(before):
                changes[old_pair] -= frequency
            for new_pair in itertools.pairwise(after):
                changes[new_pair] += frequency
                if merged in new_pair:
                    self._places[new_pair].append(index)
        for changed, change in changes.items():
            self._counts[changed] += change
            if not self._counts[changed]:
                del self._counts[changed]
            elif change > 0:
                heapq.heappush(self._queue, _queue_entry(changed, self._counts[changed]))
        return merged


def _queue_entry(pair: Pair, count: int) -> tuple[int, str, Pair]:
    return -count, _join(pair), pair


def _join(pair: Pair) -> str:
    first, second = pair
    return first + second.removeprefix(INSIDE)


def _replace(pieces: list[str], pair: Pair, merged: str) -> list[str]:
    first, second = pair
    result: list[str] = []
    for piece in pieces:
        if piece == second and result and result[-1] == first:
            result[-1] = merged
        else:
            result.append(piece)
    return result
