"""How a run learned: its curves beside the baselines, and one question put to several of its checkpoints.

A run is a folder or a prefix in S3. It is looked at anew each time: it may be training still. Of its checkpoints up to
SHOWN are asked, the first and the last among them and the others evenly between; each is loaded once and kept, so that
memory is that of SHOWN models.
"""

import tempfile
import threading
from pathlib import Path
from typing import Any

from babybert.checkpoint.format import checkpoint_name, checkpoint_step, list_checkpoints
from babybert.checkpoint.source import CheckpointSource
from babybert.checkpoint.storage import S3Store
from babybert.errors import DataError, UsageError
from babybert.evaluation.curves import read_run, running_mean, series
from babybert.playground.models import Answer, answer_here
from babybert.s3 import is_s3
from babybert.serving import request_schema
from babybert.serving.predictor import Predictor

SHOWN = 5
LOSSES = ("mlm_loss", "nsp_loss")
# What each loss is drawn beside: the key in metrics.jsonl, and its name.
BASELINES = {
    "mlm_loss": {"mlm_unigram_loss": "word counts", "mlm_chance_loss": "chance"},
    "nsp_loss": {"nsp_chance_loss": "chance"},
}


class Run:
    """A run at a folder or `s3://bucket/prefix`. Raises DataError for a folder that is not there."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._store = S3Store(self.address) if is_s3(address) else None
        if self._store is None and not Path(address).is_dir():
            raise DataError(f"{address}: no such folder; a run is what `babybert pretrain --out` writes")
        self._loaded: dict[int, Predictor] = {}
        self._lock = threading.Lock()

    def steps(self) -> list[int]:
        """The steps of its checkpoints, early to late."""
        return sorted(
            self._store.steps() if self._store else map(checkpoint_step, list_checkpoints(Path(self.address)))
        )

    def curves(self) -> dict[str, Any]:
        """For each loss: points of the training (as logged, and their running mean), held-out points, baselines.

        Raises DataError when there is no curve.
        """
        with tempfile.TemporaryDirectory() as folder:
            run = Path(self.address)
            if self._store:
                run = Path(folder)
                self._store.download_metrics(run / "metrics.jsonl")
                if not (run / "metrics.jsonl").exists():
                    raise DataError(
                        f"{self.address}: has no metrics.jsonl yet; a run brings it there with its first checkpoint"
                    )
            lines = read_run(run)
        found = {}
        for loss in LOSSES:
            train, held_out = series(lines, loss, "train"), series(lines, loss, "validation")
            known = {name: [line[key] for line in lines if key in line] for key, name in BASELINES[loss].items()}
            found[loss] = {
                "train": train.dropna().values.tolist(),
                "mean": train.assign(value=running_mean(train["value"])).dropna().values.tolist(),
                "held_out": held_out.dropna().values.tolist(),
                "baselines": [{"name": name, "value": values[-1]} for name, values in known.items() if values],
            }
        return {"run": self.address, "curves": found, "steps": self.steps()}

    def answer(self, body: bytes, content_type: str) -> Answer:
        """What several checkpoints fill in: `{"checkpoints": [{"step", "masks"}], "passed_over": [str]}`, or the first refusal."""
        request = request_schema.parse(body, content_type)
        if (
            request.task != request_schema.FILL_MASK
            or not request.single
            or any(isinstance(item, request_schema.FillMask) and item.pipeline for item in request.items)
        ):
            raise UsageError("several checkpoints are asked to fill in one 'text'")
        found, passed_over = [], []
        with self._lock:
            chosen = spread(self.steps(), SHOWN)
            if not chosen:
                raise DataError(f"{self.address}: no checkpoint there yet; a run writes one at each epoch's end")
            self._loaded = {step: predictor for step, predictor in self._loaded.items() if step in chosen}
            for step in chosen:
                try:
                    answer = answer_here(self._load(step), body, content_type)
                except DataError as error:  # damaged, or deleted since by the run that goes on
                    passed_over.append(str(error))
                    continue
                if answer.status != 200:
                    return answer
                found.append({"step": step, **answer.body})
        if not found:
            raise DataError(f"{self.address}: none of its checkpoints is whole: {passed_over[0]}")
        return Answer(200, {"checkpoints": found, "passed_over": passed_over})

    def _load(self, step: int) -> Predictor:
        if step not in self._loaded:
            with tempfile.TemporaryDirectory(prefix="babybert-playground-") as folder:
                self._loaded[step] = Predictor.load(
                    CheckpointSource(f"{self.address}/{checkpoint_name(step)}").find(Path(folder))
                )
        return self._loaded[step]


def spread(steps: list[int], most: int) -> list[int]:
    """Up to `most` of them, the first and the last among them, the others evenly between."""
    if len(steps) <= most:
        return steps
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]
