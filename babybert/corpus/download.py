"""Bring source files to this machine: a public archive by HTTP, user files from a local path or S3.

An interrupted download is kept as `NAME.part` and resumed (RFC 9110, section 14: a Range request that the server
answers with status 206). The file gets its final name only after its digest was verified.
"""

import fnmatch
import glob
import hashlib
import http.client
import logging
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from babybert.errors import DataError, StorageError
from babybert.progress import Progress
from babybert.s3 import is_s3, list_keys, make_client, split_address
from babybert.s3_errors import s3_errors

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 18
ATTEMPTS = 5
TIMEOUT_SECONDS = 60
GLOB_CHARACTER = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Download:
    """A public file that never changes.

    Attributes:
        url: its address.
        size: its size in bytes.
        md5: its MD5 digest in hex. It detects damaged transfers; HTTPS authenticates the server.
    """

    url: str
    size: int
    md5: str


def download(source: Download, folder: Path, pause: float = 2.0) -> Path:
    """Download a file into `folder`, unless it is already there, and return its path.

    After the n-th failed attempt, the next one starts `n * pause` seconds later. Raises StorageError if the server
    cannot be reached or the disk is full (what has been downloaded is kept), DataError if the digest differs.
    """
    path = folder / source.url.rpartition("/")[2]
    if path.is_file() and path.stat().st_size == source.size:
        return path
    partial = path.with_name(path.name + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _fetch_with_retries(source, partial, pause)
        _verify_md5(source, partial)
        return partial.replace(path)
    except OSError as error:
        raise StorageError(
            f"{partial}: cannot be written: {error.strerror}; make room or choose another --download-folder"
        ) from error


def _fetch_with_retries(source: Download, partial: Path, pause: float) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _fetch_rest(source, partial)
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            is_refusal = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if attempt == ATTEMPTS or is_refusal:
                received = partial.stat().st_size if partial.exists() else 0
                raise StorageError(
                    f"{source.url}: {error}; {received:,} of {source.size:,} bytes downloaded: run the command again "
                    "to resume, or download the file by other means and pass it with --source"
                ) from error
            logger.info(f"{source.url}: {error}; retrying in {pause * attempt:.0f} s")
            time.sleep(pause * attempt)


def _fetch_rest(source: Download, partial: Path) -> None:
    """Append what `partial` still lacks. Raises ConnectionError if the connection ends early."""
    received = partial.stat().st_size if partial.exists() else 0
    if received >= source.size:
        return
    request = urllib.request.Request(source.url, headers={"Range": f"bytes={received}-", "User-Agent": "babybert"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        if response.status != 206:  # the server ignores Range and sends the file from its start
            received = 0
        with (
            partial.open("ab" if received else "wb") as file,
            Progress(f"download {partial.stem}", source.size, "bytes", received) as progress,
        ):
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                progress.advance(len(chunk))
                received += len(chunk)
    if received < source.size:
        raise ConnectionError(f"the connection ended after {received:,} of {source.size:,} bytes")


def _verify_md5(source: Download, partial: Path) -> None:
    """Delete `partial` and raise DataError if its digest is not the published one."""
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if digest != source.md5:
        partial.unlink()
        raise DataError(
            f"{source.url}: the downloaded file is not the expected one (MD5 {digest}, not {source.md5}); "
            "it was deleted"
        )


def find_files(source: str, suffixes: tuple[str, ...], work_folder: Path) -> list[Path]:
    """Return the sorted paths of the files that `source` names.

    Args:
        source: a file, a folder, a glob pattern, or an `s3://` address of an object, a prefix or a pattern of keys.
        suffixes: only files with these endings are taken from a folder or prefix.
        work_folder: where objects from S3 are copied to.

    Raises DataError if there is no such file.
    """
    if is_s3(source):
        return _fetch_s3(source, suffixes, work_folder)
    path = Path(source)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and file.name.endswith(suffixes)]
        if not files:
            raise DataError(f"{source}: no files that end in {', '.join(suffixes)} in this folder")
        return sorted(files)
    if path.is_file():
        return [path]
    names = glob.glob(source, recursive=True)  # noqa: PTH207 (pathlib does not glob absolute patterns)
    files = [Path(name) for name in names if Path(name).is_file()]
    if not files:
        raise DataError(f"{source}: no such file or folder, and no file matches it as a pattern")
    return sorted(files)


def _fetch_s3(source: str, suffixes: tuple[str, ...], work_folder: Path) -> list[Path]:
    """Copy the objects that `source` names into `work_folder`."""
    bucket, key = split_address(source)
    client = make_client()
    with s3_errors(source):
        sizes = _find_objects(client, bucket, key, suffixes)
        if not sizes:
            raise DataError(f"{source}: no such object, and no object below it ends in {', '.join(suffixes)}")
        files = []
        with Progress(f"fetch {source}", sum(sizes.values()), "bytes") as progress:
            for index, name in enumerate(sizes):
                # A key may contain "..": without these parts the copy cannot leave the work folder.
                safe_parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
                target = work_folder.joinpath(f"s3-{index:06d}", *safe_parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                client.download_file(bucket, name, str(target), Callback=progress.advance)
                files.append(target)
    return files


def _find_objects(client: Any, bucket: str, key: str, suffixes: tuple[str, ...]) -> dict[str, int]:
    """Return the sizes by key of the objects that `key` names: a pattern, one object, or all below a prefix."""
    glob_character = GLOB_CHARACTER.search(key)
    if glob_character:
        objects = list_keys(client, bucket, key[: glob_character.start()])
        return {name: size for name, size in objects if fnmatch.fnmatchcase(name, key)}
    folder = key if key.endswith("/") or not key else key + "/"
    sizes = dict(list_keys(client, bucket, key))
    if key in sizes:
        return {key: sizes[key]}
    return {name: size for name, size in sizes.items() if name.startswith(folder) and name.endswith(suffixes)}
