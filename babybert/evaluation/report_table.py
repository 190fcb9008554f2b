"""The report of `babybert evaluate` as tables of plain text."""

from typing import Any

from babybert.tables import format_table

MLM_SCORES = (
    ("loss, nats", "loss", ".3f"),
    ("perplexity", "perplexity", ",.0f"),
    ("top-1", "top1", ".2%"),
    ("top-5", "top5", ".2%"),
    ("reciprocal rank", "reciprocal_rank", ".4f"),
)
NSP_SCORES = (
    ("loss, nats", "loss", ".4f"),
    ("accuracy", "accuracy", ".1%"),
    ("AUC", "auc", ".3f"),
    ("calibration error", "calibration_error", ".4f"),
)
SLICES = (
    ("by_frequency", "times seen in training"),
    ("by_position", "position in the pair"),
    ("by_shown", "shown to the model"),
)


def format_report(report: dict[str, Any]) -> str:
    """The report as text. The model's scores have their confidence intervals."""
    encoder = ", encoder in bf16" if report["precision"] == "bf16" else ""
    sections = [
        f"held out: {report['pairs']:,} pairs, {report['masked_tokens']:,} masked tokens{encoder} "
        f"(masks: {report['masks']})",
        _mlm_table(report),
        *([] if report["nsp_chance_loss"] is None else [_nsp_table(report)]),
        *(_slice_table(report[key], title) for key, title in SLICES),
        f"The intervals are bootstrap intervals, resampled by {report['intervals_resample']}.",
    ]
    if report["left_out"]:
        sections.append("\n".join(f"left out: {reason}" for reason in report["left_out"]))
    return "\n\n".join(sections)


def _mlm_table(report: dict[str, Any]) -> str:
    baselines = ("bigram", "unigram", "chance")
    rows = [_score_row(report, title, "mlm", score, baselines, form) for title, score, form in MLM_SCORES]
    for baseline in ("unigram", "bigram"):
        rows.append(_score_row(report, f"loss below {baseline}", "mlm", f"loss_below_{baseline}", baselines, ".3f"))
    return _score_table(report, "masked words", baselines, rows)


def _nsp_table(report: dict[str, Any]) -> str:
    baselines = ("overlap", "style", "format", "chance")
    rows = [_score_row(report, title, "nsp", score, baselines, form) for title, score, form in NSP_SCORES]
    return _score_table(report, "next sentence", baselines, rows)


def _score_table(report: dict[str, Any], title: str, baselines: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    interval = f"{report['intervals_hold']:.0%} interval"
    return format_table((title, "model", interval, *baselines), rows, text_headers=(title, interval))


def _score_row(
    report: dict[str, Any], title: str, task: str, score: str, baselines: tuple[str, ...], form: str
) -> tuple[str, ...]:
    """One score of the model with its interval, and of the baselines; empty where a baseline has no such score."""
    key = f"{task}_{score}"
    low, high = report["intervals"][key]
    interval = "" if low is None else f"[{format_number(low, form)}, {format_number(high, form)}]"
    baseline_cells = [format_number(report.get(f"{task}_{baseline}_{score}"), form) for baseline in baselines]
    return (title, format_number(report[key], form), interval, *baseline_cells)


def _slice_table(slices: list[dict[str, Any]], title: str) -> str:
    headers = (title, "tokens", "loss", "bigram", "unigram", "top-1", "top-5", "rec. rank")
    rows = [
        (
            slice_label(slice_),
            f"{slice_['tokens']:,}",
            format_number(slice_["mlm_loss"], ".3f"),
            format_number(slice_["mlm_bigram_loss"], ".3f"),
            format_number(slice_["mlm_unigram_loss"], ".3f"),
            format_number(slice_["mlm_top1"], ".1%"),
            format_number(slice_["mlm_top5"], ".1%"),
            format_number(slice_["mlm_reciprocal_rank"], ".3f"),
        )
        for slice_ in slices
    ]
    return format_table(headers, rows, text_headers=(title,))


def slice_label(slice_: dict[str, Any]) -> str:
    """The name of one slice of the report: the shown token, or the range of counts or positions."""
    if "shown" in slice_:
        return str(slice_["shown"])
    low, high = slice_["from"], slice_["to"]
    if high is None:
        return f"{low:,} or more"
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def format_number(value: float | None, form: str) -> str:
    """The number in Python's format `form`; empty where the report has none (it was not finite)."""
    return "" if value is None else format(value, f"z{form}")  # z: never -0.000
