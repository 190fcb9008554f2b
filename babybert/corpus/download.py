"""Bring sources to this machine: the public IMDB archive by HTTP, anything else from S3.

A broken download is kept as `NAME.part` and goes on where it stopped (RFC 9110, section 14: a Range request that the
server answers with 206); what arrives is checked before it gets its name. So a file that has its name is whole.
"""

import fnmatch
import glob
import hashlib
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from babybert.errors import DataError, StorageError
from babybert.progress import Progress, say
from babybert.s3 import is_s3, list_keys, make_client, s3_errors, split_address

CHUNK = 1 << 18
ATTEMPTS = 5
GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Download:
    """A file of the web that never changes, with what proves it whole."""

    url: str
    bytes: int
    md5: str  # guards against broken transfers; that it is the right server is HTTPS's part


# The size and digest that torchtext, PaddlePaddle and others have on record for it.
IMDB = Download(
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz", 84_125_825, "7c2ac02c03563afcf9b574c7e56c153a"
)


def download(wanted: Download, folder: Path, pause: float = 2.0) -> Path:
    """The file in `folder`, downloaded unless it is there; `pause` seconds lie between two attempts.

    Raises StorageError when the server cannot be reached or the disk is full (what has come so far is kept), DataError
    when what came is another file.
    """
    path = folder / wanted.url.rpartition("/")[2]
    if path.is_file() and path.stat().st_size == wanted.bytes:
        return path
    part = path.with_name(path.name + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _fetch_rest(wanted, part)
                break
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                if attempt == ATTEMPTS or (isinstance(error, urllib.error.HTTPError) and error.code < 500):
                    advice = "start again to go on from there, or get the file another way and give it with --source"
                    have = part.stat().st_size if part.exists() else 0
                    raise StorageError(
                        f"{wanted.url}: {error}; {have:,} of {wanted.bytes:,} bytes have come: {advice}"
                    ) from error
                say(f"{wanted.url}: {error}; going on in {pause * attempt:.0f} s")
                time.sleep(pause * attempt)
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if digest != wanted.md5:
            part.unlink()
            raise DataError(
                f"{wanted.url}: what came is not the file that was expected (MD5 {digest}, not {wanted.md5}); it was deleted"
            )
        return part.replace(path)
    except OSError as error:
        raise StorageError(
            f"{part}: cannot be written: {error.strerror}; make room or choose another --download-folder"
        ) from error


def _fetch_rest(wanted: Download, part: Path) -> None:
    """Append what is still missing. Raises ConnectionError when the connection ends early."""
    have = part.stat().st_size if part.exists() else 0
    if have >= wanted.bytes:
        return
    request = urllib.request.Request(wanted.url, headers={"Range": f"bytes={have}-", "User-Agent": "babybert"})
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.status != 206:  # the server sends all of it, whatever was asked for
            have = 0
        with (
            part.open("ab" if have else "wb") as file,
            Progress(f"download {part.stem}", wanted.bytes, "bytes", have) as progress,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                progress.advance(len(chunk))
                have += len(chunk)
    if have < wanted.bytes:
        raise ConnectionError(f"the connection ended after {have:,} of {wanted.bytes:,} bytes")


def find_files(source: str, suffixes: tuple[str, ...], work: Path) -> list[Path]:
    """The files that `source` means, sorted: a file, the files of a folder with these endings, a glob, or such of S3.

    Objects of S3 are copied into `work` first. Raises DataError when there is nothing there.
    """
    if is_s3(source):
        return _fetch_s3(source, suffixes, work)
    path = Path(source)
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and file.name.endswith(suffixes)]
        nothing = f"{source}: no files that end in {', '.join(suffixes)} in this folder"
    else:
        names = [source] if path.is_file() else glob.glob(source, recursive=True)  # noqa: PTH207 (pathlib globs no absolute patterns)
        found = [Path(name) for name in names if Path(name).is_file()]
        nothing = f"{source}: no such file or folder, and no file of that pattern"
    if not found:
        raise DataError(nothing)
    return sorted(found)


def _fetch_s3(source: str, suffixes: tuple[str, ...], work: Path) -> list[Path]:
    bucket, key = split_address(source)
    client = make_client()
    pattern = GLOB.search(key)
    with s3_errors(source):
        below = list(list_keys(client, bucket, key[: pattern.start()] if pattern else key))
        if pattern:
            wanted = [(name, size) for name, size in below if fnmatch.fnmatchcase(name, key)]
        else:
            folder = key if key.endswith("/") or not key else key + "/"
            exact = [(name, size) for name, size in below if name == key]
            wanted = exact or [
                (name, size) for name, size in below if name.startswith(folder) and name.endswith(suffixes)
            ]
        if not wanted:
            raise DataError(f"{source}: no such object, nor one below it that ends in {', '.join(suffixes)}")
        files = []
        with Progress(f"fetch {source}", sum(size for _, size in wanted), "bytes") as progress:
            for number, (name, _) in enumerate(wanted):
                inside = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
                target = work.joinpath(f"s3-{number:06d}", *inside)
                target.parent.mkdir(parents=True, exist_ok=True)
                client.download_file(bucket, name, str(target), Callback=progress.advance)
                files.append(target)
    return files
