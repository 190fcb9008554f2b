"""Text to token ids: torchtext's `basic_english` rules with a word-level vocabulary, or WordPiece.

The `basic_english` rules lowercase the text, make `' . , ( ) ! ?` separate tokens, drop `"`, replace `<br />`, `;` and
`:` by spaces, and split at white space. torchtext is retired, so Hugging Face's `tokenizers` applies the rules, in
Rust. A test compares both rule by rule: they differ only at the control characters 0x1C to 0x1F, at a final Greek
sigma, at letters that are newer than this Python's Unicode tables, and at sentence ends outside ASCII. These become
separate tokens like `. ! ?`, because Chinese, for example, has no spaces at which they could be split off. A tokenizer
has this rule only if its corpus has such a character (IMDB has none), so other corpora keep their `tokenizer.json`.

A word of more than `MAX_WORD_CHARACTERS` characters is never in the vocabulary, so it becomes `[UNK]`.

Rules and vocabulary are one file, `tokenizer.json`, which is part of every dataset and checkpoint.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from babybert.data.sentence_ends import OTHER_SENTENCE_ENDS, SENTENCE_ENDS
from babybert.data.sentence_splitter import CLOSERS, LINE_BREAK, SentenceSplitter
from babybert.data.sentences import TokenizedText, ends_after
from babybert.errors import DataError

PAD, CLS, SEP, MASK, UNK = range(5)
SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
FIRST_ORDINARY = len(SPECIAL_TOKENS)  # the smallest id that is not one of a special token
# Longer words are data, such as an inline picture. 100 is the limit of BERT's WordPiece; IMDB's longest word has 76.
MAX_WORD_CHARACTERS = 100
# Only a text with such a run can have a longer word: lower case and BERT's rules turn one character into four at most.
LONG_RUN = re.compile(rf"[^ \t\n\r]{{{MAX_WORD_CHARACTERS // 4 + 1}}}")

# In torchtext's order. It matters: `"` is dropped before `<br />` is looked for.
RULES = (("'", " ' "), ('"', ""), (".", " . "), (LINE_BREAK, " "), (",", " , "), ("(", " ( "), (")", " ) "),
         ("!", " ! "), ("?", " ? "), (";", " "), (":", " "))  # fmt: skip


class Tokenizer:
    """Text to ids and back, with a fixed vocabulary.

    `encode` and `encode_batch` are for requests, where `[MASK]` is the special token; `encode_documents` is for
    corpora, where it is ordinary text.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        # Kept, because `backend.model` copies the model on every access, and each prediction asks.
        self._is_wordpiece = isinstance(backend.model, models.WordPiece)

    @classmethod
    def of_words(cls, words: Sequence[str], splits_other_ends: bool = False) -> "Tokenizer":
        """Make a `basic_english` tokenizer with the special tokens and then `words`, in this order.

        `splits_other_ends` makes sentence ends outside ASCII separate tokens, too.
        """
        vocabulary = {token: token_id for token_id, token in enumerate((*SPECIAL_TOKENS, *words))}
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        replacements = [normalizers.Replace(old, new) for old, new in RULES]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *replacements])
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if splits_other_ends:
            other_end = tokenizers.Regex(f"[{''.join(OTHER_SENTENCE_ENDS)}]")
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(other_end, "isolated")]
            )
        backend.add_special_tokens(list(SPECIAL_TOKENS))
        return cls(backend)

    @classmethod
    def of_pieces(cls, pieces: Sequence[str]) -> "Tokenizer":
        """Make a WordPiece tokenizer, uncased as BERT's, with the special tokens and then `pieces`, in this order."""
        vocabulary = {token: token_id for token_id, token in enumerate((*SPECIAL_TOKENS, *pieces))}
        model = models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS)
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = normalizers.Sequence([normalizers.Replace(LINE_BREAK, " "), normalizers.BertNormalizer()])
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        backend.add_special_tokens(list(SPECIAL_TOKENS))
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read `tokenizer.json`. Raises DataError if it is missing, damaged, or has other special tokens."""
        if not path.is_file():
            raise DataError(f"{path}: no such file; a tokenizer is written by `babybert prepare`")
        try:
            # Not `from_file`, which opens only paths that are UTF-8.
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # tokenizers raises bare Exception, whatever is wrong with the file
            raise DataError(f"{path}: not a tokenizer file ({error})") from error
        for token_id, token in enumerate(SPECIAL_TOKENS):
            if backend.id_to_token(token_id) != token:
                raise DataError(
                    f"{path}: id {token_id} is {backend.id_to_token(token_id)!r}; expected the special token {token}"
                )
        return cls(backend)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        path.write_bytes(self.json)

    @classmethod
    def of_json(cls, content: bytes) -> "Tokenizer":
        """Make a tokenizer of the content of a `tokenizer.json` that `json` returned."""
        return cls(tokenizers.Tokenizer.from_buffer(content))

    @functools.cached_property
    def json(self) -> bytes:
        """The content of `tokenizer.json`."""
        return self._backend.to_str().encode()

    @property
    def size(self) -> int:
        """Number of tokens in the vocabulary, special tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer file: tokenizers with the same digest give the same ids."""
        return hashlib.sha256(self.json).hexdigest()

    @property
    def kind(self) -> str:
        """`wordpiece`, or `basic-english` for whole words."""
        return "wordpiece" if self._is_wordpiece else "basic-english"

    def encode(self, text: str) -> list[int]:
        """Return the ids of a request's text, in which `[MASK]` and the like are special tokens."""
        self._backend.encode_special_tokens = False
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Apply `encode` to several texts in one call, which is faster."""
        self._backend.encode_special_tokens = False
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids (int32) of each document; `[MASK]` in a document is ordinary text, not a special token."""
        self._backend.encode_special_tokens = True
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_sentences(self, texts: Sequence[str]) -> list[TokenizedText]:
        """Return the ids of each document, as `encode_documents` does, and where its sentences end in the text."""
        documents = [self._splitter.split(text) for text in texts]
        self._backend.encode_special_tokens = True
        encodings = self._backend.encode_batch_fast(list(itertools.chain(*documents)), add_special_tokens=False)
        all_ids = iter([encoding.ids for encoding in encodings])
        parts_of_documents = [list(itertools.islice(all_ids, len(document))) for document in documents]
        return [
            TokenizedText(np.array(list(itertools.chain(*parts)), np.int32), ends_after(parts))
            for parts in parts_of_documents
        ]

    @functools.cached_property
    def _splitter(self) -> SentenceSplitter:
        ends = [end for end in SENTENCE_ENDS if self.words(f"a{end}a") == ["a", end, "a"]]
        return SentenceSplitter([*ends, *(closer for closer in CLOSERS if self.words(f".{closer}a")[-1] == "a")])

    def words(self, document: str) -> list[str]:
        """Return the words of a document, before WordPiece splits them into pieces."""
        normalizer, pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        normalized = normalizer.normalize_str(document) if normalizer else document
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(normalized)] if pre_tokenizer else [normalized]

    def count_long_words(self, document: str) -> int:
        """Return how many words of a document are `[UNK]` because they have more than `MAX_WORD_CHARACTERS`."""
        if not LONG_RUN.search(document):
            return 0
        long_words = [word for word in self.words(document) if len(word) > MAX_WORD_CHARACTERS]
        return sum(self.id_of(word) is None for word in long_words)  # earlier versions had them in the vocabulary

    def sources(self, text: str) -> list[str]:
        """Return the part of a request's text that each token of `encode` stands for."""
        self._backend.encode_special_tokens = False
        return [text[start:end] for start, end in self._backend.encode(text, add_special_tokens=False).offsets]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Turn ids into text as Hugging Face's tokenizers do."""
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str:
        """Return the token with this id, which must be in the vocabulary."""
        token = self._backend.id_to_token(token_id)
        assert token is not None, token_id
        return token

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the tokens with these ids."""
        id_to_token: Callable[[int], Any] = self._backend.id_to_token  # without the check of `token`, for speed
        return [id_to_token(int(token_id)) for token_id in ids]

    def id_of(self, token: str) -> int | None:
        """Return the id of exactly this token, or None if it is not in the vocabulary."""
        return self._backend.token_to_id(token)

    def continuation_flags(self) -> np.ndarray:
        """Return which tokens (V, bool) continue the word of the token before them: WordPiece's `##` pieces."""
        if not self._is_wordpiece:
            return np.zeros(self.size, bool)
        return np.array([token.startswith("##") for token in self.tokens(range(self.size))])

    def join(self, tokens: Iterable[str]) -> str:
        """Join tokens with spaces; the pieces of a word are put together."""
        text = " ".join(tokens)
        return text.replace(" ##", "") if self._is_wordpiece else text

    def sentence_end_ids(self) -> np.ndarray:
        """Return the ids (int32) of the sentence ends that are in the vocabulary."""
        ids = [self.id_of(token) for token in SENTENCE_ENDS]
        return np.array([token_id for token_id in ids if token_id is not None], np.int32)
