"""`babybert prepare`: a corpus to a folder that training can rely on.

The folder holds `tokenizer.json`, `train.csv`, `validation.csv`, `vocabulary.csv` (token counts of the training pairs:
the unigram baseline) and, last, `dataset.json` with counts, seeds and each file's SHA-256. A folder without
`dataset.json` is not a dataset, so what a killed or failed `prepare` leaves can never be taken for one. All token ids
are held in memory at once: 13.4 million for IMDB, 54 MB.
"""

import csv
import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from babybert import __version__
from babybert.config import PrepareConfig
from babybert.data.corpus import Document, demo_documents, imdb_documents, spread
from babybert.data.masking import mask_tokens
from babybert.data.pairs import Corpus, assemble, make_pairs, split_sentences
from babybert.data.table import Examples, read_table, write_table
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, StorageError, UsageError
from babybert.progress import Progress, say, track

FORMAT = 1
SPLITS = ("train", "validation")
DOCUMENTS_AT_ONCE = 1000


@dataclass(frozen=True)
class Dataset:
    """A folder that `prepare` finished, with its verified description."""

    folder: Path
    facts: dict[str, Any]
    tokenizer: Tokenizer

    def examples(self, split: str) -> Examples:
        """Read `train` or `validation`. Raises DataError if the file is not the one that was written."""
        path = self.folder / f"{split}.csv"
        _verify(path, self.facts["files"][path.name])
        return read_table(path, self.tokenizer.size)

    def token_counts(self) -> np.ndarray:
        """How often each token stands in the training pairs (int64, one a token id). Raises DataError."""
        path = self.folder / "vocabulary.csv"
        _verify(path, self.facts["files"][path.name])
        with path.open(newline="", encoding="utf-8") as file:
            return np.array([int(row["count"]) for row in csv.DictReader(file)], np.int64)


def open_dataset(folder: Path) -> Dataset:
    """Open a prepared folder. Raises DataError when it is missing, unfinished, or of another format."""
    path = folder / "dataset.json"
    if not path.is_file():
        raise DataError(f"{folder}: no dataset.json, so no (or not wholly) prepared data; run `babybert prepare --out {folder}`")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise DataError(f"{path}: format {facts['format']}; this version reads format {FORMAT}: prepare the data again")
        _verify(folder / "tokenizer.json", facts["files"]["tokenizer.json"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a description of prepared data ({error!r}); prepare the data again") from error
    return Dataset(folder, facts, Tokenizer.load(folder / "tokenizer.json"))


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare the data that `config` asks for and return what `dataset.json` records.

    Raises DataError for a corpus that cannot be used, UsageError if the folder has data already, StorageError if
    the disk cannot take it. Whichever it is, data that was in the folder is still there.
    """
    if (config.out / "dataset.json").exists() and not config.overwrite:
        raise UsageError(f"{config.out}: has prepared data already; add --overwrite to replace it, or choose another --out")
    documents = spread(_read_documents(config), config.limit)
    say(f"{len(documents):,} documents, {sum(len(d.text) for d in documents) / 1e6:.1f} MB")
    partial = config.out / ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        facts = _write_all(config, documents, partial)
        (config.out / "dataset.json").unlink(missing_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "dataset.json"):
            path.replace(config.out / path.name)
    except OSError as error:
        raise StorageError(f"{config.out}: cannot write the data: {error.strerror}; make room or choose another --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def _read_documents(config: PrepareConfig) -> list[Document]:
    if config.corpus == "demo":
        return demo_documents(config.demo_documents, config.seed)
    assert config.source is not None  # PrepareConfig has seen to it
    return imdb_documents(config.source)


def _write_all(config: PrepareConfig, documents: list[Document], folder: Path) -> dict[str, Any]:
    texts = [document.text for document in documents]
    tokenizer = Tokenizer.train(track(texts, "vocabulary", len(texts), "documents"), config.min_frequency)
    tokenizer.save(folder / "tokenizer.json")
    encoded = _encode(tokenizer, texts)
    held_out = np.array([_is_held_out(text, config) for text in texts])
    facts: dict[str, Any] = {
        "format": FORMAT,
        "babybert": __version__,
        "corpus": config.corpus,
        "generated": config.corpus == "demo",
        "source": str(config.source) if config.source else "built-in grammar",
        "seed": config.seed,
        "max_positions": config.max_positions,
        "vocabulary": tokenizer.size,
        "tokens": sum(map(len, encoded)),
        "tokenizer_digest": tokenizer.digest,
    }
    for number, split in enumerate(SPLITS):
        own = [ids for ids, out in zip(encoded, held_out, strict=True) if out == (split == "validation")]
        examples, sentences = _make_examples(own, tokenizer, config, stream=number)
        if not len(examples):
            raise DataError(f"{facts['source']}: {len(own)} {split} documents give no sentence pairs; more or longer documents are needed")
        write_table(folder / f"{split}.csv", examples)
        facts[split] = _describe(own, sentences, examples)
        if split == "train":
            _write_vocabulary(folder / "vocabulary.csv", tokenizer, examples.token_counts(tokenizer.size))
    facts["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    (folder / "dataset.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    encoded: list[np.ndarray] = []
    with Progress("tokenize", len(texts), "documents") as progress:
        for first in range(0, len(texts), DOCUMENTS_AT_ONCE):
            encoded += tokenizer.encode_documents(texts[first : first + DOCUMENTS_AT_ONCE])
            progress.advance(len(encoded) - first)
    return encoded


def _is_held_out(text: str, config: PrepareConfig) -> bool:
    """A function of the text and the seed alone, so that two copies of one review land on the same side."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=config.seed.to_bytes(16, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64 < config.validation_fraction


def _make_examples(documents: list[np.ndarray], tokenizer: Tokenizer, config: PrepareConfig, stream: int) -> tuple[Examples, int]:
    corpus = Corpus.of(documents)
    sentences = split_sentences(corpus, tokenizer.sentence_end_ids())
    pairs = make_pairs(corpus, sentences, config.seed, stream)
    ids, segments, offsets = assemble(corpus, sentences, pairs, config.max_positions)
    masked, labels = mask_tokens(ids, offsets, tokenizer.size, seed=config.seed, epoch=stream)
    return Examples(masked, labels, segments, offsets, pairs.is_next), len(sentences)


def _describe(documents: list[np.ndarray], sentences: int, examples: Examples) -> dict[str, Any]:
    lengths = np.diff(examples.offsets)
    return {
        "documents": len(documents),
        "sentences": sentences,
        "pairs": len(examples),
        "is_next_share": round(float(examples.is_next.mean()), 4),
        "tokens_in_pairs": int(lengths.sum()),
        "masked_tokens": int(np.count_nonzero(examples.labels)),
        "mean_length": round(float(lengths.mean()), 1),
        "longest": int(lengths.max()),
    }


def _write_vocabulary(path: Path, tokenizer: Tokenizer, counts: np.ndarray) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "token", "count"))
        writer.writerows((i, tokenizer.token(i), count) for i, count in enumerate(counts.tolist()))


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of words drawn with these frequencies: the loss of a model that knows only word counts."""
    share = counts[counts > 0] / counts.sum()
    return -math.fsum((share * np.log(share)).tolist())


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise DataError(f"{path}: missing; prepare the data again")
    if sha256(path) != expected["sha256"]:
        raise DataError(f"{path}: differs from what dataset.json recorded; prepare the data again")
