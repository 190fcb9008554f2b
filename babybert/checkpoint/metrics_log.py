"""`metrics.jsonl`: the curve of a run, kept beside its checkpoints."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babybert.errors import StorageError


@dataclass(frozen=True)
class MetricsLog:
    """`metrics.jsonl` in the run's folder: one JSON object a line, only ever appended to.

    Where a run goes on from a checkpoint, a line says from which step; what was logged beyond it before has been undone.
    """

    run: Path

    @property
    def path(self) -> Path:
        """The file."""
        return self.run / "metrics.jsonl"

    def write(self, split: str, **values: Any) -> None:
        """Append one line, whole whatever was there before. Raises StorageError."""
        try:
            with self.path.open("ab+") as file:
                torn = file.tell() > 0 and file.seek(-1, 2) >= 0 and file.read(1) != b"\n"
                file.write((b"\n" if torn else b"") + json.dumps({"split": split, **values}).encode() + b"\n")
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be written: {error.strerror}; the run goes on from its last checkpoint once there is room"
            ) from error

    def bad_steps(self, beyond: int) -> list[int]:
        """The steps after this one at which a process before us ended, because the loss was no number."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        found = []
        for text in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                if line["split"] == "nonfinite" and line["step"] > beyond:
                    found.append(line["step"])
        return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines that count: none that is torn, none that a resume has undone; the resumes are among them. Raises OSError."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            step, split = line["step"], line["split"]
        except (ValueError, KeyError, TypeError):
            continue
        if split == "resume":
            lines = [earlier for earlier in lines if earlier["step"] <= step]
        lines.append(line)
    return lines
