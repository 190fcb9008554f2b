"""Labelled texts to the examples that a classifier is trained on and scored with.

They are `Examples` without masks whose `is_next` holds the index of the class, so the loaders of pretraining serve
classification as well. Rows are in the order of the digests of their texts, whatever the order of the files is, and a
text is held out by its digest: copies of a text are all on one side. Training texts that are also validation or test
texts are left out.

Shapes: P texts.
"""

import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from babybert.config import ClassifierConfig, FinetuneConfig
from babybert.corpus.files import BadRows
from babybert.corpus.labelled import Labelled, LabelledColumns, read_labelled
from babybert.data.classifier_input import classifier_input, input_length
from babybert.data.table import Examples, take
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError

logger = logging.getLogger(__name__)

MOST_CLASSES = 1000  # more are hardly a column of class names
TEXTS_PER_BATCH = 1000
CLASSES_SHOWN = 10  # in a message


@dataclass(frozen=True)
class LabelledData:
    """The texts of a run.

    Attributes:
        classifier: its classes, and how it reads a text.
        train: the texts to learn from.
        validation: those that are scored after each epoch.
        test: those that are scored at the end; None without any.
        digest: SHA-256 of the training examples and the tokenizer.
    """

    classifier: ClassifierConfig
    train: Examples
    validation: Examples
    test: Examples | None
    digest: str


@dataclass
class _Texts:
    """Encoded texts of one split, in the order of their sources."""

    ids: list[np.ndarray] = field(default_factory=list)
    segments: list[np.ndarray] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    first_names: dict[str, str] = field(default_factory=dict)  # by label: where it comes first
    cut: int = 0  # texts that were too long

    def add(self, document: Labelled, ids: np.ndarray, length_a: int, digest: int) -> None:
        segments = np.ones(len(ids), np.int8)
        segments[length_a:] = 2
        self.ids.append(ids)
        self.segments.append(segments)
        self.digests.append(digest)
        self.labels.append(document.label)
        self.first_names.setdefault(document.label, document.name)

    def examples(self, classes: tuple[str, ...]) -> Examples:
        """All texts. Raises DataError for a label that is none of `classes`."""
        for label, name in self.first_names.items():
            if label not in classes:
                raise DataError(f"{name}: class '{label}' has no training text; those have {_shown(classes)}")
        index_of = {name: index for index, name in enumerate(classes)}
        ids = np.concatenate(self.ids)
        return Examples(
            ids=ids,
            labels=np.zeros(len(ids), np.int32),
            segments=np.concatenate(self.segments),
            offsets=np.concatenate([[0], np.cumsum([len(text) for text in self.ids])]).astype(np.int64),
            is_next=np.array([index_of[label] for label in self.labels], np.int16),
        )

    def in_digest_order(self, classes: tuple[str, ...]) -> Examples:
        """All texts in the order of their digests, so that the first ones are a fair sample of a sorted file."""
        return take(self.examples(classes), np.argsort(np.array(self.digests, np.uint64), kind="stable"))


def read_labelled_data(config: FinetuneConfig, tokenizer: Tokenizer, max_positions: int) -> LabelledData:
    """Read and encode all texts that the settings name.

    Raises DataError for bad rows (unless they are skipped), for less than two classes or far too many, for a class that
    has no training text, and if no text is left to train on or to hold out.
    """
    positions = min(config.positions, max_positions)
    reads_pairs = config.pair_column is not None
    classifier = ClassifierConfig((), reads_pairs, positions, config.head_share)
    bad_rows = BadRows(config.skip_bad_rows)
    columns = LabelledColumns(config.text_column, config.label_column, config.pair_column, config.delimiter)
    train, validation, test = _Texts(), _Texts(), _Texts()

    def read(sources: tuple[str, ...], split: _Texts, of_test: _Texts) -> None:
        documents = read_labelled(config.corpus, sources, columns, bad_rows)
        for document, digest, a, b in _encode(documents, tokenizer, config.seed, bad_rows):
            texts = of_test if document.split == "test" else split
            ids, length_a = classifier_input(a, b, classifier)
            texts.cut += input_length(len(a), None if b is None else len(b)) > positions
            texts.add(document, ids, length_a, digest)

    read(config.source, train, _Texts() if config.test_source else test)
    if config.validation_source:
        read(config.validation_source, validation, validation)
    if config.test_source:
        read(config.test_source, test, test)
    source = ", ".join(config.source)
    classes = _classes_of(train, source, config.label_column)
    examples = train.examples(classes)
    digest_P = np.array(train.digests, np.uint64)
    rows = _training_rows(digest_P, examples.is_next, np.array([*validation.digests, *test.digests], np.uint64))
    if config.validation_source:
        held_out = validation.in_digest_order(classes)
    else:
        is_held_out = digest_P[rows] < np.uint64(config.validation_fraction * 2**64)
        held_out = take(examples, rows[is_held_out])
        rows = rows[~is_held_out]
    if not len(rows) or not len(held_out):
        raise DataError(
            f"{source}: no text is left to {'hold out' if len(rows) else 'train on'}; give more texts, another "
            "--validation-fraction, or other texts with --validation-source"
        )
    rows = rows[: config.train_texts]
    logger.info(f"{len(rows):,} training texts of {len(classes)} classes ({_shown(classes)})")
    if train.cut:
        logger.info(f"{train.cut:,} of all {len(train.labels):,} texts have more than {positions} tokens and are cut")
    chosen = take(examples, rows)
    test_examples = test.in_digest_order(classes).first(config.test_texts) if test.labels else None
    classifier = ClassifierConfig(classes, reads_pairs, positions, config.head_share)
    return LabelledData(
        classifier, chosen, held_out.first(config.validation_texts), test_examples, _digest(chosen, tokenizer, classes)
    )


def _encode(
    documents: Iterator[Labelled], tokenizer: Tokenizer, seed: int, bad_rows: BadRows
) -> Iterator[tuple[Labelled, int, np.ndarray, np.ndarray | None]]:
    """Yield each document with its digest and the ids of its texts. Reports texts without words to `bad_rows`."""
    for batch in iter(functools.partial(_next_batch, documents), []):
        first = tokenizer.encode_documents([document.text for document in batch])
        second: Iterable[np.ndarray | None] = [None] * len(batch)
        if batch[0].pair is not None:
            second = tokenizer.encode_documents([document.pair or "" for document in batch])
        for document, a, b in zip(batch, first, second, strict=True):
            if len(a) and (b is None or len(b)):
                yield document, _text_digest(document, seed), a, b
            else:
                bad_rows.report(f"{document.name}: the text has no words in it")


def _next_batch(documents: Iterator[Labelled]) -> list[Labelled]:
    return list(itertools.islice(documents, TEXTS_PER_BATCH))


def _text_digest(document: Labelled, seed: int) -> int:
    content = document.text if document.pair is None else f"{document.text}\0{document.pair}"
    digest = hashlib.blake2b(content.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "big")


def _classes_of(train: _Texts, source: str, label_column: str) -> tuple[str, ...]:
    """The class names, sorted. Raises DataError if there are too few or too many."""
    classes = tuple(sorted(train.first_names))
    if not classes:
        raise DataError(f"{source}: no labelled text to train on")
    if len(classes) == 1:
        raise DataError(
            f"{source}: all {len(train.labels):,} training texts have the class '{classes[0]}'; "
            "a classifier needs two or more"
        )
    if len(classes) > MOST_CLASSES:
        raise DataError(
            f"{source}: '{label_column}' has {len(classes):,} different values, such as {_shown(classes[:3])}; at most "
            f"{MOST_CLASSES:,} classes are supported: choose another --label-column"
        )
    return classes


def _training_rows(digest_P: np.ndarray, class_P: np.ndarray, other_digests: np.ndarray) -> np.ndarray:
    """The rows that may be trained on or held out, in the order of digests: no copies, and none of the other texts."""
    order = np.lexsort((class_P, digest_P))
    digests, classes = digest_P[order], class_P[order]
    is_copy = np.zeros(len(order), bool)
    is_copy[1:] = (digests[1:] == digests[:-1]) & (classes[1:] == classes[:-1])
    is_elsewhere = np.isin(digests, other_digests)
    if is_copy.any():
        logger.info(f"left out: {is_copy.sum():,} copies of training texts")
    if (is_elsewhere & ~is_copy).any():
        count = (is_elsewhere & ~is_copy).sum()
        logger.info(f"left out: {count:,} training texts that are also validation or test texts")
    return order[~is_copy & ~is_elsewhere]


def _digest(train: Examples, tokenizer: Tokenizer, classes: tuple[str, ...]) -> str:
    digest = hashlib.sha256(f"{tokenizer.digest} {json.dumps(classes)}".encode())
    for array in (train.ids, train.segments, train.offsets, train.is_next):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _shown(classes: tuple[str, ...]) -> str:
    """Class names for a message, not too many."""
    return ", ".join([*classes[:CLASSES_SHOWN], *(["..."] if len(classes) > CLASSES_SHOWN else [])])
