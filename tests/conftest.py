"""Shared by all tests: a small prepared demo corpus, and settings for a model of a few thousand parameters."""

from pathlib import Path
from typing import Any

import pytest

from babybert.config import PrepareConfig, PretrainConfig
from babybert.data.prepare import Dataset, open_dataset, prepare

SMALL = {"preset": "tiny", "width": 8, "heads": 2, "layers": 1, "feed_forward": 16, "batch_size": 8, "metrics": False, "device": "cpu", "log_every": 5}


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 generated reviews, prepared; tests must not change it."""
    folder = tmp_path_factory.mktemp("demo")
    prepare(PrepareConfig(out=folder, demo_documents=80, validation_fraction=0.2))
    return folder


@pytest.fixture(scope="session")
def demo(demo_folder: Path) -> Dataset:
    return open_dataset(demo_folder)


@pytest.fixture
def small(demo_folder: Path, tmp_path: Path) -> Any:
    """A function that makes the settings of a small run in a folder of the test's own."""

    def make(**settings: Any) -> PretrainConfig:
        return PretrainConfig(**{**SMALL, "data": demo_folder, "out": tmp_path / "run", "epochs": 2, **settings})

    return make


def imdb_review_folder(root: Path, texts: list[str]) -> Path:
    """A folder laid out like the public archive, with these reviews."""
    for number, text in enumerate(texts):
        folder = root / "aclImdb" / ("train", "test")[number % 2] / ("pos", "neg")[number // 2 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}_7.txt").write_text(text, encoding="utf-8")
    return root
