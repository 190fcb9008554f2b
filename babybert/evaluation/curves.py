"""`babybert plot`: the learning curves of one or more runs, as one figure in PNG and SVG.

Training losses are points (each the mean of a few steps) with a running mean. Held-out scores are lines with markers.
The unigram baseline and chance are dashed, and a dotted vertical line marks each step at which a run was resumed.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from babybert.checkpoint.metrics_log import read_metrics
from babybert.checkpoint.storage import METRICS, S3Store
from babybert.errors import DataError, os_reason
from babybert.figures import literal, open_pyplot, save_figure
from babybert.folders import temporary_folder
from babybert.s3 import is_s3

SMOOTHED_POINTS = 15  # of the running mean
PANELS = {
    "mlm_loss": "MLM loss (nats)",
    "nsp_loss": "NSP loss (nats)",
    "lr": "learning rate",
    "mlm_top1": "held-out MLM accuracy (top 1, top 5)",
    "nsp_accuracy": "NSP accuracy",
    "pairs_per_second": "pairs/s",
}
FINETUNE_PANELS = {
    "class_loss": "class loss (nats)",
    "class_accuracy": "accuracy",
    "lr": "learning rate",
    "macro_f1": "held-out macro F1",
    "calibration_error": "held-out calibration error",
    "pairs_per_second": "texts/s",
}
# Where each baseline is drawn, by its key in metrics.jsonl: the panel and the name in its legend.
BASELINES = {
    "mlm_unigram_loss": ("mlm_loss", "unigram baseline"),
    "nsp_chance_loss": ("nsp_loss", "chance"),
    "nsp_chance_accuracy": ("nsp_accuracy", "chance"),
    "majority_accuracy": ("class_accuracy", "majority baseline"),
}
NOT_SMOOTHED = ("lr", "pairs_per_second")


def plot_curves(runs: Sequence[Path | str], out: Path) -> list[Path]:
    """Draw the curves of the `runs` (folders or S3 addresses) to `out`.png and `out`.svg; return the two paths.

    Raises DataError when a run has no curve, or when runs are of two kinds; UsageError without matplotlib or if the
    files cannot be written there; StorageError if the disk is full.
    """
    pyplot = open_pyplot()
    curves = _read_runs(runs)
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    titles = _panels_of(curves)
    panels = dict(zip(titles, axes.flat, strict=True))
    for index, (name, lines) in enumerate(curves.items()):
        _draw_run(panels, lines, literal(name), color=f"C{index}")
        _draw_baselines(panels, lines, color=f"C{index}", with_label=index == 0)
    for key, axis in panels.items():
        axis.set_title(titles[key])
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    return save_figure(pyplot, figure, out, "--out")


def _panels_of(curves: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """The panels for runs of one kind. Raises DataError for runs of both kinds, which have no losses in common."""
    are_classifiers = {any("class_loss" in line for line in lines) for lines in curves.values()}
    if len(are_classifiers) > 1:
        raise DataError("some of the runs are of pretrain and some of finetune; draw them in two figures")
    return FINETUNE_PANELS if are_classifiers == {True} else PANELS


def _read_runs(runs: Sequence[Path | str]) -> dict[str, list[dict[str, Any]]]:
    """The curve of each run by its folder's name, or by its whole address where two folders have one name."""
    names = [PurePosixPath(run).name if is_s3(str(run)) else Path(run).resolve().name for run in runs]
    curves = {}
    for run, name in zip(runs, names, strict=True):
        label = name if names.count(name) == 1 else str(run)
        curves[label] = read_run(run)
    return curves


def read_run(run: Path | str) -> list[dict[str, Any]]:
    """The lines of the `metrics.jsonl` of a run, in a folder or in S3, that count (see `read_metrics`).

    Raises DataError when there are none.
    """
    if not is_s3(str(run)):
        return _read_folder(Path(run))
    with temporary_folder("run") as folder:
        metrics = folder / METRICS
        S3Store(str(run)).download_metrics(metrics)
        if not metrics.exists():
            raise DataError(f"{run}: has no {METRICS} yet; a run uploads it with its first checkpoint")
        return _read_folder(folder)


def _read_folder(run: Path) -> list[dict[str, Any]]:
    path = run / METRICS
    try:
        lines = read_metrics(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {os_reason(error)}; the folder of a run has this file") from error
    if not lines:
        raise DataError(f"{path}: has no lines yet; the run writes one every --log-every steps")
    return lines


def series(lines: list[dict[str, Any]], key: str, split: str) -> pd.DataFrame:
    """The points of one curve: columns `step` and `value`. `split` is "train" or "validation".

    A line without the key, or with null, has no point.
    """
    points = [(line["step"], line[key]) for line in lines if line["split"] == split and line.get(key) is not None]
    return pd.DataFrame(points, columns=["step", "value"]).astype({"value": float})


def running_mean(values: pd.Series) -> pd.Series:
    """The mean of the last SMOOTHED_POINTS points, fewer for a short curve; NaN before there are as many."""
    window = max(1, min(SMOOTHED_POINTS, len(values) // 4))
    return values.rolling(window).mean()


def _draw_run(panels: dict[str, Any], lines: list[dict[str, Any]], name: str, color: str) -> None:
    resumed_at = [line["step"] for line in lines if line["split"] == "resume"]
    for key, axis in panels.items():
        _draw_curve(axis, lines, key, color, name)
        for step in resumed_at:
            axis.axvline(step, color=color, linestyle=":", linewidth=1)
    if "mlm_top1" in panels:
        _draw_curve(panels["mlm_top1"], lines, "mlm_top5", color, name=None)


def _draw_curve(axis: Any, lines: list[dict[str, Any]], key: str, color: str, name: str | None) -> None:
    """The values of `key`; without a `name` they are not in the legend."""
    train = series(lines, key, "train")
    if not train.empty and key in NOT_SMOOTHED:
        axis.plot(train["step"], train["value"], color=color, linewidth=1, label=name)
    elif not train.empty:
        axis.plot(train["step"], train["value"], ".", color=color, alpha=0.25, markersize=3)
        axis.plot(train["step"], running_mean(train["value"]), color=color, linewidth=1, label=name)
    held_out = series(lines, key, "validation")
    if not held_out.empty:
        label = f"{name}, held out" if name else None
        axis.plot(
            held_out["step"], held_out["value"], color=color, marker="o", markersize=3, linewidth=1.5, label=label
        )


def _draw_baselines(panels: dict[str, Any], lines: list[dict[str, Any]], color: str, with_label: bool) -> None:
    """The newest value of each baseline as a horizontal line."""
    for key, (panel, name) in BASELINES.items():
        values = [line[key] for line in lines if line.get(key) is not None]
        if values and panel in panels:
            label = name if with_label else None
            panels[panel].axhline(values[-1], color=color, linestyle="--", linewidth=1, label=label)
