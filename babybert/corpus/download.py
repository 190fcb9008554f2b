"""Download a public archive by HTTP.

An interrupted download is kept as `NAME.part` and resumed (RFC 9110, section 14: a Range request that the server
answers with status 206). The file gets its final name only after its digest was verified.
"""

import hashlib
import http.client
import logging
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from babybert.errors import DataError, StorageError, cannot_write, os_reason
from babybert.folders import lock_folder
from babybert.progress import Progress

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 18
ATTEMPTS = 5
TIMEOUT_SECONDS = 60


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

    If another process downloads into the folder, this one waits for it. After the n-th failed attempt, the next one
    starts `n * pause` seconds later. Raises StorageError if the server cannot be reached or the disk is full (what has
    been downloaded is kept), UsageError if the folder cannot be written, DataError if the digest differs.
    """
    path = folder / source.url.rpartition("/")[2]
    if _is_complete(source, path):
        return path
    partial = path.with_name(path.name + ".part")
    with lock_folder(folder, "--download-folder", wait=True):
        if _is_complete(source, path):  # another process has downloaded it meanwhile
            return path
        try:
            _fetch_with_retries(source, partial, pause)
            _verify_md5(source, partial)
            return partial.replace(path)
        except OSError as error:
            raise cannot_write(
                f"{partial}: cannot be written: {os_reason(error)}; make room or choose another --download-folder",
                error,
            ) from error


def _is_complete(source: Download, path: Path) -> bool:
    return path.is_file() and path.stat().st_size == source.size


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
