"""Where a model is read from: a checkpoint or a run, in a folder or in S3.

A run stands for its newest valid checkpoint. Checkpoints from S3 are downloaded into a folder of the caller and
verified there. A corrupt checkpoint is skipped, and logged once.
"""

import logging
from pathlib import Path

from babybert.checkpoint.format import (
    STEP_FOLDER,
    checkpoint_problem,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
)
from babybert.checkpoint.storage import S3Store, split_step
from babybert.errors import DataError, NoCheckpoint
from babybert.s3 import is_s3

logger = logging.getLogger(__name__)


class CheckpointSource:
    """The checkpoints at one address: a folder or `s3://bucket/prefix`. An address may also name a single step."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._store: S3Store | None = None
        self._single_step: int | None = None
        self._skipped: set[str] = set()
        if is_s3(address):
            run_address, self._single_step = split_step(address)
            self._store = S3Store(run_address)

    def find(self, folder: Path) -> Path:
        """The checkpoint. One from S3 is downloaded into `folder`.

        Raises NoCheckpoint for a run without a valid one, DataError if the run or the single step does not exist or is
        corrupt, UsageError or StorageError when S3 cannot be read.
        """
        if self._store is None:
            path = Path(self.address)
            if not path.is_dir() or STEP_FOLDER.match(path.resolve().name):
                return find_checkpoint(path)
        elif self._single_step is not None:
            return self._store.download(self._single_step, folder)
        newest = self.newer(-1, folder)
        if newest is None:
            flag = "--out" if self._store is None else "--store"
            raise NoCheckpoint(
                f"{self.address}: no valid checkpoint there; train one with `babybert pretrain {flag} {self.address}`"
            )
        return newest

    def newer(self, step: int, folder: Path) -> Path | None:
        """The newest valid checkpoint above `step`, or None. One from S3 is downloaded into `folder`.

        Raises UsageError or StorageError when S3 cannot be read.
        """
        if self._store is None:
            return self._newer_local(step)
        if self._single_step is not None:
            return None
        return self._newer_remote(self._store, step, folder)

    def _newer_local(self, step: int) -> Path | None:
        for path in list_checkpoints(Path(self.address)):
            if checkpoint_step(path) <= step:
                return None
            problem = checkpoint_problem(path)
            if problem is None:
                return path
            self._log_skipped(f"{path}: {problem}", key=str(path))
        return None

    def _newer_remote(self, store: S3Store, step: int, folder: Path) -> Path | None:
        for newer_step in store.steps():
            if newer_step <= step:
                return None
            key = str(newer_step)
            try:
                key = f"{newer_step} {store.manifest(newer_step).attempt}"
                if key not in self._skipped:  # another attempt of a corrupt step may be valid
                    return store.download(newer_step, folder)
            except DataError as error:
                self._log_skipped(str(error), key)
        return None

    def _log_skipped(self, description: str, key: str) -> None:
        if key not in self._skipped:
            logger.warning(f"skipping {description}")
            self._skipped.add(key)
