"""A corpus with everything that could depend on the engine, and settings with which it is many batches and blocks."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from babybert.config import PrepareConfig
from babybert.corpus import batches
from babybert.corpus.demo import generate_reviews
from babybert.data import block_plan, shuffle
from babybert.data.digest import sha256

BAD_ROWS = 3 * 15  # per corpus


def make_many_batches(patch: pytest.MonkeyPatch) -> None:
    """Let a small corpus be many batches, many blocks, and too large for one process or one pass of the shuffle."""
    patch.setattr("babybert.data.prepare.SMALL_CORPUS_BYTES", 0)
    patch.setattr(batches, "BATCH_BYTES", 50_000)
    patch.setattr(block_plan, "BLOCK_TOKENS", 30_000)
    patch.setattr(shuffle, "JOBS", 10)
    patch.setattr(shuffle, "MOST_HANDLES", 4)


def texts_of_corpus() -> list[list[str]]:
    """The texts of six files: reviews, some of them copies, an empty one, and one that is cut into pieces."""
    reviews = generate_reviews(2400, seed=0)
    huge = " ".join(f"{text} Part {index}." for index, text in enumerate(generate_reviews(1200, seed=1)))
    small = [reviews[first : first + 60] for first in (0, 60, 120)]
    return [*small, [*reviews[180:1200], "", *reviews[:300]], [huge], [*reviews[1200:], *[reviews[7]] * 30]]


def corpus_config(folder: Path, kind: Any) -> PrepareConfig:
    """Write the corpus with bad rows into `folder`, as `csv` or `jsonl`, and return how to prepare it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, texts in enumerate(texts_of_corpus()):
        path = folder / f"{number}.{kind}"
        with path.open("w", newline="") as file:
            if kind == "csv":
                csv.writer(file).writerows([["text"], *([text] for text in texts)])
                file.writelines(f"bad,row {row}\n" for row in range(15) if number % 2)
            else:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
                file.writelines(f"bad row {row}\n" for row in range(15) if number % 2)
        paths.append(str(path))
    return PrepareConfig(
        corpus=kind, source=tuple(paths), skip_bad_rows=True, validation_fraction=0.1, shard_mb=1, out=folder / "none"
    )


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a dataset, and of nothing else in its folder."""
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    return {path.name: sha256(path) for path in folder.iterdir()}
