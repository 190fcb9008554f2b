"""What a checkpoint is: a directory `RUN/step-00001234/`, and how it is saved, verified and loaded.

| file | content |
| --- | --- |
| `model.safetensors` | the weights; reading them runs no code, unlike unpickling |
| `model.json` | the sizes of the network (`ModelConfig`), and a classifier's classes (`ClassifierConfig`) |
| `tokenizer.json` | the tokenizer |
| `training.pt` | the optimizer's state |
| `state.json` | where the run is, its settings and its held-out scores (`CheckpointState`) |
| `manifest.json` | size and SHA-256 of each file above, and of the manifest itself (`Manifest`) |

A checkpoint appears completely or not at all: the files are written into `.partial-step-00001234`, flushed to disk, and
the directory is renamed at the end. A crash at any moment leaves the older checkpoints and at most a `.partial-`
directory, which the next save deletes. Readers accept only directories whose files match the manifest.

No random state is saved: what is random in a step is a function of the seed and the step.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch

# Re-exported: they are a part of the format.
from babybert.checkpoint.model_files import MODEL_FILES as MODEL_FILES
from babybert.checkpoint.model_files import SIZES as SIZES
from babybert.checkpoint.model_files import TOKENIZER as TOKENIZER
from babybert.checkpoint.model_files import WEIGHTS as WEIGHTS
from babybert.checkpoint.model_files import load_classifier as load_classifier
from babybert.checkpoint.model_files import load_encoder as load_encoder
from babybert.checkpoint.model_files import load_model as load_model
from babybert.checkpoint.model_files import save_model as save_model
from babybert.data.digest import sha256
from babybert.data.epoch_order import BatchSpan
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, StorageError, UsageError
from babybert.model.bert import BertEncoder

if TYPE_CHECKING:
    from babybert.data.dataset import Dataset  # reads tables, which a server does not need

logger = logging.getLogger(__name__)

FORMAT = 2
TRAINING, STATE, MANIFEST = "training.pt", "state.json", "manifest.json"
FILES = (*MODEL_FILES, TRAINING, STATE)
STEP_FOLDER = re.compile(r"step-([0-9]{8})\Z")


@dataclass
class TrainState:
    """How far a run is. The next batch is number `batch` of epoch `epoch`, both counted from 0.

    If the batch size or bucketing changed within the epoch, `earlier_spans` are the epoch's batches before the change,
    and `batch` counts from the change.
    """

    step: int = 0  # optimizer steps done
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0  # of training, in all processes so far
    restarts: int = 0  # processes before this one
    earlier_spans: list[BatchSpan] = field(default_factory=list)


@dataclass(frozen=True)
class CheckpointState:
    """The content of `state.json`."""

    step: int
    epoch: int
    batch: int
    seconds: float
    restarts: int
    tokenizer_digest: str  # SHA-256 of the tokenizer
    settings: dict[str, Any]  # the PretrainConfig or FinetuneConfig, as JSON
    data_digest: str  # SHA-256 of the training data and the tokenizer
    scores: dict[str, Any] | None  # on held-out pairs; None if the run was stopped within an epoch
    format: int = FORMAT
    earlier_spans: list[dict[str, Any]] = field(default_factory=list)  # of `BatchSpan`, as JSON
    devices: dict[str, Any] | None = None  # of `DistributedContext.facts`; None in checkpoints of earlier versions

    def train_state(self) -> TrainState:
        """Where the run was."""
        earlier_spans = [BatchSpan(**span) for span in self.earlier_spans]
        return TrainState(self.step, self.epoch, self.batch, self.seconds, self.restarts, earlier_spans)

    def held_out_loss(self) -> float | None:
        """The sum of the held-out losses in nats, of MLM alone if NSP was not scored; None without scores."""
        if not self.scores:
            return None
        if "class_loss" in self.scores:
            return float(self.scores["class_loss"])
        return float(self.scores["mlm_loss"] + (self.scores["nsp_loss"] or 0.0))


@dataclass(frozen=True)
class FileEntry:
    """Size and digest of one file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    `held_out_loss` is here so that the best checkpoint is found without reading any. In S3, `attempt` names the upload
    that the files belong to; a local manifest has none. The JSON also holds a SHA-256 of the other fields except
    `attempt`. Manifests of earlier versions lack it.
    """

    step: int
    held_out_loss: float | None
    files: dict[str, FileEntry]
    attempt: str | None = None
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        content = self._content()
        upload = {} if self.attempt is None else {"attempt": self.attempt}
        return json.dumps({**content, "sha256": _digest_of(content), **upload}, indent=2) + "\n"

    def _content(self) -> dict[str, Any]:
        files = {name: dataclasses.asdict(entry) for name, entry in self.files.items()}
        return {"format": self.format, "step": self.step, "held_out_loss": self.held_out_loss, "files": files}

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Parse `manifest.json`. Raises ValueError for anything that is not a valid manifest."""
        try:
            content = json.loads(text)
            loss = content["held_out_loss"]
            manifest = cls(
                step=int(content["step"]),
                held_out_loss=None if loss is None else float(loss),
                files={name: FileEntry(entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()},
                attempt=content.get("attempt"),
                format=content["format"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a manifest ({error!r})") from error
        if "sha256" in content and content["sha256"] != _digest_of(manifest._content()):
            raise ValueError("the manifest differs from its own SHA-256")
        return manifest


def _digest_of(content: dict[str, Any]) -> str:
    """SHA-256 of JSON content, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checkpoint_name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint's directory name."""
    return int(folder.name.removeprefix("step-"))


# Saving


def save_checkpoint(
    run: Path, state: CheckpointState, model: BertEncoder, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer
) -> Path:
    """Write a checkpoint into the run's folder and return its directory.

    Raises StorageError if the disk cannot take it. Nothing half-written is left then.
    """
    target = run / checkpoint_name(state.step)
    with _written_atomically(target) as partial:
        save_model(partial, model, tokenizer)
        torch.save({"optimizer": optimizer.state_dict()}, partial / TRAINING)
        # `format` comes first, for a person who opens the file.
        state_json = {"format": state.format, **{key: value for key, value in vars(state).items() if key != "format"}}
        (partial / STATE).write_text(json.dumps(state_json, indent=2) + "\n", encoding="utf-8")
        entries = {name: FileEntry((partial / name).stat().st_size, sha256(partial / name)) for name in FILES}
        manifest = Manifest(state.step, state.held_out_loss(), entries)
        (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return target


@contextlib.contextmanager
def _written_atomically(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` at the end. Raises StorageError."""
    run = target.parent
    partial = run / f".partial-{target.name}"
    try:
        for abandoned in run.glob(".partial-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            _flush_to_disk(path)
        if target.exists():  # the same step, from a run that ended and was started again
            shutil.rmtree(target)
        partial.rename(target)
        _flush_to_disk(run)
    # safetensors and torch.save raise their own error types when the disk is full.
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise StorageError(
            f"{target}: cannot write the checkpoint: {reason}; free some space and start again, "
            "the run continues from its last checkpoint"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Verifying and finding


def checkpoint_problem(folder: Path) -> str | None:
    """Why this checkpoint is corrupt, in a few words; None if it is valid."""
    try:
        manifest = read_manifest(folder)
        if manifest.format != FORMAT:
            return f"format {manifest.format}; this version reads format {FORMAT}"
        for name in FILES:
            if sha256(folder / name) != manifest.files[name].sha256:
                return f"{name} differs from the manifest"
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except (OSError, ValueError, KeyError) as error:
        return f"cannot be read ({error})"
    return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises OSError and ValueError."""
    return Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"))


def read_state(folder: Path) -> CheckpointState:
    """The `state.json` of a verified checkpoint. Earlier versions wrote fewer fields; later ones may write more."""
    content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    known = {entry.name for entry in dataclasses.fields(CheckpointState)}
    return CheckpointState(**{name: value for name, value in content.items() if name in known})


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint directories of a run, newest first, valid or not."""
    return sorted((path for path in run.glob("step-*") if STEP_FOLDER.match(path.name)), reverse=True)


def newest_valid(run: Path) -> Path | None:
    """The newest valid checkpoint of a run; None if there is none. Logs which ones it skips."""
    for folder in list_checkpoints(run):
        problem = checkpoint_problem(folder)
        if problem is None:
            return folder
        logger.warning(f"skipping {folder}: {problem}")
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means by `path`: itself, or the newest valid one of a run. Raises DataError."""
    if STEP_FOLDER.match(path.resolve().name):
        problem = checkpoint_problem(path) if path.is_dir() else "no such folder"
        if problem:
            raise DataError(f"{path}: not a valid checkpoint: {problem}")
        return path
    newest = newest_valid(path) if path.is_dir() else None
    if newest is None:
        raise DataError(f"{path}: no valid checkpoint there; train one with `babybert pretrain --out {path}`")
    return newest


# Loading


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load a verified checkpoint's optimizer state.

    Raises UsageError if it is of another optimizer, or of a version that groups the parameters differently.
    """
    saved = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except (ValueError, KeyError) as error:
        raise UsageError(
            f"{folder}: its optimizer state is of another --optimizer, or from another version of babybert; continue "
            "with those, or choose another --out"
        ) from error


def check_same_vocabulary(folder: Path, tokenizer: Tokenizer, dataset: "Dataset") -> None:
    """Raise DataError if the checkpoint in `folder` was trained with another vocabulary than the data's."""
    if tokenizer.digest != dataset.tokenizer.digest:
        raise DataError(
            f"{folder}: has another vocabulary ({tokenizer.size:,} tokens) than {dataset.folder} "
            f"({dataset.tokenizer.size:,}); use the data that it was trained on"
        )
