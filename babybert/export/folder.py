"""The folder of an export: it appears complete or not at all, and replaces nothing but an earlier export."""

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from babybert.errors import UsageError, cannot_write, os_reason

FACTS, CONFIG = "babybert.json", "config.json"  # one of them is in each export


@contextlib.contextmanager
def new_export_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder next to `out` that takes its place at the end.

    Raises UsageError if `out` has files already, unless they are an earlier export and `overwrite` is set, or if it
    cannot be written; StorageError if the disk is full.
    """
    _check_replaceable(out, overwrite)
    target = out.absolute()
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except OSError as error:
        raise cannot_write(f"{out}: cannot be written: {os_reason(error)}; choose another --out", error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if out.is_symlink():
        raise UsageError(f"{out}: is a symbolic link, which would be replaced; name the folder that it leads to")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not _is_export(out):
        raise UsageError(f"{out}: exists, and is not an earlier export; choose another --out")
    if not overwrite:
        raise UsageError(f"{out}: has an export already; choose another --out, or add --overwrite")


def _is_export(folder: Path) -> bool:
    if (folder / FACTS).is_file():
        return True
    try:
        return bool(json.loads((folder / CONFIG).read_bytes())["model_type"] == "babybert")
    except (OSError, ValueError, LookupError, TypeError):
        return False
