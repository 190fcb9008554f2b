"""The report of `babybert evaluate --blimp` as tables of plain text and as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babybert.evaluation.report_table import format_number
from babybert.figures import literal, open_pyplot, save_figure
from babybert.tables import format_table

BASELINES = ("bigram", "unigram", "length")
# Accuracy over all 67,000 pairs, in percent. Warstadt et al., 2020, table 3; the models of the BabyLM challenge of 2023
# (Warstadt et al., 2023) were trained on ten million words.
PUBLISHED = (
    ("T5 (BabyLM 10 M)", 58.8),
    ("5-gram", 61.2),
    ("OPT-125M (BabyLM 10 M)", 62.6),
    ("RoBERTa-base (BabyLM 10 M)", 69.5),
    ("Transformer-XL", 69.6),
    ("LSTM", 69.8),
    ("GPT-2", 81.5),
    ("human", 88.6),
)
CLOSEST_LABELS = 2.5  # percent; labels of closer lines would overlap, so they are one block of text
FORMAT = ".1%"


def format_blimp(report: dict[str, Any]) -> str:
    """The report as text: one table by phenomenon, with the overall accuracy below, and one by paradigm."""
    overall = report["overall"]
    title = (
        f"BLiMP: {overall['paradigms']:,} paradigms, {report['pairs']:,} pairs, {report['sentences']:,} sentences "
        f"(tokenizer {report['tokenizer']}, {report['precision']})"
    )
    phenomena = [(group["phenomenon"], group) for group in report["by_phenomenon"]]
    paradigms = [(group["paradigm"], group) for group in report["by_paradigm"]]
    interval = f"{report['intervals_hold']:.0%}"
    notes = [
        *_scoring_notes(report),
        f"The brackets are {interval} bootstrap intervals, resampled by {report['intervals_resample']}.",
        "Ties count half.",
        *(f"left out: {reason}" for reason in report["left_out"]),
    ]
    tables = [
        _table(report, "phenomenon", [*phenomena, ("all (mean of paradigms)", overall)]),
        _table(report, "paradigm", paradigms),
    ]
    return "\n\n".join([title, *tables, "\n".join(notes)])


def _scoring_notes(report: dict[str, Any]) -> list[str]:
    if not _has_pieces(report):
        return ["model: pseudo-log-likelihood; with a vocabulary of words, both of its variants are equal."]
    return ["model: within-word pseudo-log-likelihood. plain: the variant that masks one piece at a time."]


def _has_pieces(report: dict[str, Any]) -> bool:
    return bool(report["tokenizer"] == "wordpiece")


def _table(report: dict[str, Any], title: str, groups: Sequence[tuple[str, dict[str, Any]]]) -> str:
    interval = f"{report['intervals_hold']:.0%} interval"
    others = [*(["plain"] if _has_pieces(report) else []), *(name for name in BASELINES if name in report["overall"])]
    rows = []
    for name, group in groups:
        low, high = group["intervals"]["within_word"]
        rows.append(
            (
                name,
                f"{group['pairs']:,}",
                format_number(group["within_word"], FORMAT),
                f"[{format_number(low, FORMAT)}, {format_number(high, FORMAT)}]",
                *(format_number(group[other], FORMAT) for other in others),
                f"{group['ties']:,}",
                format_number(group["unknown_share"], FORMAT),
            )
        )
    headers = (title, "pairs", "model", interval, *others, "ties", "unknown")
    return format_table(headers, rows, text_headers=(title, interval))


def plot_blimp(report: dict[str, Any], out: Path) -> list[Path]:
    """Draw the accuracy by phenomenon, with baselines and published figures, to `out`.png and `out`.svg.

    Returns the two paths. Raises UsageError without matplotlib or if the files cannot be written there, StorageError if
    the disk is full.
    """
    pyplot = open_pyplot()
    groups = [*report["by_phenomenon"], {"phenomenon": "all", **report["overall"]}]
    places = range(len(groups))
    figure, axis = pyplot.subplots(figsize=(12, 6.5), layout="constrained")
    value = [100 * group["within_word"] for group in groups]
    low, high = ([100 * group["intervals"]["within_word"][end] for group in groups] for end in (0, 1))
    errors = [[mean - end for mean, end in zip(value, low, strict=True)],
              [end - mean for mean, end in zip(value, high, strict=True)]]  # fmt: skip
    axis.bar(places, value, yerr=errors, capsize=3, color="tab:blue", alpha=0.75, label="model")
    for name, marker in zip(BASELINES, ("o", "s", "^"), strict=True):
        if name in report["overall"]:
            axis.plot(places, [100 * group[name] for group in groups], marker, color="black", mfc="none", label=name)
    axis.axhline(50, color="gray", linestyle=":", label="chance")
    for figures in _close_together():
        for _, accuracy in figures:
            axis.axhline(accuracy, color="tab:orange", linewidth=0.8)
        text = "\n".join(f"{name} {accuracy}" for name, accuracy in reversed(figures))
        middle = sum(accuracy for _, accuracy in figures) / len(figures)
        axis.annotate(text, (1.005, middle), xycoords=("axes fraction", "data"), va="center", fontsize=7)
    axis.set_xticks(places, [literal(group["phenomenon"]) for group in groups], rotation=35, ha="right")
    axis.set(ylim=(0, 100), ylabel="accuracy, %", title="BLiMP by phenomenon; lines: published, all phenomena")
    axis.legend(fontsize="small", loc="lower left", ncols=5)
    return save_figure(pyplot, figure, out, "--plot")


def _close_together() -> list[list[tuple[str, float]]]:
    """The published figures in groups, each of which has one label."""
    groups: list[list[tuple[str, float]]] = []
    for figure in PUBLISHED:
        if groups and figure[1] - groups[-1][-1][1] < CLOSEST_LABELS:
            groups[-1].append(figure)
        else:
            groups.append([figure])
    return groups
