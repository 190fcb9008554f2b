"""Text to token ids: torchtext's `basic_english` rules with a word-level vocabulary, in Hugging Face `tokenizers`.

The rules lower-case, make `' . , ( ) ! ?` tokens of their own, drop `"`, turn `<br />`, `;` and `:` into spaces, and
split at white space. torchtext is retired; `tokenizers` does the same in Rust (a test compares the two rule for rule;
they part only at the control characters 0x1C to 0x1F, at a final Greek sigma, and at letters newer than this Python).
The whole tokenizer, rules and vocabulary, is one file, `tokenizer.json`, that travels with every checkpoint.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from babybert.errors import DataError

PAD, CLS, SEP, MASK, UNK = range(5)
SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
FIRST_ORDINARY = len(SPECIAL_TOKENS)
SENTENCE_ENDS = (".", "!", "?")

# In torchtext's order: quotes go before `<br />` could be hurt, white space is collapsed last (by the split).
RULES = (("'", " ' "), ('"', ""), (".", " . "), ("<br />", " "), (",", " , "), ("(", " ( "), (")", " ) "),
         ("!", " ! "), ("?", " ? "), (";", " "), (":", " "))  # fmt: skip
NO_LIMIT = 2**31 - 1


class Tokenizer:
    """A fixed vocabulary: `encode_documents` for corpora, `encode` for text from users, `tokens` back again."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        # Asked for with each answer, and the backend makes a copy of its model to tell.
        self._has_pieces = isinstance(backend.model, models.WordPiece)

    @classmethod
    def of_words(cls, words: Sequence[str]) -> "Tokenizer":
        """A `basic_english` tokenizer whose vocabulary is the special tokens and then `words`, in this order."""
        vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *words))}
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), *(normalizers.Replace(a, b) for a, b in RULES)]
        )
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens(list(SPECIAL_TOKENS))
        return cls(backend)

    @classmethod
    def train_wordpiece(cls, texts: Iterable[str], min_frequency: int, vocab_size: int) -> "Tokenizer":
        """A WordPiece tokenizer (Schuster and Nakajima, 2012; as BERT's, uncased) of at most `vocab_size` tokens."""
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.Sequence([normalizers.Replace("<br />", " "), normalizers.BertNormalizer()])
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(SPECIAL_TOKENS), show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read `tokenizer.json`. Raises DataError when it is missing, broken, or has other special tokens."""
        if not path.is_file():
            raise DataError(f"{path}: no such file; a tokenizer is written by `babybert prepare`")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception for whatever is wrong in the file
            raise DataError(f"{path}: not a tokenizer file ({error})") from error
        for token_id, token in enumerate(SPECIAL_TOKENS):
            if backend.id_to_token(token_id) != token:
                raise DataError(
                    f"{path}: id {token_id} is {backend.id_to_token(token_id)!r}; expected the special token {token}"
                )
        return cls(backend)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        path.write_text(self._backend.to_str(), encoding="utf-8")

    @property
    def size(self) -> int:
        """Tokens in the vocabulary, the special ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer file: two tokenizers with the same digest give the same ids."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a user's text, in which `[MASK]` and the other special tokens mean what they say."""
        self._backend.encode_special_tokens = False
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts, in one call."""
        self._backend.encode_special_tokens = False
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def sources(self, text: str) -> list[str]:
        """The part of a user's text that each token of `encode` was made of."""
        self._backend.encode_special_tokens = False
        return [text[start:end] for start, end in self._backend.encode(text, add_special_tokens=False).offsets]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Ids as text, the way that Hugging Face's tokenizers put it."""
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (int32) of each document; "[MASK]" in a document is a word like any other, never a special token."""
        self._backend.encode_special_tokens = True
        return [
            np.array(encoding.ids, np.int32)
            for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def token(self, token_id: int) -> str:
        """The token with this id."""
        token = self._backend.id_to_token(token_id)
        assert token is not None, token_id
        return token

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The tokens with these ids."""
        word: Callable[[int], Any] = self._backend.id_to_token  # without `token`'s check: a text has many
        return [word(int(token_id)) for token_id in ids]

    def id_of(self, token: str) -> int | None:
        """The id of this exact token, or None if the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    @property
    def kind(self) -> str:
        """`wordpiece`, or `basic-english` for whole words."""
        return "wordpiece" if self._has_pieces else "basic-english"

    def join(self, tokens: Iterable[str]) -> str:
        """Tokens as a line of text, with pieces of words put together."""
        text = " ".join(tokens)
        return text.replace(" ##", "") if self._has_pieces else text

    def sentence_end_ids(self) -> np.ndarray:
        """Ids of `. ! ?`, those of them that the vocabulary has."""
        return np.array([i for i in map(self.id_of, SENTENCE_ENDS) if i is not None], np.int32)
