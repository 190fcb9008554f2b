"""Find the files that sources name, on disk or in S3, and count what is left out and why.

Nothing is missing in silence: a file that looks like a document but cannot be read (a broken link, no permission) is in
the list of files, so that reading it reports it.
"""

import collections
import fnmatch
import functools
import glob
import logging
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from babybert.corpus.files import file_errors
from babybert.corpus.s3_file import S3File, SourceFile
from babybert.errors import DataError
from babybert.s3 import is_s3, list_keys, make_client, split_address
from babybert.s3_errors import s3_errors

logger = logging.getLogger(__name__)

GLOB_CHARACTER = re.compile(r"[*?\[]")
SUFFIXES_SHOWN = 5
HIDDEN = "hidden"
OTHER_ENDING = "other ending"
FOUND_TWICE = "found twice"
FOLDER_FOUND_TWICE = "link to a folder that is searched anyway"
FOLDER_MARKER = "folder marker"
MATCHED_FOLDER = "folder that a pattern matched"
NOT_REGULAR = "not a regular file"
BELOW_OBJECT = "below an object of the same name"


@dataclass
class SourceFiles:
    """The files that some sources name.

    Attributes:
        paths: the files, in the order of the sources; those of one source sorted. Each file is there once.
        left_out: how many files were left out, by reason.
        other_endings: how many of them have which ending, if that is why.
    """

    paths: list[SourceFile] = field(default_factory=list)
    left_out: collections.Counter[str] = field(default_factory=collections.Counter)
    other_endings: collections.Counter[str] = field(default_factory=collections.Counter)

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Count files that are left out."""
        if count:
            self.left_out[reason] += count

    def add(self, others: "SourceFiles") -> None:
        """Add the files of another source, which come after these."""
        self.paths += others.paths
        self.left_out += others.left_out
        self.other_endings += others.other_endings

    def has_ending(self, name: str, suffixes: tuple[str, ...]) -> bool:
        """Whether a file's name ends in one of `suffixes`, in upper or lower case. If not, it is counted."""
        if name.lower().endswith(suffixes):
            return True
        self.leave_out(OTHER_ENDING)
        self.other_endings[PurePosixPath(name).suffix.lower() or "none"] += 1
        return False

    def left_out_text(self) -> str:
        """Return what was left out as a phrase, or an empty text."""
        phrases = []
        for reason, count in sorted(self.left_out.items()):
            details = ""
            if reason == OTHER_ENDING:
                shown = self.other_endings.most_common(SUFFIXES_SHOWN)
                rest = ", ..." if len(self.other_endings) > len(shown) else ""
                details = f" ({', '.join(f'{ending} {endings}' for ending, endings in shown)}{rest})"
            phrases.append(f"{count:,} {reason}{details}")
        return ", ".join(phrases)

    def log(self) -> None:
        """Log how many files were found, if there may be any doubt."""
        if len(self.paths) > 1 or self.left_out:
            left_out = f"; left out: {self.left_out_text()}" if self.left_out else ""
            logger.info(f"{len(self.paths):,} files found{left_out}")


def find_files(sources: Sequence[str], suffixes: tuple[str, ...], work_folder: Path) -> SourceFiles:
    """Return the files that `sources` name.

    A source is a file, a folder, a glob pattern, or an `s3://` address of an object, a prefix or a pattern of keys. A
    name that exists is that file or folder, even if it looks like a pattern. Folders are searched to any depth, through
    links too; hidden files are left out.

    Args:
        sources: what to search for.
        suffixes: only files with these endings, in upper or lower case, are taken from a folder or prefix.
        work_folder: where objects from S3 are copied to while they are read.

    Raises DataError for a source that names no file.
    """
    found = SourceFiles()
    seen: set[str] = set()
    for source in sources:
        of_source = SourceFiles()
        if is_s3(source):
            _find_s3(source, suffixes, work_folder, of_source, seen)
        else:
            with file_errors(Path(source)):
                _add_local(_find_local(source, suffixes, of_source), of_source, seen)
        if not of_source.paths and not of_source.left_out[FOUND_TWICE]:
            left_out = f"; left out: {of_source.left_out_text()}" if of_source.left_out else ""
            problem = "no such object, and no object below it ends" if is_s3(source) else "no files that end"
            raise DataError(f"{source}: {problem} in {', '.join(suffixes)}{left_out}")
        found.add(of_source)
    return found


def _find_local(source: str, suffixes: tuple[str, ...], found: SourceFiles) -> list[Path]:
    """Return the files that a path or pattern names, sorted; count what is left out."""
    path = Path(source)
    if path.is_dir():
        return _search_folder(path, suffixes, found)
    if path.is_file():
        return [path]
    if path.exists():
        raise DataError(f"{source}: neither a file nor a folder; a source must be a file that can be read twice")
    paths = []
    for name in glob.glob(source, recursive=True):  # noqa: PTH207 (pathlib does not glob absolute patterns)
        if Path(name).is_dir():
            found.leave_out(MATCHED_FOLDER)
        else:
            paths.append(Path(name))
    if not paths and not found.left_out[MATCHED_FOLDER]:
        raise DataError(
            f"{source}: no such file or folder, and no file matches it as a pattern (where [[] stands for a [)"
        )
    return sorted(paths)


def _search_folder(folder: Path, suffixes: tuple[str, ...], found: SourceFiles) -> list[Path]:
    """Return the files below `folder` with these endings, and the folders that cannot be listed."""
    files, unreadable_folders = _walk(folder, found)
    return unreadable_folders + sorted(file for file in files if found.has_ending(file.name, suffixes))


def _walk(folder: Path, found: SourceFiles) -> tuple[list[Path], list[Path]]:
    """Return all files below `folder` that are not hidden, and the folders that cannot be listed.

    Links to folders are followed last, so that a folder that is reached twice has its own name. A link to a folder that
    contains `folder` is not followed: it leads in a circle.
    """
    files, unreadable_folders = [], []
    searched = set(map(str, Path(os.path.realpath(folder)).parents))
    folders, links = collections.deque([folder]), collections.deque[Path]()
    while folders or links:
        current = folders.popleft() if folders else links.popleft()
        real_path = os.path.realpath(current)
        if real_path in searched:
            found.leave_out(FOLDER_FOUND_TWICE)
            continue
        searched.add(real_path)
        try:
            with os.scandir(current) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError:
            unreadable_folders.append(current)
            continue
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                found.leave_out(HIDDEN)
            elif not (os.path.isdir(path) if entry.is_symlink() else entry.is_dir()):  # noqa: PTH112 (never raises)
                files.append(path)
            else:
                (links if entry.is_symlink() else folders).append(path)
    return files, unreadable_folders


def _add_local(paths: Iterable[Path], found: SourceFiles, seen: set[str]) -> None:
    """Add these files, unless they were seen before."""
    real_folder = functools.cache(os.path.realpath)  # a call of the system per part of the path
    for path in paths:
        real_path = os.path.realpath(path) if path.is_symlink() else f"{real_folder(path.parent)}/{path.name}"
        if not _may_be_file(path):
            found.leave_out(NOT_REGULAR)
        elif real_path in seen:
            found.leave_out(FOUND_TWICE)
        else:
            seen.add(real_path)
            found.paths.append(path)


def _may_be_file(path: Path) -> bool:
    """Whether `path` is a regular file, or something that cannot be read, which reading it will report."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return True
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _find_s3(source: str, suffixes: tuple[str, ...], work_folder: Path, found: SourceFiles, seen: set[str]) -> None:
    """Add the objects that `source` names, unless they were seen before."""
    bucket, key = split_address(source)
    client = make_client()
    with s3_errors(source):
        sizes = _find_objects(client, bucket, key, suffixes, found)
    for name, size in sizes.items():
        file = S3File(bucket, name, size, work_folder)
        if str(file) in seen:
            found.leave_out(FOUND_TWICE)
        else:
            seen.add(str(file))
            found.paths.append(file)


def _find_objects(client: Any, bucket: str, key: str, suffixes: tuple[str, ...], found: SourceFiles) -> dict[str, int]:
    """Return the sizes by key of the objects that `key` names: one object, all below a prefix, or a pattern.

    Consoles and file managers show an object whose name ends in `/` as a folder. Such a marker is no document.
    """
    sizes = dict(list_keys(client, bucket, key))
    folder = key if key.endswith("/") or not key else key + "/"
    below = {name: size for name, size in sizes.items() if name.startswith(folder) and name != folder}
    if key in sizes and not key.endswith("/") and (sizes[key] or not below):
        found.leave_out(BELOW_OBJECT, len(below))
        return {key: sizes[key]}
    found.leave_out(FOLDER_MARKER, folder in sizes)
    glob_character = GLOB_CHARACTER.search(key)
    if not below and glob_character:
        objects = list_keys(client, bucket, key[: glob_character.start()])
        matches = {name: size for name, size in objects if fnmatch.fnmatchcase(name, key)}
        return {name: size for name, size in matches.items() if not _is_marker(name, found)}
    return {
        name: size
        for name, size in below.items()
        if not _is_marker(name, found)
        and not _is_hidden(name.removeprefix(folder), found)
        and found.has_ending(name, suffixes)
    }


def _is_marker(name: str, found: SourceFiles) -> bool:
    """Whether an object only marks a folder; it is counted."""
    found.leave_out(FOLDER_MARKER, name.endswith("/"))
    return name.endswith("/")


def _is_hidden(name: str, found: SourceFiles) -> bool:
    """Whether an object would be hidden on a disk, itself or by its folder; it is counted."""
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    found.leave_out(HIDDEN, is_hidden)
    return is_hidden
