"""Find the document at which a worker process dies each time, by halving the batch that it is in."""

from typing import Any

from babybert.corpus.batches import DocumentBatch
from babybert.corpus.files import BadRows
from babybert.data.engine import ATTEMPTS, Arrays, Engine, Function, WorkerDied
from babybert.errors import DataError, UserError


def explain_death(engine: Engine, function: Function, died: WorkerDied, pieces: int) -> UserError:
    """Return the error about a job that reads a batch, whose process has died at each attempt.

    It names the document, or the file that cannot even be read. If the process dies at no single document, perhaps
    because another program takes the memory, it is `died`.
    """
    batch: DocumentBatch = died.arguments[0]
    other_arguments = died.arguments[1:]

    def is_fatal(some_documents: DocumentBatch) -> bool:
        return _dies(engine, function, (some_documents, *other_arguments), pieces)

    skip_bad_rows = other_arguments[0].skip_bad_rows
    while len(batch) > 1 or batch.paths:
        if len(batch.paths) == 1:
            if _dies(engine, read_only, (batch, skip_bad_rows), 0):
                return _error(str(batch), "read this file")
            # A worker has survived reading it, so it can be read here.
            batch = DocumentBatch(documents=tuple(batch.read(BadRows(skip_bad_rows, quiet=True))))
        else:
            first, second = batch.halves()
            batch = first if is_fatal(first) else second
    return _error(str(batch), "worked on this document") if is_fatal(batch) else died


def read_only(batch: DocumentBatch, skip_bad_rows: bool) -> tuple[None, list[Arrays]]:
    """A job that reads a batch and does nothing with it."""
    for _ in batch.read(BadRows(skip_bad_rows, quiet=True)):
        pass
    return None, []


def _dies(engine: Engine, function: Function, arguments: tuple[Any, ...], pieces: int) -> bool:
    try:
        for result in engine.map(function, [arguments], pieces):
            for handle in result.handles:
                engine.drop(handle)
    except WorkerDied:
        return True
    return False


def _error(name: str, action: str) -> DataError:
    return DataError(
        f"{name}: a worker process died {ATTEMPTS} times when it {action}: it crashed or ran out of memory; "
        "remove it, or use a machine with more memory"
    )
