"""`babybert plot`: the curves of one or more runs, as one picture in PNG and SVG.

Training losses are points (each the mean of a few steps) with a running mean over them; held-out losses are lines with
marks; what word counts and a coin reach is dashed, and where a run was gone on with after a stop is dotted.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from babybert.checkpoint.metrics_log import read_metrics
from babybert.errors import DataError
from babybert.figures import open_pyplot, save_figure

SMOOTHED = 15  # points of the running mean


def plot(runs: list[Path], out: Path) -> list[Path]:
    """Draw `out`.png and `out`.svg; returns them.

    Raises DataError when a run has no curve, UsageError without matplotlib, StorageError when they cannot be written.
    """
    pyplot = open_pyplot()
    names = [run.resolve().name for run in runs]
    curves = {
        name if names.count(name) == 1 else str(run): read_run(run) for name, run in zip(names, runs, strict=True)
    }
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    panels: dict[str, tuple[Any, str]] = {
        "mlm_loss": (axes[0, 0], "MLM loss (nats)"),
        "nsp_loss": (axes[0, 1], "NSP loss (nats)"),
        "lr": (axes[0, 2], "learning rate"),
        "mlm_top1": (axes[1, 0], "held-out MLM accuracy (top 1, top 5)"),
        "nsp_accuracy": (axes[1, 1], "NSP accuracy"),
        "pairs_per_second": (axes[1, 2], "pairs/s"),
    }
    for number, (name, lines) in enumerate(curves.items()):
        for key, (axis, title) in panels.items():
            _draw(axis, lines, key, f"C{number}", name)
            axis.set_title(title)
            for line in lines:
                if line["split"] == "resume":
                    axis.axvline(line["step"], color=f"C{number}", linestyle=":", linewidth=1)
        _draw(axes[1, 0], lines, "mlm_top5", f"C{number}", None)
        for key, axis, label in (
            ("mlm_unigram_loss", axes[0, 0], "word counts"),
            ("nsp_chance_loss", axes[0, 1], "chance"),
            ("nsp_chance_accuracy", axes[1, 1], "chance"),
        ):
            known = [line[key] for line in lines if key in line]
            if known:
                axis.axhline(
                    known[-1], color=f"C{number}", linestyle="--", linewidth=1, label=label if number == 0 else None
                )
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    return save_figure(pyplot, figure, out)


def read_run(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's curve that count. Raises DataError when it has none."""
    path = run / "metrics.jsonl"
    try:
        lines = read_metrics(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; a run's folder has one") from error
    if not lines:
        raise DataError(f"{path}: has no lines yet; the run writes one every --log-every steps")
    return lines


def series(lines: list[dict[str, Any]], key: str, split: str) -> pd.DataFrame:
    """The points of one curve: columns `step` and `value`."""
    own = pd.DataFrame(
        [(line["step"], line[key]) for line in lines if line["split"] == split and key in line],
        columns=["step", "value"],
    )
    return own.astype({"value": float})


def running_mean(values: pd.Series) -> pd.Series:
    """The mean of the last few points, as many as the curve is long enough for; NaN where they are not there yet."""
    return values.rolling(max(1, min(SMOOTHED, len(values) // 4))).mean()


def _draw(axis: Any, lines: list[dict[str, Any]], key: str, color: str, name: str | None) -> None:
    """The values of `key`: training ones as points with a running mean, held-out ones as a line with marks."""
    for split in ("train", "validation"):
        own = series(lines, key, split)
        if own.empty:
            continue
        steps, values = own["step"], own["value"]
        if split == "validation":
            axis.plot(
                steps, values, color=color, marker="o", markersize=3, linewidth=1.5, label=name and f"{name}, held out"
            )
        elif key in ("lr", "pairs_per_second"):
            axis.plot(steps, values, color=color, linewidth=1, label=name)
        else:
            axis.plot(steps, values, ".", color=color, alpha=0.25, markersize=3)
            axis.plot(steps, running_mean(values), color=color, linewidth=1, label=name)
