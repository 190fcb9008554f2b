"""How a run learned: its loss curves with their baselines, and the answers of several checkpoints to one request.

A run is a folder or a prefix in S3. It is read anew for each request, because it may still be training. At most
MAX_CHECKPOINTS of its checkpoints are queried: the first, the last, and others evenly spaced between them. Each is
loaded once and kept, so memory holds at most MAX_CHECKPOINTS models.
"""

import threading
from pathlib import Path
from typing import Any

from babybert.checkpoint.format import checkpoint_name, checkpoint_step, list_checkpoints
from babybert.checkpoint.source import CheckpointSource
from babybert.checkpoint.storage import S3Store
from babybert.errors import DataError, UsageError
from babybert.evaluation.curves import read_run, running_mean, series
from babybert.folders import temporary_folder
from babybert.playground.backends import ApiResponse, respond
from babybert.s3 import is_s3
from babybert.serving import request_schema
from babybert.serving.predictor import Predictor

MAX_CHECKPOINTS = 5
# For each loss, the baselines that are drawn with it: key in metrics.jsonl and name.
BASELINES: dict[str, dict[str, str]] = {
    "mlm_loss": {"mlm_unigram_loss": "unigram baseline", "mlm_chance_loss": "chance"},
    "nsp_loss": {"nsp_chance_loss": "chance"},
    "class_loss": {},  # of a fine-tuned run
}


class RunHistory:
    """A run in a folder or at `s3://bucket/prefix`. Raises DataError if the folder does not exist."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._store = S3Store(self.address) if is_s3(address) else None
        if self._store is None and not Path(address).is_dir():
            raise DataError(f"{address}: no such folder; a run is what `babybert pretrain --out` writes")
        self._predictors: dict[int, Predictor] = {}  # by step
        self._lock = threading.Lock()

    def steps(self) -> list[int]:
        """The steps of the run's checkpoints, ascending."""
        if self._store:
            return sorted(self._store.steps())
        return sorted(checkpoint_step(folder) for folder in list_checkpoints(Path(self.address)))

    def curves(self) -> dict[str, Any]:
        """Training points, their running mean, held-out points and baselines of each loss. Raises DataError."""
        lines = read_run(self.address)
        curves = {}
        for loss, baselines in BASELINES.items():
            train = series(lines, loss, "train")
            held_out = series(lines, loss, "validation")
            if train.empty and held_out.empty:
                continue
            curves[loss] = {
                "train": train.dropna().values.tolist(),
                "mean": train.assign(value=running_mean(train["value"])).dropna().values.tolist(),
                "held_out": held_out.dropna().values.tolist(),
                "baselines": _last_values(lines, baselines),
            }
        return {"run": self.address, "curves": curves, "steps": self.steps()}

    def query_checkpoints(self, body: bytes, content_type: str) -> ApiResponse:
        """The answers of several checkpoints to one fill-mask request with a single text.

        Returns `{"checkpoints": [{"step", "masks"}], "passed_over": [str]}`, or the first error response. Corrupt
        checkpoints are skipped; "passed_over" has the reasons. Raises UsageError for another kind of request, DataError
        if there is no valid checkpoint.
        """
        _require_single_text(request_schema.parse(body, content_type))
        answers, skipped = [], []
        with self._lock:
            steps = evenly_spaced(self.steps(), MAX_CHECKPOINTS)
            if not steps:
                raise DataError(f"{self.address}: no checkpoint there yet; a run writes one at each epoch's end")
            self._predictors = {step: predictor for step, predictor in self._predictors.items() if step in steps}
            for step in steps:
                try:
                    response = respond(self._load(step), body, content_type)
                except DataError as error:  # corrupt, or deleted meanwhile by the run
                    skipped.append(str(error))
                    continue
                if response.status != 200:
                    return response
                answers.append({"step": step, **response.body})
        if not answers:
            raise DataError(f"{self.address}: none of its checkpoints is valid: {skipped[0]}")
        return ApiResponse(200, {"checkpoints": answers, "passed_over": skipped})

    def _load(self, step: int) -> Predictor:
        if step not in self._predictors:
            source = CheckpointSource(f"{self.address}/{checkpoint_name(step)}")
            with temporary_folder("playground") as folder:
                self._predictors[step] = Predictor.load(source.find(folder))
        return self._predictors[step]


def evenly_spaced(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps: the first, the last, and others evenly spaced between them."""
    if len(steps) <= count:
        return steps
    last = len(steps) - 1
    return [steps[round(index * last / (count - 1))] for index in range(count)]


def _last_values(lines: list[dict[str, Any]], baselines: dict[str, str]) -> list[dict[str, Any]]:
    """`{"name", "value"}` of each baseline that the metrics have."""
    result = []
    for key, name in baselines.items():
        values = [line[key] for line in lines if line.get(key) is not None]
        if values:
            result.append({"name": name, "value": values[-1]})
    return result


def _require_single_text(request: request_schema.Request) -> None:
    is_text = all(isinstance(item, request_schema.FillMask) and not item.pipeline for item in request.items)
    if not is_text or not request.single:
        raise UsageError("several checkpoints can only be asked to fill in one 'text'")
