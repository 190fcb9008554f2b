"""Accuracy by the number of labels: fine-tuned, the same network from scratch, a frozen probe, and a bag of words.

    python benchmarks/finetune.py --checkpoint runs/mini --source aclImdb_v1.tar.gz       # at most half an hour

For each number of labelled texts, the networks are trained for `--epochs`, more with few texts (at least `--steps`
steps), and for `--minutes` at most. All classifiers are scored on the same texts of IMDB's test half. Texts are chosen
by their digest, so a smaller set of labels is a part of a larger one. Prints a table, and writes JSON and a figure.
"""

import argparse
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import write_json

from babybert.config import FinetuneConfig
from babybert.evaluation.class_baselines import bag_of_words_predictions, format_comparison
from babybert.figures import open_pyplot, save_figure
from babybert.logs import configure_logging
from babybert.training.finetuning import FinetuningTask, finetune, open_task

COLORS = {
    "fine-tuned": "tab:blue",
    "from scratch": "tab:orange",
    "frozen probe": "tab:green",
    "bag of words": "tab:red",
    "majority": "tab:gray",
}


def main() -> None:
    """Train and score all classifiers with each number of labels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="runs/mini", help="pretrained run or checkpoint")
    parser.add_argument("--corpus", default="imdb", choices=["imdb", "csv", "jsonl", "parquet"])
    parser.add_argument("--source", default="data/downloads/aclImdb_v1.tar.gz", help="labelled texts")
    parser.add_argument("--test-source", default=None, help="test texts; IMDB has its own")
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 1000, 10_000, 0], help="0: all texts")
    parser.add_argument("--test-texts", type=int, default=5000)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="of each training, at least")
    parser.add_argument("--minutes", type=float, default=3.0, help="of each training, at most; there are two a point")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/finetune"), help="path without extension")
    parser.add_argument("--cuts", type=int, nargs="+", default=[], help="tokens of each text for other bags of words")
    options = parser.parse_args()
    configure_logging()
    json_path = options.out.with_suffix(".json")
    points = []
    for labels in options.labels:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            point = measure(options, labels, Path(folder))
        point["seconds"] = round(time.monotonic() - start)
        points.append(point)
        print(f"{point['labels']:,} labels\n{format_comparison(point['compared'])}", flush=True)
        write_json(json_path, {"options": {**vars(options), "out": str(options.out)}, "points": points})
    print("written:", *draw(points, options.out), json_path)
    for positions in options.cuts:
        accuracy = bag_of_words_accuracy(options, positions)
        print(f"bag of words, all labels, {positions} tokens of each text: {accuracy:.1%}", flush=True)


def new_config(options: argparse.Namespace, labels: int, positions: int, out: Path) -> FinetuneConfig:
    """The settings of a training with so many labels, and so many tokens of each text."""
    return FinetuneConfig(
        checkpoint=options.checkpoint,
        corpus=options.corpus,
        source=(options.source,),
        test_source=(options.test_source,) if options.test_source else (),
        train_texts=labels or None,
        validation_texts=100,
        test_texts=options.test_texts,
        positions=positions,
        max_minutes=options.minutes,
        compare=True,
        metrics=False,
        out=out,
    )


def measure(options: argparse.Namespace, labels: int, folder: Path) -> dict[str, Any]:
    """The scores of all classifiers with so many labels."""
    config = new_config(options, labels, options.positions, folder / "run")
    task: FinetuningTask = open_task(config)
    steps_of_epoch = math.ceil(len(task.data.train) / config.batch_size)
    config = replace(config, epochs=max(options.epochs, math.ceil(options.steps / steps_of_epoch)))
    ending = finetune(config, replace(task, config=config))
    assert ending is not None
    _, report = ending
    return {"labels": report["training_texts"], "epochs": config.epochs, "compared": report["compared"]}


def bag_of_words_accuracy(options: argparse.Namespace, positions: int) -> float:
    """What is lost where texts are cut: a bag of words needs no training time, so it can read more of each text."""
    task = open_task(new_config(options, labels=0, positions=positions, out=options.out))
    test = task.data.test or task.data.validation
    predictions = bag_of_words_predictions(task.data.train, test, task.tokenizer.size, seed=0)
    return float((predictions == test.is_next).mean())


def draw(points: list[dict[str, Any]], out: Path) -> list[Path]:
    """The accuracies with their intervals as PNG and SVG."""
    pyplot = open_pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 5), layout="constrained")
    labels = [point["labels"] for point in points]
    for name, color in COLORS.items():
        accuracies = [point["compared"][name]["accuracy"] for point in points]
        axis.plot(labels, [accuracy["value"] for accuracy in accuracies], "o-", color=color, label=name, markersize=4)
        low, high = zip(*(accuracy["interval"] for accuracy in accuracies), strict=True)
        axis.fill_between(labels, low, high, color=color, alpha=0.15)
    axis.set_xscale("log")
    axis.set_xlabel("labelled texts")
    axis.set_ylabel("accuracy on test texts")
    axis.grid(alpha=0.3)
    axis.legend()
    return save_figure(pyplot, figure, out, "--out")


if __name__ == "__main__":
    main()
