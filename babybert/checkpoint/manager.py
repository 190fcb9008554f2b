"""The checkpoints of one run: saved locally, uploaded to S3 in the background, and found again at the start.

The manager also keeps other jobs out. A lock on the run's folder ends with the process (see `folders.py`). A lease in
S3 expires (see `s3_lease.py`).
"""

import contextlib
import logging
import time
from pathlib import Path

import torch

from babybert.checkpoint.checkpoint_metrics import CheckpointMetrics
from babybert.checkpoint.format import (
    CheckpointState,
    checkpoint_name,
    checkpoint_problem,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    save_checkpoint,
)
from babybert.checkpoint.retention import prune_checkpoints
from babybert.checkpoint.storage import METRICS, S3Store, split_step
from babybert.checkpoint.uploader import Uploader
from babybert.config.run_options import CheckpointOptions
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, StorageError, UsageError, UserError
from babybert.folders import lock_folder
from babybert.model.bert import BertEncoder
from babybert.s3 import is_s3
from babybert.s3_lease import Lease

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Use as a context manager around a run.

    Raises UserError when another process trains in the folder or below the prefix; UsageError when the folder or the
    store refuses access; StorageError when the folder cannot be made, or at the end when an upload did not finish;
    LeaseLost at the end when another job has taken over the store.
    """

    def __init__(self, config: CheckpointOptions, metrics: CheckpointMetrics) -> None:
        self._config = config
        self._run = config.out
        self._metrics = metrics
        self._store = S3Store(config.store) if config.store else None
        self._resources = contextlib.ExitStack()
        self._uploader: Uploader | None = None
        self._lease: Lease | None = None
        self._last_save_step = 0
        self._last_save_time = time.monotonic()
        self._newer_than_resume: list[Path] = []

    def __enter__(self) -> "CheckpointManager":
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock_folder(self._run, "--out"))
            if self._store:
                self._store.check_access()
                self._lease = stack.enter_context(self._store.lease())
                keep = self._config.keep_checkpoints
                self._uploader = Uploader(self._store, keep, self._metrics, self._run / METRICS)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._resources:
            if not self._uploader:
                return
            interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
            try:
                self._uploader.finish(0 if interrupted else 60 * self._config.upload_minutes)
            except UserError as problem:
                if kind is None:
                    raise
                if str(problem) != str(error):  # the error that ended the run is reported anyway
                    logger.warning(str(problem))

    # At the start of a run

    def find_resume_checkpoint(self) -> Path | None:
        """The local folder of the checkpoint to resume from, downloaded if necessary; None to start from scratch.

        Nothing is renamed or deleted here: the caller first checks that the run can use the checkpoint, and then calls
        `set_aside_newer_checkpoints`.

        Raises UsageError when `--resume never` would mix with existing checkpoints, DataError when the requested
        checkpoint is missing or corrupt.
        """
        resume = self._config.resume
        remote_steps = self._store.steps() if self._store else []
        local_steps = [checkpoint_step(folder) for folder in list_checkpoints(self._run)]
        steps = sorted({*local_steps, *remote_steps}, reverse=True)
        if resume == "never":
            if steps:
                raise UsageError(
                    f"{self._run}: already has checkpoints; choose another --out (and --store), "
                    "or drop --resume never to continue from them"
                )
            return None
        if self._config.resume_step is not None:
            return self._find_step(self._config.resume_step, steps, local_steps, remote_steps)
        if resume != "auto":
            if not steps:
                return self._find_in_other_run(resume)
            logger.info(f"{self._run}: has checkpoints by now; resuming from these, not from {resume}")
        return self._find_newest(steps, remote_steps)

    def set_aside_newer_checkpoints(self) -> None:
        """After `--resume STEP`: rename the newer local checkpoints, so that no later resume finds them."""
        for folder in self._newer_than_resume:
            new_path = folder.with_name(f"aside-{time.time_ns()}-{folder.name}")
            folder.rename(new_path)
            logger.info(f"{folder}: newer than --resume {self._config.resume}; renamed to {new_path.name}")
        self._newer_than_resume = []

    def _find_step(self, step: int, steps: list[int], local_steps: list[int], remote_steps: list[int]) -> Path:
        """The checkpoint of one step, for `--resume STEP`."""
        if step not in steps:
            available = ", ".join(map(str, steps)) or "none"
            raise DataError(f"{self._run}: has no checkpoint of step {step}; it has {available}")
        newer_remote = [newer for newer in remote_steps if newer > step]
        if newer_remote:
            assert self._store is not None
            address = self._store.address
            raise UsageError(
                f"{address}: has newer checkpoints ({newer_remote[0]}); "
                f"give --resume {address}/{checkpoint_name(step)} with a new --store"
            )
        folder = self._find_valid(step, remote_steps)
        if folder is None:
            others = ", ".join(str(other) for other in steps if other != step) or "none"
            raise DataError(f"{self._run}: the checkpoint of step {step} is corrupt; other steps: {others}")
        self._newer_than_resume = [self._run / checkpoint_name(newer) for newer in local_steps if newer > step]
        return folder

    def _find_newest(self, steps: list[int], remote_steps: list[int]) -> Path | None:
        """The newest valid checkpoint of the run, for `--resume auto`."""
        for step in steps:
            folder = self._find_valid(step, remote_steps)
            if folder is not None:
                if self._uploader and step not in remote_steps:
                    self._uploader.submit(folder)  # the previous process ended before it was uploaded
                return folder
            self._metrics.fallbacks.inc()
        if steps:
            logger.warning("no checkpoint is valid: starting from scratch")
        return None

    def _find_valid(self, step: int, remote_steps: list[int]) -> Path | None:
        """The local folder of a step, downloaded if it is not valid locally. Logs why a checkpoint is skipped."""
        folder = self._run / checkpoint_name(step)
        if folder.is_dir():
            problem = checkpoint_problem(folder)
            if problem is None:
                return folder
            logger.warning(f"skipping {folder}: {problem}")
        if self._store is None or step not in remote_steps:
            return None
        try:
            downloaded = self._store.download(step, self._run)
        except DataError as error:
            logger.warning(f"skipping {error}")
            return None
        if not (self._run / METRICS).exists():
            self._store.download_metrics(self._run / METRICS)
        return downloaded

    def _find_in_other_run(self, address: str) -> Path:
        """The checkpoint of another run's folder or S3 address, for `--resume ADDRESS`. Raises DataError."""
        if not is_s3(address):
            return find_checkpoint(Path(address))
        run_address, single_step = split_step(address)
        store = S3Store(run_address)
        for step in store.steps() if single_step is None else [single_step]:
            try:
                return store.download(step, self._run)
            except DataError as error:
                logger.warning(f"skipping {error}")
                self._metrics.fallbacks.inc()
        raise DataError(f"{address}: no valid checkpoint there")

    # During a run

    def start_interval(self, step: int) -> None:
        """Count `--checkpoint-every` from this step and from now."""
        self._last_save_step = step
        self._last_save_time = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether `--checkpoint-every` asks for a checkpoint now. Raises LeaseLost."""
        if self._lease:
            self._lease.raise_if_lost()
        steps, minutes = self._config.checkpoint_interval
        if steps is not None:
            return step - self._last_save_step >= steps
        return minutes is not None and time.monotonic() - self._last_save_time >= 60 * minutes

    def save(
        self,
        state: CheckpointState,
        model: BertEncoder,
        tokenizer: Tokenizer,
        optimizer: torch.optim.Optimizer,
        is_last: bool = False,
    ) -> Path | None:
        """Write a checkpoint, submit it for upload, delete old ones. Returns its folder.

        A checkpoint without scores is not written if the step has one already. If the disk cannot take it, a warning
        is logged, None is returned, and training continues; at the end of the run (`is_last`) StorageError is raised.
        """
        existing = self._run / checkpoint_name(state.step)
        if state.scores is None and state.step == self._last_save_step and existing.is_dir():
            return existing
        start = time.monotonic()
        try:
            folder = save_checkpoint(self._run, state, model, tokenizer, optimizer)
        except StorageError as error:
            self._metrics.save_failures.inc()
            if is_last:
                raise
            logger.warning(str(error))
            self.start_interval(state.step)
            return None
        self.start_interval(state.step)
        size = sum(path.stat().st_size for path in folder.iterdir())
        self._metrics.record_save(size, time.monotonic() - start)
        in_use: frozenset[Path] = frozenset()
        if self._uploader:
            self._uploader.submit(folder)
            in_use = self._uploader.in_use
        prune_checkpoints(self._run, self._config.keep_checkpoints, in_use)
        return folder
