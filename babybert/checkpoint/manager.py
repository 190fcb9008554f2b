"""The checkpoints of one run: saved locally, brought to S3 in the background, found again at the start.

It also keeps other jobs out: a lock on the run's folder, which the system gives back whatever happens to the process,
and a lease in S3, which ends by itself.
"""

import contextlib
import fcntl
import time
from pathlib import Path
from typing import IO, Any

import torch

from babybert.checkpoint.format import (
    STEP_FOLDER,
    TrainState,
    checkpoint_name,
    checkpoint_problem,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    prune,
    save_checkpoint,
)
from babybert.checkpoint.lease import Lease
from babybert.checkpoint.storage import S3Store
from babybert.checkpoint.uploader import Uploader
from babybert.config import PretrainConfig
from babybert.data.dataset import Dataset
from babybert.errors import DataError, StorageError, UsageError, UserError, cannot_write
from babybert.evaluation.scores import Scores
from babybert.model.bert import BabyBert
from babybert.progress import say
from babybert.s3 import is_s3
from babybert.training.metrics import RunMetrics


class CheckpointManager:
    """Use as a context manager around a run.

    Raises UserError when another process trains in the folder or below the prefix; UsageError when the store or the
    folder refuses what a run needs; StorageError when the folder cannot be made, or at the end when an upload could not be finished.
    """

    def __init__(self, config: PretrainConfig, metrics: RunMetrics) -> None:
        self._config, self._metrics = config, metrics
        self._store = S3Store(config.store) if config.store else None
        self._stack = contextlib.ExitStack()
        self._uploader: Uploader | None = None
        self._lease: Lease | None = None
        self._saved_step, self._saved_at = 0, time.monotonic()

    def __enter__(self) -> "CheckpointManager":
        with contextlib.ExitStack() as stack:
            try:
                self._config.out.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((self._config.out / ".lock").open("w"))
            except OSError as error:
                raise cannot_write(
                    f"{self._config.out}: cannot be written: {error.strerror}; choose another --out", error
                ) from error
            _lock(lock, self._config.out)
            if self._store:
                self._store.check()
                self._lease = stack.enter_context(Lease(self._store))
                self._uploader = Uploader(
                    self._store, self._config.keep_checkpoints, self._metrics, self._config.out / "metrics.jsonl"
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if self._uploader and not (self._lease and self._lease.lost):
                try:
                    at_once = kind is not None and issubclass(kind, KeyboardInterrupt)
                    self._uploader.finish(0 if at_once else 60 * self._config.upload_minutes)
                except StorageError as problem:
                    if kind is None:
                        raise
                    say(f"warning: {problem}")
        finally:
            self._stack.close()

    # At the start

    def find(self) -> Path | None:
        """The local folder of the checkpoint to go on from, fetched if need be; None to start anew.

        Raises UsageError when there are checkpoints that `--resume never` would mix with, DataError when the one that
        is asked for is not there or not whole.
        """
        resume, run = self._config.resume, self._config.out
        remote = self._store.steps() if self._store else []
        local = [checkpoint_step(folder) for folder in list_checkpoints(run)]
        steps = sorted({*local, *remote}, reverse=True)
        if resume == "never":
            if steps:
                raise UsageError(
                    f"{run}: has checkpoints already; choose another --out (and --store), or drop --resume never to go on from them"
                )
            return None
        if not steps and resume != "auto" and not resume.isdigit():
            return self._find_elsewhere(resume)
        if resume.isdigit() and steps:
            self._set_aside(
                [step for step in local if step > int(resume)], [step for step in remote if step > int(resume)]
            )
            if (folder := self._fetch(int(resume), remote)) is None:
                raise DataError(
                    f"{run}: has no whole checkpoint of step {resume}; it has {', '.join(map(str, steps)) or 'none'}"
                )
            return folder
        if resume.isdigit():
            raise DataError(f"{run}: has no checkpoint of step {resume}, nor any other")
        if resume != "auto":
            say(f"{run}: has checkpoints of its own by now: going on from these, not from {resume}")
        for step in steps:
            if (folder := self._fetch(step, remote)) is not None:
                if self._uploader and step not in remote:
                    self._uploader.submit(folder)  # the process before this one did not get to it
                return folder
            self._metrics.fallbacks.inc()
        if steps:
            say("warning: no checkpoint is whole: starting anew")
        return None

    def _fetch(self, step: int, remote: list[int]) -> Path | None:
        """The local folder of a step, if it is whole here or there; says why not."""
        folder = self._config.out / checkpoint_name(step)
        problem = checkpoint_problem(folder) if folder.is_dir() else "not here"
        if problem is None:
            return folder
        if folder.is_dir():
            say(f"warning: passing over {folder}: {problem}")
        if self._store and step in remote:
            try:
                fetched = self._store.download(step, self._config.out)
            except DataError as error:
                say(f"warning: passing over {error}")
                return None
            curve = self._config.out / "metrics.jsonl"
            if not curve.exists():
                self._store.get_metrics(curve)
            return fetched
        return None

    def _find_elsewhere(self, source: str) -> Path:
        """The checkpoint that another run's folder, or one in S3, has."""
        if not is_s3(source):
            return find_checkpoint(Path(source))
        prefix, _, last = source.rstrip("/").rpartition("/")
        store, steps = (
            (S3Store(prefix), [checkpoint_step(Path(last))]) if STEP_FOLDER.match(last) else (S3Store(source), None)
        )
        for step in steps or store.steps():
            try:
                return store.download(step, self._config.out)
            except DataError as error:
                say(f"warning: passing over {error}")
                self._metrics.fallbacks.inc()
        raise DataError(f"{source}: no whole checkpoint there")

    def _set_aside(self, local: list[int], remote: list[int]) -> None:
        """What is newer than the step that a person chose stays, under a name that no resume looks for."""
        for step in local:
            folder = self._config.out / checkpoint_name(step)
            aside = self._config.out / f"aside-{time.time_ns()}-{folder.name}"
            folder.rename(aside)
            say(f"{folder}: newer than --resume {self._config.resume}; it is now {aside.name}")
        if remote:
            assert self._store
            raise UsageError(
                f"{self._store.address}: has newer checkpoints ({remote[0]}); give --resume {self._store.address}/{checkpoint_name(int(self._config.resume))} with a new --store"
            )

    # On the way

    def due(self, step: int) -> bool:
        """Whether `--checkpoint-every` asks for one now. Raises UserError once another job has taken over the store."""
        if self._lease and self._lease.lost:
            raise UserError(f"{self._lease.lost}: this job ends, so that the two do not mix")
        steps, minutes = self._config.checkpoint_interval
        return (steps is not None and step - self._saved_step >= steps) or (
            minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        )

    def save(
        self,
        state: TrainState,
        bert: BabyBert,
        dataset: Dataset,
        optimizer: torch.optim.Optimizer,
        scores: Scores | None,
        last: bool = False,
    ) -> Path | None:
        """Write the checkpoint, hand it to the uploader, delete old ones. One that is there already is left alone.

        A disk that cannot take it is a warning, and training goes on to the next one; at the end of the run (`last`)
        StorageError is raised.
        """
        start, there = time.monotonic(), self._config.out / checkpoint_name(state.step)
        if scores is None and state.step == self._saved_step and there.is_dir():
            return there
        facts: dict[str, Any] = {
            "settings": self._config.as_json(),
            "data_digest": dataset.digest,
            "scores": scores.as_dict() if scores else None,
        }
        try:
            folder = save_checkpoint(self._config.out, state, bert, dataset.tokenizer, optimizer, facts)
        except StorageError as error:
            self._metrics.failures.inc()
            if last:
                raise
            say(f"warning: {error}")
            self._saved_step, self._saved_at = state.step, time.monotonic()
            return None
        self._saved_step, self._saved_at = state.step, time.monotonic()
        self._metrics.saved(sum(path.stat().st_size for path in folder.iterdir()), self._saved_at - start)
        if self._uploader:
            self._uploader.submit(folder)
        prune(self._config.out, self._config.keep_checkpoints, self._uploader.in_use if self._uploader else frozenset())
        return folder

    def started_at(self, step: int) -> None:
        """Count `--checkpoint-every` from here."""
        self._saved_step, self._saved_at = step, time.monotonic()


def _lock(file: IO[str], run: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"{run}: another process is training there; stop it, or choose another --out") from error
