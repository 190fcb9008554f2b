"""The report of `babybert evaluate` for people: aligned tables of plain text."""

from typing import Any

Row = tuple[str, ...]
NAME, COLUMN = 22, 12


def show(found: dict[str, Any]) -> str:
    """The report as text; the model's own scores with their intervals."""
    lines = [
        f"held out: {found['pairs']:,} pairs, {found['masked_tokens']:,} masked tokens (masks: {found['masks']})",
        "",
    ]
    others: tuple[str, ...] = ("bigram", "unigram", "chance")
    lines += _grid([("masked words", "model", "", *others)])
    lines += _grid(
        [
            _headline(found, "loss, nats", "mlm", "loss", others, ".3f"),
            _headline(found, "perplexity", "mlm", "perplexity", others, ",.0f"),
            _headline(found, "top-1", "mlm", "top1", others, ".2%"),
            _headline(found, "top-5", "mlm", "top5", others, ".2%"),
            _headline(found, "reciprocal rank", "mlm", "reciprocal_rank", others, ".4f"),
        ]
    )
    for other in ("unigram", "bigram"):
        lines += _grid(
            [
                (
                    f"loss below {other}",
                    _one(found[f"mlm_loss_below_{other}"], ".3f"),
                    _interval(found, f"mlm_loss_below_{other}", ".3f"),
                )
            ]
        )
    others = ("overlap", "style", "format", "chance")
    lines += ["", *_grid([("next sentence", "model", "", *others)])]
    lines += _grid(
        [
            _headline(found, "loss, nats", "nsp", "loss", others, ".4f"),
            _headline(found, "accuracy", "nsp", "accuracy", others, ".1%"),
            _headline(found, "AUC", "nsp", "auc", others, ".3f"),
            _headline(found, "calibration error", "nsp", "calibration_error", others, ".4f"),
        ]
    )
    for key, title in (
        ("by_frequency", "times seen in training"),
        ("by_position", "position in the pair"),
        ("by_shown", "shown in its place"),
    ):
        lines += ["", *_slices(found[key], title)]
    lines += ["", f"In brackets: {found['intervals_hold']:.0%} intervals, resampled by {found['intervals_resample']}."]
    lines += [f"left out: {reason}" for reason in found["left_out"]]
    return "\n".join(lines)


def _headline(found: dict[str, Any], title: str, task: str, key: str, others: tuple[str, ...], form: str) -> Row:
    values = [_one(found.get(f"{task}_{other}_{key}"), form) for other in others]
    return (title, _one(found[f"{task}_{key}"], form), _interval(found, f"{task}_{key}", form), *values)


def _interval(found: dict[str, Any], key: str, form: str) -> str:
    low, high = found["intervals"][key]
    return "" if low is None else f"[{_one(low, form)}, {_one(high, form)}]"


def _one(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _grid(rows: list[Row]) -> list[str]:
    return [
        f"{row[0]:<{NAME}}{row[1]:>{COLUMN}} {row[2]:<20}{''.join(f'{cell:>{COLUMN}}' for cell in row[3:])}".rstrip()
        for row in rows
    ]


def _slices(parts: list[dict[str, Any]], title: str) -> list[str]:
    columns = ("tokens", "loss", "bigram", "unigram", "top-1", "top-5", "rec. rank")
    lines = [f"{title:<{NAME}}{''.join(f'{column:>10}' for column in columns)}"]
    for part in parts:
        losses = (part["mlm_loss"], part["mlm_bigram_loss"], part["mlm_unigram_loss"])
        cells = [
            f"{part['tokens']:,}",
            *(f"{loss:.3f}" for loss in losses),
            f"{part['mlm_top1']:.1%}",
            f"{part['mlm_top5']:.1%}",
            f"{part['mlm_reciprocal_rank']:.3f}",
        ]
        lines.append(f"{label(part):<{NAME}}{''.join(f'{cell:>10}' for cell in cells)}")
    return lines


def label(part: dict[str, Any]) -> str:
    """What a slice is of."""
    if "shown" in part:
        return str(part["shown"])
    low, high = part["from"], part["to"]
    return f"{low:,} or more" if high is None else f"{low:,}" if low == high else f"{low:,} to {high:,}"
