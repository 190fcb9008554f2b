"""A corpus as batches, the unit of work that is given to one process at a time.

Small files are put together in a batch by their paths, and the process that gets the batch reads them. A large file is
read where the batches are made, and its documents are handed out as they come: an archive can only be read from start
to end, but its documents can be tokenized by many processes. An object in S3 is fetched by the process that tokenizes
it, on any machine, unless it is very large. What is prepared must not depend on the batches.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from babybert.corpus.documents import Corpus, FileCorpus, read_file
from babybert.corpus.files import BadRows
from babybert.corpus.readers import Document, Reader
from babybert.corpus.s3_file import S3File, SourceFile, file_size
from babybert.progress import Progress

BATCH_BYTES = 1 << 22  # of text (characters), or of files that are still to be read; about a second of work
LARGEST_BATCH_BYTES = 1 << 24  # of a large corpus: the driver has to keep something for each batch
LARGEST_OBJECT_BYTES = 1 << 25  # in S3; each is fetched by the process that tokenizes it, which holds all its text
BATCHES = 1 << 14  # in which a corpus is divided if batches may be large enough
BATCH_FILES = 4096


def batch_bytes(corpus_bytes: int) -> int:
    """Return how large the batches of a corpus are."""
    return min(max(BATCH_BYTES, corpus_bytes // BATCHES), LARGEST_BATCH_BYTES)


@dataclass(frozen=True)
class DocumentBatch:
    """Some documents of a corpus: files that are still to be read, or documents that have been read.

    Attributes:
        paths: the files; none if the documents have been read.
        reader: yields the documents of one file.
        documents: the documents, if they have been read.
    """

    paths: tuple[SourceFile, ...] = ()
    reader: Reader | None = None
    documents: tuple[Document, ...] = ()

    def read(self, bad_rows: BadRows) -> Iterator[Document]:
        """Yield the documents. Raises DataError for what cannot be read, or reports it to `bad_rows`."""
        yield from self.documents
        for path in self.paths:
            assert self.reader is not None
            yield from read_file(path, self.reader, bad_rows)

    def __len__(self) -> int:
        """How many files or documents."""
        return len(self.paths) or len(self.documents)

    def halves(self) -> tuple["DocumentBatch", "DocumentBatch"]:
        """Return two batches with half of the files or documents each."""
        middle = len(self) // 2
        return (
            DocumentBatch(self.paths[:middle], self.reader, self.documents[:middle]),
            DocumentBatch(self.paths[middle:], self.reader, self.documents[middle:]),
        )

    def __str__(self) -> str:
        first, last = (
            (self.paths[0], self.paths[-1]) if self.paths else (self.documents[0].name, self.documents[-1].name)
        )
        return f"{first}" if first == last else f"{first} to {last}"


def read_batches(corpus: Corpus, task: str, workers_see_files: bool) -> Iterator[DocumentBatch]:
    """Yield all documents of a corpus in batches, with progress shown under the name `task`.

    Args:
        corpus: the corpus.
        task: what is shown.
        workers_see_files: whether the processes that get the batches can open the same paths.

    Raises DataError, naming file and row, for what cannot be read here.
    """
    most_bytes = batch_bytes(corpus.size)
    if not (isinstance(corpus, FileCorpus) and (workers_see_files or _are_in_s3(corpus))):
        yield from in_batches(corpus.documents(task), most_bytes)
        return
    corpus.bad_rows.start_again()
    with Progress(task, corpus.size, "bytes") as progress:
        small_files: list[SourceFile] = []
        size = 0
        for path in corpus.files.paths:
            is_large = file_size(path) > (LARGEST_OBJECT_BYTES if isinstance(path, S3File) else most_bytes)
            if small_files and (is_large or size + file_size(path) > most_bytes or len(small_files) == BATCH_FILES):
                yield DocumentBatch(tuple(small_files), corpus.reader)
                progress.advance(size)
                small_files, size = [], 0
            if is_large:
                yield from in_batches(read_file(path, corpus.reader, corpus.bad_rows, progress.advance), most_bytes)
            else:
                small_files.append(path)
                size += file_size(path)
        if small_files:
            yield DocumentBatch(tuple(small_files), corpus.reader)
            progress.advance(size)


def _are_in_s3(corpus: FileCorpus) -> bool:
    """Whether processes on any machine can read the files."""
    return all(isinstance(path, S3File) for path in corpus.files.paths)


def in_batches(documents: Iterable[Document], most_characters: int) -> Iterator[DocumentBatch]:
    """Yield documents that are read here, about `most_characters` at a time."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= most_characters:
            yield DocumentBatch(documents=tuple(batch))
            batch, characters = [], 0
    if batch:
        yield DocumentBatch(documents=tuple(batch))
