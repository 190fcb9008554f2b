"""Where a model to be served comes from: a checkpoint, a run, or either of them in S3.

A run stands for its newest whole checkpoint. What comes from S3 is fetched into a folder of ours and verified there, as
a run that goes on does; a checkpoint that is not what its manifest says is passed over, and said once.
"""

from pathlib import Path

from babybert.checkpoint.format import (
    STEP_FOLDER,
    checkpoint_problem,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
)
from babybert.checkpoint.storage import S3Store
from babybert.errors import DataError
from babybert.progress import say
from babybert.s3 import is_s3


class CheckpointSource:
    """The checkpoints at one address: a folder, or `s3://bucket/prefix`; of one step where the address ends in `step-00001234`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._refused: set[str] = set()
        self._store: S3Store | None = None
        self._only: int | None = None
        if is_s3(address):
            prefix, _, last = address.rstrip("/").rpartition("/")
            if match := STEP_FOLDER.match(last):
                self._only = int(match[1])
            self._store = S3Store(prefix if match else address)

    def find(self, folder: Path) -> Path:
        """The checkpoint; one from S3 is put below `folder`. Raises DataError when there is none that is whole."""
        if self._store is None:
            return find_checkpoint(Path(self.address))
        if self._only is not None:
            return self._store.download(self._only, folder)
        found = self.newer(-1, folder)
        if found is None:
            raise DataError(
                f"{self.address}: no whole checkpoint there; train one with `babybert pretrain --store {self.address}`"
            )
        return found

    def newer(self, step: int, folder: Path) -> Path | None:
        """The newest whole checkpoint above `step`, or None. Raises what S3 raises."""
        if self._only is not None:
            return None
        if self._store is None:
            return next(
                (
                    path
                    for path in list_checkpoints(Path(self.address))
                    if checkpoint_step(path) > step and self._is_whole(path)
                ),
                None,
            )
        for newer in self._store.steps():
            if newer <= step:
                break
            try:
                attempt = f"{newer} {self._store.manifest(newer)['attempt']}"
                if attempt not in self._refused:
                    return self._store.download(newer, folder)
            except DataError as error:
                self._pass_over(str(error), attempt)
        return None

    def _is_whole(self, path: Path) -> bool:
        problem = checkpoint_problem(path)
        if problem:
            self._pass_over(f"{path}: {problem}", str(path))
        return not problem

    def _pass_over(self, what: str, key: str) -> None:
        if key not in self._refused:
            say(f"warning: passing over {what}")
            self._refused.add(key)
