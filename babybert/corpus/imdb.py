"""IMDB's labelled reviews (Maas et al., 2011): the public archive, its extracted folder, or a CSV of the reviews.

The corpus is the 50,000 labelled reviews, as in the reference. The archive also has 50,000 unlabelled ones in
`train/unsup`; they are not read. The path of a review tells its split and its label: `train/pos/0_9.txt`.
"""

import functools
import gzip
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from babybert.corpus.download import Download
from babybert.corpus.files import BadRows
from babybert.corpus.readers import Document, Reader, decode, read_csv, read_text
from babybert.corpus.s3_file import SourceFile
from babybert.corpus.sources import SourceFiles
from babybert.errors import DataError

# The size and MD5 digest that torchtext, PaddlePaddle and others publish.
ARCHIVE = Download(
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
    size=84_125_825,
    md5="7c2ac02c03563afcf9b574c7e56c153a",
)
REVIEW = r"(train|test)/(pos|neg)/[^/]+\.(?i:txt(\.(gz|zst|bz2|xz))?)$"
REVIEW_PATH = re.compile(rf"(?:^|/)({REVIEW})")
REVIEW_NAME = re.compile(rf"(?:^|[/ ]){REVIEW}")  # in the archive, a document's name is "ARCHIVE: PATH"
REST_BYTES = 1 << 20


def choose_reader(files: SourceFiles) -> Reader:
    """Return how to read the reviews in `files`: the CSV, the archive, or a review per text file.

    Text files that are not labelled reviews are left out. Raises DataError if none is one.
    """
    paths = files.paths
    if len(paths) == 1 and ".csv" in paths[0].name.lower():
        return functools.partial(read_csv, column="review")
    if len(paths) == 1 and paths[0].suffix.lower() != ".txt":
        return read_archive
    # A folder is in the list if it cannot be read, which reading it will report.
    files.paths = [path for path in paths if REVIEW_PATH.search(str(path)) or _is_folder(path)]
    files.leave_out("not a labelled review", len(paths) - len(files.paths))
    if not files.paths:
        raise DataError(f"{paths[0]}: not IMDB's reviews; expected files such as train/pos/0_9.txt")
    return read_text


def _is_folder(path: SourceFile) -> bool:
    return isinstance(path, Path) and path.is_dir()


def read_archive(path: SourceFile, file: IO[bytes], bad_rows: BadRows) -> Iterator[Document]:
    """Stream the reviews out of the `.tar.gz`. Nothing is extracted to disk, so no path in the archive can do harm.

    Raises DataError if the archive has no reviews.
    """
    has_reviews = False
    with gzip.open(file) as content, tarfile.open(fileobj=content, mode="r|") as tar:
        for member in tar:
            match = REVIEW_PATH.search(member.name)
            is_plain = match and not match[4] and member.isfile()
            review = tar.extractfile(member) if is_plain else None
            if match and review:
                has_reviews = True
                name = f"{path}: {match[1]}"
                text = decode(name, review.read(), bad_rows)
                if text is not None:
                    yield Document(name, text)
            # tarfile remembers every member; without this, memory would grow with the archive.
            tar.members.clear()  # type: ignore[attr-defined]
        # tarfile stops before gzip's checksum, which detects a truncated archive. Reading on verifies it.
        while content.read(REST_BYTES):
            continue
    if not has_reviews:
        raise DataError(f"{path}: no reviews found; expected files such as train/pos/0_9.txt")


def split_and_label(document: Document) -> tuple[str, str]:
    """Return the split (`train`, `test`) and the label (`pos`, `neg`) of a review. Raises DataError if it has none."""
    match = REVIEW_NAME.search(document.name)
    if not match:
        raise DataError(
            f"{document.name}: has no label; expected files such as train/pos/0_9.txt, "
            "or --corpus csv with a --label-column"
        )
    return match[1], match[2]
