"""Pictures of an evaluation, and of attention: PNG and SVG, as `babybert plot` makes of curves."""

from pathlib import Path
from typing import Any

import numpy as np

from babybert.evaluation.report_table import label
from babybert.figures import open_pyplot, save_figure

MOST_TOKENS = 40  # whose names are still legible along an axis


def plot_report(found: dict[str, Any], out: Path) -> list[Path]:
    """Calibration, loss by frequency and loss by position. Raises UsageError without matplotlib, StorageError."""
    pyplot = open_pyplot()
    figure, (calibration, frequency, position) = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")
    calibration.plot([0, 1], [0, 1], "k--", linewidth=1, label="calibrated")
    bins = found["calibration"]
    sizes = [20 + 300 * part["pairs"] / found["pairs"] for part in bins]
    calibration.scatter(
        [part["probability"] for part in bins],
        [part["share"] for part in bins],
        s=sizes,
        alpha=0.7,
        label="held-out pairs, by size",
    )
    calibration.set(
        xlim=(0, 1),
        ylim=(0, 1),
        title="next sentence: calibration",
        xlabel='probability of "B follows A"',
        ylabel="share in which it does",
    )
    for axis, parts, title in (
        (frequency, found["by_frequency"], "times seen in training"),
        (position, found["by_position"], "position in the pair"),
    ):
        for name, key in (("model", "mlm_loss"), ("bigram", "mlm_bigram_loss"), ("unigram", "mlm_unigram_loss")):
            axis.plot(
                [part[key] for part in parts],
                marker="o",
                markersize=4,
                linestyle="-" if name == "model" else "--",
                label=name,
            )
        axis.axhline(found["mlm_chance_loss"], color="gray", linestyle=":", label="chance")
        axis.set_xticks(
            range(len(parts)),
            [f"{label(part)}\n({part['tokens']:,})" for part in parts],
            rotation=45,
            ha="right",
            fontsize="small",
        )
        axis.set(title=f"MLM loss by {title}", ylabel="nats")
    for axis in (calibration, frequency, position):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return save_figure(pyplot, figure, out)


def plot_attention(tokens: list[str], weights_LHTT: np.ndarray, out: Path) -> list[Path]:
    """One map a layer (down) and head (across): a row is a token that looks, a column what it looks at."""
    pyplot = open_pyplot()
    layers, heads, length, _ = weights_LHTT.shape
    side = max(3.0, min(length, MOST_TOKENS) * 0.22)
    figure, axes = pyplot.subplots(
        layers, heads, figsize=(heads * side, layers * side), layout="constrained", squeeze=False
    )
    for layer in range(layers):
        for head in range(heads):
            axis = axes[layer, head]
            axis.imshow(weights_LHTT[layer, head], vmin=0, cmap="viridis")
            # Each map has its own scale: heads differ too much to be seen on one.
            axis.set_title(
                f"layer {layer + 1}, head {head + 1}: up to {weights_LHTT[layer, head].max():.2f}", fontsize="small"
            )
            if length <= MOST_TOKENS:
                # A token may hold a dollar sign, which would begin a formula.
                names = [token.replace("$", r"\$") for token in tokens]
                axis.set_xticks(range(length), names, rotation=90, fontsize=6)
                axis.set_yticks(range(length), names, fontsize=6)
    return save_figure(pyplot, figure, out)
