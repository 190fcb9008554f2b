"""The SHA-256 of a file: in a module of its own, so that a server checks a checkpoint without the data's libraries."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
