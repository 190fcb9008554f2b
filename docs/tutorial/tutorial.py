"""What the chapters share: the reviews they read, the figures they write, the run they look into.

Without any setting they read generated reviews, so that nothing needs to be downloaded. `BABYBERT_TUTORIAL_ARCHIVE` names
IMDB's archive; then they read that. Paths are relative to where the chapter is started, the project's folder.
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

FIGURES = Path(os.environ.get("BABYBERT_TUTORIAL_FIGURES", "runs/walk/figures"))
pyplot = open_pyplot()
if Path.cwd() == Path(__file__).parent:
    os.chdir("../..")  # a notebook begins in its own folder; data and runs belong to the project's


def is_imdb() -> bool:
    """Whether the reviews are real ones."""
    return bool(os.environ.get("BABYBERT_TUTORIAL_ARCHIVE"))


def corpus_name() -> str:
    """`imdb` or `demo`: also the name of the folder in `data`."""
    return "imdb" if is_imdb() else "demo"


def _settings(corpus: str) -> PrepareConfig:
    if corpus == "demo":
        return PrepareConfig(corpus="demo", out=Path("data/demo"))
    return PrepareConfig(corpus="imdb", source=(os.environ["BABYBERT_TUTORIAL_ARCHIVE"],), out=Path("data/imdb"))


def reviews() -> Iterator[str]:
    """The texts, one after the other."""
    return (
        document.text for document in open_corpus(_settings(corpus_name()), Path("data"), BadRows()).documents("read")
    )


def open_data(corpus: str | None = None) -> Dataset:
    """The prepared reviews: `data/imdb` or `data/demo`, written first if they are not there (`babybert prepare`)."""
    settings = _settings(corpus or corpus_name())
    if not (settings.out / "dataset.json").exists():
        prepare(settings)
    return open_dataset(settings.out)


def a_pair(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Ids before masking, and segments, of the first held-out pair of 20 to 30 tokens in which B follows A."""
    examples = dataset.examples("validation")
    lengths = np.diff(examples.offsets)
    row = int(np.flatnonzero((lengths >= 20) & (lengths <= 30) & (examples.is_next == 1))[0])
    pair = examples.rows(row, row + 1)
    return pair.original_ids().astype(np.int64), pair.segments.astype(np.int64)


def run_folder(preset: str, corpus: str | None = None) -> Path:
    """Where chapter 7 trains, and chapter 8 finds its model."""
    return Path("runs/walk") / f"{corpus or corpus_name()}-{preset}"


def training(preset: str, seconds: float, corpus: str | None = None) -> list[str]:
    """The arguments of `babybert` for so long a training, or for `BABYBERT_TUTORIAL_STEPS` steps; the rate does not fall."""
    corpus = corpus or corpus_name()
    steps = os.environ.get("BABYBERT_TUTORIAL_STEPS")
    length = (
        ["--max-steps", steps]
        if steps
        else ["--max-minutes", f"{seconds / 60:.3g}", "--epochs", "1" if corpus == "imdb" else "24"]
    )
    rate = ["--schedule", "constant", "--warmup-fraction", "0.02"]
    where = ["--data", f"data/{corpus}", "--out", str(run_folder(preset, corpus))]
    return [
        "pretrain",
        *where,
        "--preset",
        preset,
        *rate,
        *length,
        "--log-every",
        "5",
        "--no-metrics",
        "--device",
        "cpu",
    ]


def show(figure: Any, name: str) -> None:
    """Save a figure as a PNG; in a notebook, show it as well."""
    png, svg = save_figure(pyplot, figure, FIGURES / name)
    svg.unlink()
    show_file(png)


def show_file(png: Path) -> None:
    """Say where a figure is; in a notebook, show it."""
    try:
        get_ipython()  # type: ignore[name-defined]  # a notebook defines it
    except NameError:
        print(f"figure: {png}")
    else:
        from IPython.display import Image, display

        display(Image(str(png)))
