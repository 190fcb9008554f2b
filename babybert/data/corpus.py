"""Where documents come from: the public IMDB archive, or the built-in demo grammar.

A document is a plain string; its name (a path, or "generated review 17") is only for messages. Documents come in a
fixed order, whatever the order in an archive or a folder, so that the same source and seed give the same files.
The 50,000 labelled reviews are 65 MB of text: they are held in memory.
"""

import gzip
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from babybert.data.demo import generate_reviews
from babybert.errors import DataError

# The archive also has train/unsup (50,000 unlabelled reviews): not part of the reference's corpus.
REVIEW_PATH = re.compile(r"(?:^|/)((?:train|test)/(?:pos|neg)/[^/]+\.txt)$")


@dataclass(frozen=True)
class Document:
    """One text, and where it came from."""

    name: str
    text: str


def demo_documents(count: int, seed: int) -> list[Document]:
    """`count` generated reviews (not written by people); see `demo.py`."""
    return [Document(f"generated review {i}", text) for i, text in enumerate(generate_reviews(count, seed))]


def imdb_documents(source: Path) -> list[Document]:
    """The labelled reviews of the IMDB archive (Maas et al., 2011), from the `.tar.gz` or the extracted folder.

    `source` may be the folder above `aclImdb/`, that folder, or any below it that still has `train/pos/...`.
    Sorted by path: test before train, neg before pos.

    Raises DataError when there is nothing there, the archive is broken, no review is found, or one is not UTF-8.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; give the IMDB archive (aclImdb_v1.tar.gz) or the folder it extracts to")
    contents = _read_folder(source) if source.is_dir() else _read_archive(source)
    if not contents:
        raise DataError(f"{source}: no reviews found; expected files such as train/pos/0_9.txt")
    return [Document(f"{source}: {name}", _decode(source, name, contents[name])) for name in sorted(contents)]


def _read_folder(folder: Path) -> dict[str, bytes]:
    contents = {}
    for path in folder.rglob("*.txt"):
        match = REVIEW_PATH.search(path.as_posix())
        if match:
            contents[match[1]] = path.read_bytes()
    return contents


def _read_archive(archive: Path) -> dict[str, bytes]:
    contents = {}
    try:
        # Streamed: nothing is extracted to disk, so no path in the archive can do harm.
        with gzip.open(archive) as content, tarfile.open(fileobj=content, mode="r|") as tar:
            for member in tar:
                match = REVIEW_PATH.search(member.name)
                file = tar.extractfile(member) if match and member.isfile() else None
                if match and file:
                    contents[match[1]] = file.read()
            while content.read(1 << 20):  # to the checksum at the very end, which tarfile does not read
                continue
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{archive}: not a whole .tar.gz archive ({error}); download it again") from error
    return contents


def _decode(source: Path, name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: {name}: byte {error.start} is not UTF-8; convert the file or remove it") from error


def spread(documents: list[Document], limit: int | None) -> list[Document]:
    """At most `limit` documents at even distances, so that a sample has both ends of the corpus (all, if None)."""
    if limit is None or limit >= len(documents):
        return documents
    return [documents[i * len(documents) // limit] for i in range(limit)]
