"""Figures of an evaluation report and of attention weights, each written as PNG and SVG."""

from pathlib import Path
from typing import Any

import numpy as np

from babybert.evaluation.report_table import slice_label
from babybert.figures import literal, open_pyplot, save_figure
from babybert.tables import escape_control_characters

MOST_TOKENS = 40  # with more, the tokens along an axis would not be legible
MOST_CHARACTERS = 20  # of a token along an axis; longer ones would leave no room for the map
INCHES_PER_TOKEN = 0.22
SMALLEST_MAP = 3.0  # inches
PREDICTORS = (("model", "mlm_loss"), ("bigram", "mlm_bigram_loss"), ("unigram", "mlm_unigram_loss"))


def plot_report(report: dict[str, Any], out: Path) -> list[Path]:
    """Draw calibration, MLM loss by word frequency and MLM loss by position to `out`.png and `out`.svg.

    Returns the two paths. Raises UsageError without matplotlib or if the files cannot be written there, StorageError if
    the disk is full.
    """
    pyplot = open_pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")
    _draw_calibration(axes[0], report)
    _draw_slices(axes[1], report["by_frequency"], "times seen in training", report["mlm_chance_loss"])
    _draw_slices(axes[2], report["by_position"], "position in the pair", report["mlm_chance_loss"])
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return save_figure(pyplot, figure, out, "--plot")


def _draw_calibration(axis: Any, report: dict[str, Any]) -> None:
    """One disc for each bin of the probability that B follows A; its area is the bin's share of the pairs."""
    bins = report["calibration"]
    axis.plot([0, 1], [0, 1], "k--", linewidth=1, label="calibrated")
    axis.scatter(
        [bin_["probability"] for bin_ in bins],
        [bin_["share"] for bin_ in bins],
        s=[20 + 300 * bin_["pairs"] / report["pairs"] for bin_ in bins],
        alpha=0.7,
        label="held-out pairs, by size",
    )
    axis.set(
        xlim=(0, 1),
        ylim=(0, 1),
        title="next sentence: calibration" if bins else "next sentence: not scored, all pairs have one label",
        xlabel='probability of "B follows A"',
        ylabel="share of pairs in which B follows A",
    )


def _draw_slices(axis: Any, slices: list[dict[str, Any]], title: str, chance_loss: float) -> None:
    """The losses of the model and the baselines for each slice of the masked tokens."""
    for name, key in PREDICTORS:
        line = "-" if name == "model" else "--"
        axis.plot([slice_[key] for slice_ in slices], marker="o", markersize=4, linestyle=line, label=name)
    axis.axhline(chance_loss, color="gray", linestyle=":", label="chance")
    tick_labels = [f"{slice_label(slice_)}\n({slice_['tokens']:,})" for slice_ in slices]
    axis.set_xticks(range(len(slices)), tick_labels, rotation=45, ha="right", fontsize="small")
    axis.set(title=f"MLM loss by {title}", ylabel="nats")


def plot_attention(tokens: list[str], weights_LHTT: np.ndarray, out: Path) -> list[Path]:
    """Draw one attention map for each of L layers (down) and H heads (across) to `out`.png and `out`.svg.

    A row of a map is the token that attends, a column the token it attends to; T is the number of `tokens`. Returns the
    two paths. Raises UsageError without matplotlib or if the files cannot be written there, StorageError if the disk is
    full.
    """
    pyplot = open_pyplot()
    layers, heads, length, _ = weights_LHTT.shape
    side = max(SMALLEST_MAP, min(length, MOST_TOKENS) * INCHES_PER_TOKEN)
    figure, axes = pyplot.subplots(
        layers, heads, figsize=(heads * side, layers * side), layout="constrained", squeeze=False
    )
    names = [literal(_shorten(escape_control_characters(token))) for token in tokens]
    for layer in range(layers):
        for head in range(heads):
            axis = axes[layer, head]
            weights_TT = weights_LHTT[layer, head]
            # Each map has its own colour scale, since the largest weights of heads differ widely.
            axis.imshow(weights_TT, vmin=0, cmap="viridis")
            title = f"layer {layer + 1}, head {head + 1}: up to {weights_TT.max():.2f}"
            axis.set_title(title, fontsize="small")
            if length <= MOST_TOKENS:
                axis.set_xticks(range(length), names, rotation=90, fontsize=6)
                axis.set_yticks(range(length), names, fontsize=6)
    return save_figure(pyplot, figure, out, "--plot")


def _shorten(token: str) -> str:
    return token if len(token) <= MOST_CHARACTERS else f"{token[: MOST_CHARACTERS - 1]}…"
