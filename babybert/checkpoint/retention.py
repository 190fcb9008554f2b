"""Which checkpoints of a run are kept: the newest few and the best. The same rule applies on disk and in S3."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from babybert.checkpoint.format import MANIFEST, checkpoint_name, checkpoint_step, list_checkpoints, read_manifest


def steps_to_delete(held_out_losses: Mapping[int, float | None], keep: int) -> list[int]:
    """The steps to delete: all except the newest `keep` and the one with the lowest held-out loss.

    Args:
        held_out_losses: by step; None for a checkpoint that was not scored. Of equal losses, the newest is the best.
    """
    newest_first = sorted(held_out_losses, reverse=True)
    scored = {step: loss for step, loss in held_out_losses.items() if loss is not None}
    best = min(scored, key=lambda step: (scored[step], -step)) if scored else None
    return [step for step in newest_first[keep:] if step != best]


def prune_checkpoints(run: Path, keep: int, in_use: frozenset[Path] = frozenset()) -> None:
    """Delete local checkpoints by `steps_to_delete`, except those in use. Call it after a save: the newest is valid."""
    losses: dict[int, float | None] = {}
    for folder in list_checkpoints(run):
        try:
            losses[checkpoint_step(folder)] = read_manifest(folder).held_out_loss
        except (OSError, ValueError):
            losses[checkpoint_step(folder)] = None
    for step in steps_to_delete(losses, keep):
        folder = run / checkpoint_name(step)
        if folder not in in_use:
            (folder / MANIFEST).unlink(missing_ok=True)  # first: a half-deleted checkpoint must not look valid
            shutil.rmtree(folder, ignore_errors=True)
