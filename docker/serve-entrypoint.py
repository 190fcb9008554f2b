#!/opt/venv/bin/python
"""Serve what BABYBERT_MODEL_URI names: an archive, a run's folder, one checkpoint, or s3://bucket/prefix.

A checkpoint is verified file by file before it is packed. Exit codes are those of `babybert`: 2 for a wrong setting or
refused credentials, 3 for a model that is not there or not whole.
"""

import os
import sys
import tempfile
from pathlib import Path

from babybert.cli import main
from babybert.errors import DataError, UsageError, UserError
from babybert.inference.archive import write_archive
from babybert.progress import say
from babybert.s3 import is_s3


def find_archive(source: str, scratch: Path) -> Path:
    """The .mar that `source` is, has, or is made into."""
    from babybert.training.checkpoint import find_checkpoint
    from babybert.training.storage import S3Store

    if not source:
        raise UsageError("no model: set BABYBERT_MODEL_URI to a .mar, a folder or s3://bucket/prefix")
    if is_s3(source):
        store = S3Store(source)
        steps = sorted(store.steps(), reverse=True)
        if not steps:
            raise DataError(f"{source}: no checkpoint there; train with --store {source}")
        for step in steps:
            try:
                return write_archive(store.download(step, scratch), scratch)
            except DataError as error:
                say(f"warning: passing over {error}")
        raise DataError(f"{source}: no whole checkpoint there")
    path = Path(source)
    if path.is_dir() and (path / "babybert.mar").is_file():
        return path / "babybert.mar"
    if path.suffix == ".mar":
        return path
    return write_archive(find_checkpoint(path), scratch)


if __name__ == "__main__":
    try:
        scratch = Path(tempfile.mkdtemp(prefix="model-"))
        archive = find_archive(os.environ.get("BABYBERT_MODEL_URI", ""), scratch)
    except UserError as error:
        print(f"babybert serve: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(main(["serve", f"--archive={archive}", *sys.argv[1:]]))
