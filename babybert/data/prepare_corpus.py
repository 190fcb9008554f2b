"""From documents to a dataset, by blocks.

1. Each batch of documents is read and tokenized. Its words are counted, and its tokens by the place of their document,
   which is a digest of the text and the seed.
2. The driver adds up what was counted: the vocabulary, and a histogram of places.
3. The histogram gives the blocks: ranges of places, about two million tokens each. Blocks that follow one another make
   a shard.
4. Each batch is sent to the shards of its documents, with final ids.
5. Each shard sorts its documents, and makes and writes the pairs of each of its blocks.
6. The driver adds up the counts over the pairs, and writes `dataset.json`.

Steps 1, 4 and 5 are jobs, functions of their arguments alone. An engine says where they run. The driver holds the
vocabulary, the histogram and handles, but no documents. The same documents give the same bytes, whatever the engine,
the number of processes, the order of the files, and the jobs that had to be run again.

A shard that is finished has a record. If the driver is killed, the same command tokenizes again, and makes only the
shards that are missing.
"""

import dataclasses
import hashlib
import json
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import tokenizers

from babybert import __version__
from babybert.config import PrepareConfig
from babybert.corpus.documents import Corpus
from babybert.corpus.files import BadRows
from babybert.data.block_plan import Histogram, PlannedShard, plan_shards
from babybert.data.blocks import ShardJob, count_after_move, survey, write_shard
from babybert.data.dataset import SPLITS
from babybert.data.dataset_output import DatasetOutput
from babybert.data.dataset_writer import BYTES_PER_MB, DatasetWriter
from babybert.data.engine import Engine
from babybert.data.finished_shards import FinishedShards
from babybert.data.shuffle import shuffle
from babybert.data.splits import find_text_to_move
from babybert.data.tokenize_corpus import TokenizedCorpus, tokenize_corpus
from babybert.data.tokenizer import MAX_WORD_CHARACTERS
from babybert.progress import Progress

logger = logging.getLogger(__name__)

# The settings that say where and how the work is done; the data does not depend on them.
NOT_OF_THE_DATA = ("out", "overwrite", "download_folder", "engine", "workers", "ray_address")


def prepare_corpus(
    config: PrepareConfig, corpus: Corpus, bad_rows: BadRows, output: DatasetOutput, engine: Engine
) -> DatasetWriter:
    """Write the shards of a corpus and return the writer of the rest of the dataset.

    Raises DataError for a corpus that cannot be used.
    """
    tokenized = tokenize_corpus(config, corpus, bad_rows, engine)
    tokenizer = tokenized.tokenizer
    writer = DatasetWriter(config, output, tokenizer)
    documents, tokens = int(tokenized.documents.sum()), int(tokenized.tokens.sum())
    writer.facts.update(documents=documents, tokens=tokens)
    logger.info(f"{documents:,} documents, {tokens:,} tokens, vocabulary {tokenizer.size:,}")
    moved = _move_text(tokenized, writer.facts["source"], engine)
    planned = plan_shards(tokenized.histogram, config.format, config.shard_mb * BYTES_PER_MB, config.duplicates)
    finished = FinishedShards(output, _key(config, tokenized), config.format, tokenizer.size)
    finished.load(planned)
    missing = [shard for shard in planned if shard not in finished]
    if len(missing) < len(planned):
        logger.info(f"{len(planned) - len(missing):,} of {len(planned):,} shards were finished by an earlier command")
    _write_shards(config, tokenized, moved, missing, finished, engine)
    _describe_splits(tokenized, planned, finished, writer)
    if tokenized.long_words:
        writer.facts["long_words"] = tokenized.long_words
        logger.warning(
            f"words of more than {MAX_WORD_CHARACTERS} characters: {tokenized.long_words:,}; each became [UNK]"
        )
    return writer


def _move_text(tokenized: TokenizedCorpus, source: str, engine: Engine) -> Any:
    """Return the text that has to be in the other split, if there is one, and correct the counts."""
    inputs = ((*batch, tokenized.final_ids) for batch in tokenized.batches)
    results = engine.map(survey, inputs)
    surveys = (result.summary for result in results)
    moved = find_text_to_move(surveys, int(tokenized.documents.sum()), int(tokenized.tokens.sum()), source)
    results.close()
    if moved:
        tokenized.documents[:] = tokenized.tokens[:] = 0
        tokenized.histogram = Histogram()
        for result in engine.map(count_after_move, ((batch.pieces, moved) for batch in tokenized.batches)):
            documents, tokens, bins, bin_tokens = result.summary
            tokenized.documents += documents
            tokenized.tokens += tokens
            tokenized.histogram.add(bins, bin_tokens)
    return moved


def _key(config: PrepareConfig, tokenized: TokenizedCorpus) -> str:
    """A digest of everything that the shards depend on."""
    settings = {name: str(value) for name, value in dataclasses.asdict(config).items() if name not in NOT_OF_THE_DATA}
    versions = (__version__, np.__version__, tokenizers.__version__, pyarrow.__version__)
    counts = (tokenized.documents.tolist(), tokenized.tokens.tolist(), tokenized.fingerprint)
    content = json.dumps([settings, versions, counts, tokenized.tokenizer.digest], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _write_shards(
    config: PrepareConfig,
    tokenized: TokenizedCorpus,
    moved: Any,
    shards: list[PlannedShard],
    finished: FinishedShards,
    engine: Engine,
) -> None:
    """Make the shards and record each as soon as it is finished. The batches of documents are deleted."""
    output = finished.output
    folder = output.files if engine.workers_see_files else None
    pair_settings = (config.seed, config.duplicates, config.max_positions, config.segments)
    settings = (config.format, *pair_settings, tokenized.tokenizer.size, output.upload)
    running: dict[int, list[Any]] = {}

    def inputs() -> Iterator[tuple[Any, ...]]:
        for index, parts in enumerate(shuffle(tokenized, moved, shards, engine)):
            running[index] = parts
            yield ShardJob(shards[index], folder, *settings), *parts

    pieces = 0 if engine.workers_see_files or output.upload else 1
    with Progress("write pairs", sum(shard.tokens for shard in shards), "tokens") as progress:
        for result in engine.map(write_shard, inputs(), pieces):
            written, facts, statistics = result.summary
            if result.handles:
                written = _write_content(result.handles[0], output.files, engine)
            finished.add(shards[result.input_index], written, facts, statistics)
            for handle in running.pop(result.input_index):
                engine.drop(handle)
            progress.advance(shards[result.input_index].tokens)


def _write_content(handle: Any, folder: Path, engine: Engine) -> Path:
    """Write a shard that a job has returned as data to a file."""
    path = folder / f".{uuid.uuid4().hex}"
    path.write_bytes(engine.get(handle)[0].data)
    engine.drop(handle)
    return path


def _describe_splits(
    tokenized: TokenizedCorpus, planned: list[PlannedShard], finished: FinishedShards, writer: DatasetWriter
) -> None:
    """Add up the counts of the shards. Shards without a pair are left out."""
    for split_index, split in enumerate(SPLITS):
        statistics = finished.statistics[split_index]
        statistics.documents = int(tokenized.documents[split_index])
        facts = [finished[shard] for shard in planned if shard.held_out == (split == "validation")]
        writer.describe_split(split, [of_shard for of_shard in facts if of_shard["rows"]], statistics)
