"""Checkpoints on local disk: `RUN/step-00001234/`, whole or not there at all.

A checkpoint is the saved model (see `model/saved.py`), `training.pt` (the optimizer's state), `state.json` (where the
run is, its settings and scores) and `manifest.json` (each file's size and SHA-256). All of it is written into a folder
with another name, flushed to disk, and renamed at the end: a crash at any moment leaves the older checkpoints and at
most a `.partial-` folder, which the next save sweeps away. Readers take only folders whose files are what the manifest
says. There is no random state in it: what is random in a step is a function of the seed and the step.
"""

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from babybert.config import ModelConfig
from babybert.data.dataset import Dataset
from babybert.data.digest import sha256
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, StorageError, UsageError
from babybert.model.bert import BabyBert
from babybert.progress import say

WEIGHTS, SIZES, TOKENIZER = "model.safetensors", "model.json", "tokenizer.json"
MODEL_FILES = (WEIGHTS, SIZES, TOKENIZER)
FORMAT = 2
STEP_FOLDER = re.compile(r"^step-(\d{8})$")
TRAINING, STATE, MANIFEST = "training.pt", "state.json", "manifest.json"
FILES = (*MODEL_FILES, TRAINING, STATE)


@dataclass
class TrainState:
    """Where a run is: `step` steps are done, and the next batch is number `batch` of epoch `epoch`.

    `seconds` of training lie behind it, in `restarts` + 1 processes.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    restarts: int = 0


def checkpoint_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(folder.name.removeprefix("step-"))


def save_checkpoint(
    run: Path,
    state: TrainState,
    model: BabyBert,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
) -> Path:
    """Write the checkpoint of `state` and return its folder. `facts` (settings, scores) are kept in `state.json`.

    The scores' losses go into the manifest too, so that the best checkpoint is found without reading any.

    Raises StorageError if the disk cannot take it; nothing half-written stays.
    """
    target = run / checkpoint_name(state.step)
    partial = run / f".partial-{target.name}"
    for abandoned in run.glob(".partial-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_model(partial, model, tokenizer)
        torch.save({"optimizer": optimizer.state_dict()}, partial / TRAINING)
        described = {"format": FORMAT, **dataclasses.asdict(state), "tokenizer_digest": tokenizer.digest, **facts}
        (partial / STATE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        manifest = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": sha256(partial / name)} for name in FILES
        }
        scores = facts.get("scores")
        loss = scores["mlm_loss"] + scores["nsp_loss"] if scores else None
        whole = {"format": FORMAT, "step": state.step, "held_out_loss": loss, "files": manifest}
        (partial / MANIFEST).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        for name in (*FILES, MANIFEST):
            _flush(partial / name)
        if target.exists():  # the same step, from a run that ended and was started again
            shutil.rmtree(target)
        partial.rename(target)
        _flush(run)
    # safetensors and torch.save wrap a full disk in errors of their own.
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise StorageError(
            f"{target}: cannot write the checkpoint: {reason}; make room and start again, the run goes on from its last one"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def checkpoint_problem(folder: Path) -> str | None:
    """What is wrong with this checkpoint, in a few words; None if it is whole."""
    try:
        manifest = read_manifest(folder)
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        for name in FILES:
            if sha256(folder / name) != manifest["files"][name]["sha256"]:
                return f"{name} differs from the manifest"
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read ({error!r})"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `manifest.json` says. Raises OSError and ValueError."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, whole or not."""
    return sorted((path for path in run.glob("step-*") if STEP_FOLDER.match(path.name)), reverse=True)


def newest_valid(run: Path) -> Path | None:
    """The newest checkpoint that verifies; says which it passed over. None if there is none."""
    for folder in list_checkpoints(run):
        problem = checkpoint_problem(folder)
        if problem is None:
            return folder
        say(f"warning: passing over {folder}: {problem}")
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means by `path`: itself, or the newest whole one of a run. Raises DataError."""
    if STEP_FOLDER.match(path.resolve().name):
        problem = checkpoint_problem(path) if path.is_dir() else "no such folder"
        if problem:
            raise DataError(f"{path}: not a whole checkpoint: {problem}")
        return path
    found = newest_valid(path) if path.is_dir() else None
    if found is None:
        raise DataError(f"{path}: no whole checkpoint there; train one with `babybert pretrain --out {path}`")
    return found


def read_state(folder: Path) -> dict[str, Any]:
    """What `state.json` of a verified checkpoint says."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def restore(folder: Path, optimizer: torch.optim.Optimizer) -> TrainState:
    """Put a verified checkpoint's optimizer back; the weights are `load_model`'s part.

    Raises UsageError if a version wrote it that grouped the parameters differently.
    """
    saved = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except ValueError as error:
        raise UsageError(
            f"{folder}: its optimizer is of another version of babybert; go on with that one, or choose another --out"
        ) from error
    return run_state(folder)


def run_state(folder: Path) -> TrainState:
    """Where the run was at a verified checkpoint."""
    state = read_state(folder)
    return TrainState(**{field.name: state[field.name] for field in dataclasses.fields(TrainState)})


def steps_to_delete(losses: dict[int, float | None], keep: int) -> list[int]:
    """The steps to delete: all but the newest `keep` and the one with the lowest held-out loss."""
    newest = sorted(losses, reverse=True)
    scored = {step: loss for step, loss in losses.items() if loss is not None}
    best = min(scored, key=lambda step: (scored[step], -step)) if scored else None
    return [step for step in newest[keep:] if step != best]


def prune(run: Path, keep: int, in_use: frozenset[Path] = frozenset()) -> None:
    """Delete all but the newest `keep` checkpoints, the best, and those in use. Called after a save: the newest is whole."""
    losses = {}
    for folder in list_checkpoints(run):
        try:
            losses[checkpoint_step(folder)] = read_manifest(folder).get("held_out_loss")
        except (OSError, ValueError, AttributeError):
            losses[checkpoint_step(folder)] = None
    for step in steps_to_delete(losses, keep):
        folder = run / checkpoint_name(step)
        if folder not in in_use:
            (folder / MANIFEST).unlink(missing_ok=True)  # first, so that a half-deleted one is never taken for whole
            shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_model(folder: Path, model: BabyBert, tokenizer: Tokenizer) -> None:
    """Write the three files into `folder`."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    (folder / SIZES).write_text(json.dumps(dataclasses.asdict(model.config), indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder / TOKENIZER)


def load_model(folder: Path) -> tuple[BabyBert, Tokenizer]:
    """Read them back, on the CPU. Raises DataError naming the file that is missing, broken, or does not fit."""
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    try:
        config = ModelConfig(**json.loads((folder / SIZES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        detail = error if isinstance(error, UsageError) else " ".join(repr(error).split())
        raise DataError(f"{folder / SIZES}: not the sizes of a model ({detail})") from error
    if config.vocab_size != tokenizer.size:
        raise DataError(
            f"{folder}: the model has {config.vocab_size:,} tokens, its tokenizer {tokenizer.size:,}; they are not of one run"
        )
    model = BabyBert(config)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise DataError(
            f"{folder / WEIGHTS}: not the weights of this model ({' '.join(str(error).split())[:300]})"
        ) from error
    return model, tokenizer


def check_same_vocabulary(folder: Path, tokenizer: Tokenizer, dataset: Dataset) -> None:
    """Raise DataError if the checkpoint in `folder` was trained with another vocabulary than the data's."""
    if tokenizer.digest != dataset.tokenizer.digest:
        raise DataError(
            f"{folder}: has another vocabulary ({tokenizer.size:,} tokens) than {dataset.folder} ({dataset.tokenizer.size:,}); use the data that it was trained on"
        )
