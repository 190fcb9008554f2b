"""Helpers that all chapters share: the reviews they read, the figures they save, and the training run they inspect.

By default the chapters read generated reviews, so nothing has to be downloaded. If `BABYBERT_TUTORIAL_ARCHIVE` is the
path of the IMDB archive, they read that instead. Paths are relative to the current folder, which should be the
project's root.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from babybert.config import PrepareConfig
from babybert.corpus.documents import open_corpus
from babybert.corpus.files import BadRows
from babybert.data.dataset import Dataset, open_dataset
from babybert.data.prepare import prepare
from babybert.figures import open_pyplot, save_figure

FIGURES = Path(os.environ.get("BABYBERT_TUTORIAL_FIGURES", "runs/tutorial/figures"))
pyplot = open_pyplot()
if Path.cwd() == Path(__file__).parent:
    os.chdir("../..")  # a notebook starts in its own folder, but data and runs belong in the project's root


def is_imdb() -> bool:
    """Whether the chapters read IMDB's reviews instead of generated ones."""
    return bool(os.environ.get("BABYBERT_TUTORIAL_ARCHIVE"))


def corpus_name() -> str:
    """`imdb` or `demo`, which is also the name of the folder in `data`."""
    return "imdb" if is_imdb() else "demo"


def _prepare_config(corpus: str) -> PrepareConfig:
    if corpus == "demo":
        return PrepareConfig(corpus="demo", out=Path("data/demo"))
    return PrepareConfig(corpus="imdb", source=(os.environ["BABYBERT_TUTORIAL_ARCHIVE"],), out=Path("data/imdb"))


def reviews() -> Iterator[str]:
    """The texts of all reviews in order."""
    corpus = open_corpus(_prepare_config(corpus_name()), Path("data"), BadRows())
    return (document.text for document in corpus.documents("read"))


def open_data(corpus: str | None = None) -> Dataset:
    """The prepared reviews in `data/imdb` or `data/demo`. If they do not exist, they are prepared first."""
    config = _prepare_config(corpus or corpus_name())
    folder = Path(config.out)
    if not (folder / "dataset.json").exists():
        prepare(config)
    return open_dataset(folder)


def example_pair(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Unmasked ids and segments (int64, shape T) of the first held-out pair of 20 to 30 tokens in which B follows A."""
    examples = dataset.examples("validation")
    lengths = np.diff(examples.offsets)
    row = int(np.flatnonzero((lengths >= 20) & (lengths <= 30) & (examples.is_next == 1))[0])
    pair = examples.rows(row, row + 1)
    return pair.original_ids().astype(np.int64), pair.segments.astype(np.int64)


def run_folder(preset: str, corpus: str | None = None) -> Path:
    """The run of `preset` that chapter 7 writes, and chapters 8 and 9 read."""
    return Path("runs/tutorial") / f"{corpus or corpus_name()}-{preset}"


def pretrain_arguments(preset: str, seconds: float, corpus: str | None = None) -> list[str]:
    """The arguments of `babybert pretrain` for `seconds` of training.

    If `BABYBERT_TUTORIAL_STEPS` is set, it is the number of steps, and `seconds` is ignored. The learning rate is
    constant after the warm-up, because the number of steps is not known in advance.
    """
    corpus = corpus or corpus_name()
    steps = os.environ.get("BABYBERT_TUTORIAL_STEPS")
    if steps:
        duration = ["--max-steps", steps]
    else:
        duration = ["--max-minutes", f"{seconds / 60:.3g}", "--epochs", "1" if corpus == "imdb" else "24"]
    paths = ["--data", f"data/{corpus}", "--out", str(run_folder(preset, corpus))]
    learning_rate = ["--schedule", "constant", "--warmup-fraction", "0.02"]
    output = ["--log-every", "5", "--no-metrics", "--device", "cpu"]
    return ["pretrain", *paths, "--preset", preset, *learning_rate, *duration, *output]


def show(figure: Any, name: str) -> None:
    """Save a matplotlib figure as a PNG, and display it if this is a notebook."""
    png, svg = save_figure(pyplot, figure, FIGURES / name)
    svg.unlink()
    show_file(png)


def show_file(png: Path) -> None:
    """Print the path of a figure, which `render.py` looks for, or display the figure if this is a notebook."""
    try:
        get_ipython()  # type: ignore[name-defined]  # only a notebook defines it
    except NameError:
        print(f"figure: {png}")
    else:
        from IPython.display import Image, display

        display(Image(str(png)))
