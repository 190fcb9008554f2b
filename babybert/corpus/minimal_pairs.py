"""BLiMP's minimal pairs (Warstadt et al., 2020): an acceptable sentence and one that differs from it in one point.

A paradigm is one JSON Lines file with an object for each pair. The files may be anywhere in a folder, in a tar archive
(compressed or not) or in a zip archive. Archives are only read: nothing is extracted to disk, so no path or link in one
can do harm. BLiMP's repository also has JSON Lines files with results of models: those without sentences are left out,
and copies of a pair count once.
"""

import contextlib
import io
import logging
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from babybert.corpus.files import BadRows, decompressed, file_errors, shown_names
from babybert.corpus.json_rows import read_json_lines
from babybert.corpus.s3_file import SourceFile, file_size
from babybert.corpus.sources import find_files
from babybert.errors import DataError
from babybert.folders import temporary_folder

logger = logging.getLogger(__name__)

ENDING = ".jsonl"
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
SENTENCE_KEYS = ("sentence_good", "sentence_bad")
KEYS = (*SENTENCE_KEYS, "UID", "linguistics_term")
# The paper counts two paradigms of animacy as argument structure; the files give them a term of their own.
PHENOMENA = {"s-selection": "argument_structure"}
MOST_BYTES = 100_000_000  # of one file; BLiMP's largest has 0.6 MB
MOST_PAIRS = 1_000_000  # BLiMP has 67,000
REST_BYTES = 1 << 20


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences, of which the first is acceptable.

    Attributes:
        good: the acceptable sentence.
        bad: the other one.
        paradigm: BLiMP's `UID`, such as `wh_island`.
        phenomenon: one of BLiMP's twelve, such as `island_effects`.
        number: BLiMP's `pairID`, or an empty text.
        name: file and line, for messages.
    """

    good: str
    bad: str
    paradigm: str
    phenomenon: str
    number: str
    name: str


def read_minimal_pairs(source: str) -> list[MinimalPair]:
    """Read all pairs of a folder, an archive or a single file, on disk or in S3. The order of the files is irrelevant.

    Raises DataError, naming the file and the line, for what cannot be read and for a source without pairs.
    """
    pairs: list[MinimalPair] = []
    others: list[str] = []
    with temporary_folder("blimp") as work_folder:
        for path in find_files([source], (ENDING,), work_folder).paths:
            with file_errors(path), _zip_errors(path):
                for name, content in _open_files(path):
                    of_file = _read_file(name, content, MOST_PAIRS - len(pairs))
                    pairs += of_file
                    if not of_file:
                        others.append(name)
    if not pairs:
        found = f"{others[0]} has none" if others else f"it has no file that ends in {ENDING}"
        raise DataError(
            f"{source}: no minimal pairs: {found}; expected BLiMP's files, such as data/wh_island.jsonl, "
            f"whose rows have {', '.join(KEYS)}"
        )
    if others:
        logger.info(f"files without minimal pairs, which are left out: {len(others):,}, the first is {others[0]}")
    _check_phenomena(pairs)
    return _without_copies(pairs)


def _open_files(path: SourceFile) -> Iterator[tuple[str, io.BufferedIOBase]]:
    """The name and the content of each JSON Lines file: those in an archive, or the file itself."""
    name = path.name.lower()
    if name.endswith(TAR_ENDINGS):
        yield from _open_tar(path)
    elif name.endswith(".zip"):
        yield from _open_zip(path)
    elif name.endswith(ENDING):
        _check_size(str(path), file_size(path))
        with path.open("rb") as file:
            yield str(path), decompressed(path, file)
    else:
        raise DataError(f"{path}: not a folder, a {ENDING} file or an archive ({', '.join((*TAR_ENDINGS, '.zip'))})")


def _open_tar(path: SourceFile) -> Iterator[tuple[str, io.BufferedIOBase]]:
    inner = Path(path.name).with_suffix(".gz") if path.suffix.lower() == ".tgz" else path
    with path.open("rb") as file, decompressed(inner, file) as content:
        with tarfile.open(fileobj=content, mode="r|") as tar:
            for member in tar:
                # Links and devices are not files; nothing that they name is opened.
                if member.isfile() and _is_wanted(member.name):
                    name = f"{path}: {member.name}"
                    _check_size(name, member.size)
                    yield name, cast(io.BufferedIOBase, tar.extractfile(member))
                # tarfile remembers every member; without this, memory would grow with the archive.
                tar.members.clear()  # type: ignore[attr-defined]
        # tarfile stops before the checksum of the compression, which detects a truncated archive.
        while content.read(REST_BYTES):
            continue


def _open_zip(path: SourceFile) -> Iterator[tuple[str, io.BufferedIOBase]]:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.is_dir() and _is_wanted(member.filename):
                name = f"{path}: {member.filename}"
                _check_size(name, member.file_size)
                with archive.open(member) as content:
                    yield name, cast(io.BufferedIOBase, content)


@contextlib.contextmanager
def _zip_errors(path: SourceFile) -> Iterator[None]:
    """Turn what zipfile raises for damaged and encrypted archives into a DataError about the file."""
    try:
        yield
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: damaged, or not a zip archive ({error}); get the file again") from error
    except (RuntimeError, NotImplementedError) as error:  # a password, or an unusual compression
        raise DataError(f"{path}: cannot be unpacked ({error}); unpack it, and give the folder") from error


def _is_wanted(name: str) -> bool:
    """Whether a member is a JSON Lines file that is not hidden. macOS adds a hidden `._NAME` for each file."""
    return name.lower().endswith(ENDING) and not any(part.startswith(".") for part in PurePosixPath(name).parts)


def _check_size(name: str, size: int) -> None:
    if size > MOST_BYTES:
        raise DataError(f"{name}: has {size:,} bytes, more than any file of BLiMP; the limit is {MOST_BYTES:,}")


def _read_file(name: str, content: io.BufferedIOBase, most: int) -> list[MinimalPair]:
    """The pairs of one file; none if its first object has no sentences, so that it is a file of another kind."""
    pairs: list[MinimalPair] = []
    for where, value in read_json_lines(name, content, BadRows()):
        row = _to_dict(where, value)
        if not pairs and not any(key in row for key in SENTENCE_KEYS):
            return []
        if len(pairs) == most:
            raise DataError(f"{where}: more than {MOST_PAIRS:,} pairs in all; BLiMP has 67,000")
        good, bad, paradigm, term = (_text_of(where, row, key) for key in KEYS)
        number = str(row.get("pairID", ""))
        pairs.append(MinimalPair(good, bad, paradigm, PHENOMENA.get(term, term), number, where))
    return pairs


def _to_dict(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, tuple):
        raise DataError(f"{where}: not a JSON object")
    row = dict(value)
    if len(row) < len(value):
        raise DataError(f"{where}: has a key more than once")
    return row


def _text_of(where: str, row: dict[str, Any], key: str) -> str:
    """The text under `key`. Raises DataError if there is none, or if it is empty or not Unicode."""
    if key not in row:
        raise DataError(f"{where}: no key '{key}'; it has {shown_names(list(row))}")
    text = row[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: '{key}' is not a string")
    if not text.strip():
        raise DataError(f"{where}: '{key}' is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: '{key}' has half of a surrogate pair at character {error.start}") from error
    return text


def _without_copies(pairs: list[MinimalPair]) -> list[MinimalPair]:
    """The pairs in an order that does not depend on the files. Those with equal sentences and numbers are one."""
    distinct = {(pair.paradigm, pair.good, pair.bad, pair.number): pair for pair in pairs}
    if len(distinct) < len(pairs):
        logger.info(f"copies of pairs, which are left out: {len(pairs) - len(distinct):,}")
    return [distinct[key] for key in sorted(distinct)]


def _check_phenomena(pairs: list[MinimalPair]) -> None:
    """Raise DataError if pairs of one paradigm have different phenomena."""
    first: dict[str, MinimalPair] = {}
    for pair in pairs:
        other = first.setdefault(pair.paradigm, pair)
        if other.phenomenon != pair.phenomenon:
            raise DataError(
                f"{pair.name}: '{pair.paradigm}' has the linguistics_term '{pair.phenomenon}', "
                f"but '{other.phenomenon}' in {other.name}"
            )
