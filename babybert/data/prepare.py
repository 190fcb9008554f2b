"""`babybert prepare`: a corpus to a folder that training can rely on.

The folder holds `tokenizer.json`, the shards of the table (`train-00000.csv`, `validation-00000.csv`, ...),
`vocabulary.csv` (token counts of the training pairs: the unigram baseline) and, last, `dataset.json`. All is written
into `.partial/` and moved at the end, so what a killed or failed `prepare` leaves can never be taken for a dataset, and
the next one starts clean.

The corpus is read once, tokenized into a spool on disk, and made into pairs block by block: memory does not grow with
it, but for the vocabulary and about 60 bytes a document. (`--tokenizer-kind wordpiece` reads it twice.)
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tokenizers

from babybert import __version__
from babybert.config import PrepareConfig
from babybert.corpus.download import find_files
from babybert.corpus.files import BadRows
from babybert.corpus.readers import Corpus as Source
from babybert.corpus.readers import Document, open_corpus
from babybert.data.basic_english import BasicEnglishTokenizer
from babybert.data.dataset import FORMAT, SPLITS
from babybert.data.digest import sha256
from babybert.data.masking import mask_tokens
from babybert.data.pairs import assemble, make_pairs
from babybert.data.sentences import TokenizedDocuments, split_sentences
from babybert.data.shards import ShardWriter
from babybert.data.spool import Spool
from babybert.data.table import TABLE_ENDINGS, Examples, read_table
from babybert.data.tokenizer import SENTENCE_ENDS, UNK, Tokenizer
from babybert.errors import DataError, UsageError, cannot_write
from babybert.progress import Progress, say

DOCUMENTS_AT_ONCE = 256
WORDPIECE_SIZE = 30_522  # BERT's


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare the data that `config` asks for and return what `dataset.json` records.

    Raises DataError for a corpus that cannot be used, UsageError if the folder has data already or may not be
    written, StorageError if the disk cannot take it. Whichever it is, data that was in the folder is still there.
    """
    if (config.out / "dataset.json").exists() and not config.overwrite:
        raise UsageError(
            f"{config.out}: has prepared data already; add --overwrite to replace it, or choose another --out"
        )
    partial, work, new = config.out / ".partial", config.out / ".work", not config.out.exists()
    try:
        for folder in (partial, work):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        facts = _import_tables(config, partial, work) if config.corpus == "table" else _write_all(config, partial, work)
        _replace(partial, config.out)
    except OSError as error:
        raise cannot_write(
            f"{config.out}: cannot write the data: {error.strerror}; make room or choose another --out", error
        ) from error
    finally:
        for folder in (partial, work):
            shutil.rmtree(folder, ignore_errors=True)
        if new and config.out.is_dir() and not any(config.out.iterdir()):
            config.out.rmdir()
    return facts


def _replace(partial: Path, out: Path) -> None:
    """Move the finished files to their place, `dataset.json` away first and in last; then forget the data before."""
    (out / "dataset.json").unlink(missing_ok=True)
    for split in SPLITS:
        for old in out.glob(f"{split}-*"):
            old.unlink()
    shutil.rmtree(out / ".cache", ignore_errors=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "dataset.json"):
        path.replace(out / path.name)


def _write_all(config: PrepareConfig, partial: Path, work: Path) -> dict[str, Any]:
    bad = BadRows(config.skip_bad_rows)
    source = open_corpus(config, work, bad)
    with Spool(work / "tokens", config.seed, config.validation_fraction) as spool:
        tokenizer, to_id = _tokenize(config, source, spool)
        facts = _describe(config, tokenizer, bad)
        facts.update(documents=sum(spool.documents.values()), tokens=spool.tokens)
        say(f"{facts['documents']:,} documents, {spool.tokens:,} tokens, vocabulary {tokenizer.size:,}")
        for number, split in enumerate(SPLITS):
            with (
                ShardWriter(partial, split, config.format, config.shard_mb * 1_000_000, tokenizer.size) as writer,
                Progress(f"write {split}", spool.tokens_of[bool(number)], "tokens") as progress,
            ):
                tally = SplitStatistics(tokenizer.size)
                for examples in _make_examples(
                    spool.blocks(held_out=bool(number), to_id=to_id), tokenizer, config, number, tally, progress
                ):
                    writer.add(examples)
                    tally.add(examples)
            if not tally.pairs:
                raise DataError(
                    f"{facts['source']}: {spool.documents[bool(number)]} {split} documents give no sentence pairs; more or longer documents are needed"
                )
            facts[split] = {"documents": spool.documents[bool(number)], **tally.facts()}
            facts["shards"][split] = writer.shards
            if split == "train":
                _write_vocabulary(partial / "vocabulary.csv", tokenizer, tally.counts)
    _finish(partial, tokenizer, facts)
    return facts


def _tokenize(config: PrepareConfig, source: Source, spool: Spool) -> tuple[Tokenizer, np.ndarray | None]:
    """Fill the spool. Returns the tokenizer and, if the spool has provisional ids, the ids to put in their place."""
    if config.tokenizer is None and config.tokenizer_kind == "basic-english":
        words = BasicEnglishTokenizer()
        for document in source.documents("tokenize"):
            ids = words.add(document.text)
            spool.add(document.text, ids, words.provisional_ids(SENTENCE_ENDS))
        return words.finish(config.min_frequency, config.vocab_size)
    if config.tokenizer is not None:
        tokenizer = Tokenizer.load(config.tokenizer)
    else:
        texts = (document.text for document in source.documents("vocabulary"))
        tokenizer = Tokenizer.train_wordpiece(texts, config.min_frequency, config.vocab_size or WORDPIECE_SIZE)
    end_ids = tokenizer.sentence_end_ids()
    for chunk in _chunks(source.documents("tokenize"), DOCUMENTS_AT_ONCE):
        texts_in_chunk = [document.text for document in chunk]
        for text, ids in zip(texts_in_chunk, tokenizer.encode_documents(texts_in_chunk), strict=True):
            spool.add(text, ids, end_ids)
    return tokenizer, None


def _chunks(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    while chunk := list(itertools.islice(documents, size)):
        yield chunk


def _make_examples(
    blocks: Iterator[TokenizedDocuments],
    tokenizer: Tokenizer,
    config: PrepareConfig,
    split: int,
    tally: "SplitStatistics",
    progress: Progress,
) -> Iterator[Examples]:
    """Masked pairs of each block: the training ones `config.duplicates` times over, each time masked anew."""
    end_ids, first_row = tokenizer.sentence_end_ids(), 0
    for number, corpus in enumerate(blocks):
        sentences = split_sentences(corpus, end_ids)
        pairs = make_pairs(corpus, sentences, config.seed, split, number)
        ids, segments, offsets = assemble(corpus, sentences, pairs, config.max_positions)
        rows = np.arange(first_row, first_row + len(pairs))
        for copy in range(config.duplicates if split == 0 else 1):
            # Even numbers mask training pairs, odd ones held-out pairs: the same row gets other masks there.
            masked, labels = mask_tokens(ids, offsets, tokenizer.size, config.seed, epoch=2 * copy + split, rows=rows)
            yield Examples(masked, labels, segments, offsets, pairs.is_next)
        first_row += len(pairs)
        tally.sentences += len(sentences)
        progress.advance(len(corpus.tokens))


class SplitStatistics:
    """Counts of one split, for `dataset.json` and `vocabulary.csv`."""

    def __init__(self, vocab_size: int) -> None:
        self.counts = np.zeros(vocab_size, np.int64)
        self.sentences = self.pairs = self.is_next = self.tokens = self.masked = self.unknown = self.longest = 0

    def add(self, examples: Examples) -> None:
        """Count these rows."""
        self.counts += examples.token_counts(len(self.counts))
        self.pairs += len(examples)
        self.is_next += int(examples.is_next.sum())
        self.tokens += len(examples.ids)
        self.masked += int(np.count_nonzero(examples.labels))
        self.unknown += int(np.count_nonzero(examples.original_ids() == UNK))
        self.longest = max(self.longest, int(np.diff(examples.offsets).max(initial=0)))

    def facts(self) -> dict[str, Any]:
        """As `dataset.json` has it."""
        return {
            "sentences": self.sentences,
            "pairs": self.pairs,
            "is_next_share": round(self.is_next / self.pairs, 4),
            "tokens_in_pairs": self.tokens,
            "masked_tokens": self.masked,
            "unknown_tokens": self.unknown,
            "mean_length": round(self.tokens / self.pairs, 1),
            "longest": self.longest,
        }


def _import_tables(config: PrepareConfig, partial: Path, work: Path) -> dict[str, Any]:
    """Check tables that are there already (the course's, say) and write them as a dataset, masks and all."""
    assert config.tokenizer is not None  # PrepareConfig has seen to it
    tokenizer = Tokenizer.load(config.tokenizer)
    bad = BadRows(config.skip_bad_rows)
    facts = _describe(config, tokenizer, bad)
    for split, sources in zip(SPLITS, (config.source, config.validation_source), strict=True):
        tally = SplitStatistics(tokenizer.size)
        paths = [path for source in sources for path in find_files(source, TABLE_ENDINGS, work / split)]
        with (
            ShardWriter(partial, split, config.format, config.shard_mb * 1_000_000, tokenizer.size) as writer,
            Progress(f"read {split}", sum(path.stat().st_size for path in paths), "bytes") as progress,
        ):
            for path in paths:
                for examples in read_table(path, tokenizer.size, bad):
                    writer.add(examples)
                    tally.add(examples)
                progress.advance(path.stat().st_size)
        if not tally.pairs:
            raise DataError(f"{', '.join(map(str, paths))}: no good row is left")
        facts[split] = tally.facts()
        facts["shards"][split] = writer.shards
        if split == "train":
            _write_vocabulary(partial / "vocabulary.csv", tokenizer, tally.counts)
    facts["skipped_rows"] = bad.count
    _finish(partial, tokenizer, facts)
    return facts


def _describe(config: PrepareConfig, tokenizer: Tokenizer, bad: BadRows) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "babybert": __version__,
        "numpy": np.__version__,
        "tokenizers": tokenizers.__version__,
        "corpus": config.corpus,
        "generated": config.corpus == "demo",
        "source": ", ".join(config.source) or ("built-in grammar" if config.corpus == "demo" else "public archive"),
        "seed": config.seed,
        "duplicates": config.duplicates,
        "max_positions": config.max_positions,
        "vocabulary": tokenizer.size,
        "tokenizer_digest": tokenizer.digest,
        "skipped_rows": bad.count,
        "shards": {},
    }


def _finish(partial: Path, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Write the tokenizer and, with the digests of all files, `dataset.json`."""
    tokenizer.save(partial / "tokenizer.json")
    names = ("tokenizer.json", "vocabulary.csv")
    facts["files"] = {
        name: {"bytes": (partial / name).stat().st_size, "sha256": sha256(partial / name)} for name in names
    }
    (partial / "dataset.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _write_vocabulary(path: Path, tokenizer: Tokenizer, counts: np.ndarray) -> None:
    tokens = [tokenizer.token(i) for i in range(tokenizer.size)]
    pd.DataFrame({"token": tokens, "count": counts}).to_csv(path, index_label="id", lineterminator="\r\n")
