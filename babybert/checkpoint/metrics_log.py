"""`metrics.jsonl`: the curve of a run, one JSON object per line, in the folder of its checkpoints.

Lines are only ever appended. When a run resumes from a checkpoint, a line with `"split": "resume"` says from which
step. Lines of later steps that were written before it no longer count, because those steps are done again.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from babybert.errors import StorageError, os_reason


@dataclass(frozen=True)
class MetricsLog:
    """The `metrics.jsonl` of the run in folder `run`."""

    run: Path

    @property
    def path(self) -> Path:
        """The file."""
        return self.run / "metrics.jsonl"

    def write(self, split: str, **values: Any) -> None:
        """Append one line. A line that a crash cut short is ended first. Raises StorageError."""
        try:
            with self.path.open("ab+") as file:
                separator = b"\n" if _is_cut_short(file) else b""
                file.write(separator + json.dumps({"split": split, **values}).encode() + b"\n")
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be written: {os_reason(error)}; free some space, "
                "the run continues from its last checkpoint"
            ) from error

    def nonfinite_steps(self, after: int) -> list[int]:
        """The steps after this one at which an earlier process ended because of a non-finite loss."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        steps = []
        for text in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut short
                line = json.loads(text)
                if line["split"] == "nonfinite" and line["step"] > after:
                    steps.append(line["step"])
        return steps


def _is_cut_short(file: IO[bytes]) -> bool:
    """Whether the last line has no end. `file` is positioned at its end."""
    if file.tell() == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` that count, `resume` lines included. Raises OSError."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            step, split = line["step"], line["split"]
        except (ValueError, KeyError, TypeError):  # a line that was cut short
            continue
        if split == "resume":
            lines = [earlier for earlier in lines if earlier["step"] <= step]
        lines.append(line)
    return lines
