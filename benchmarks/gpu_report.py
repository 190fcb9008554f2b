"""The report of `gpu.py` as Markdown, in the form of docs/performance.md."""

from typing import Any

Row = dict[str, Any]
WORTH_IT = 1.05  # how much faster another choice must be before `auto` should change


def format_report(result: dict[str, Any]) -> str:
    """All tables, the recommendations for `--kernels auto`, and what was skipped or failed."""
    rows = result["rows"]
    blocks = [f"{result['machine']}; {result['seconds']:.0f} s in all."]
    if result["rehearsal"]:
        blocks.append("A rehearsal on the CPU: times mean nothing.")
    blocks += [
        _checks([row for row in rows if row["part"] == "checks"]),
        _steps([row for row in rows if row["part"] == "steps" and "step_ms" in row]),
        _kernels([row for row in rows if row["part"] == "kernels" and "ms" in row]),
        _epochs([row for row in rows if row["part"] == "epoch" and "epoch_s" in row]),
        _choices(rows),
        _problems(rows, result["skipped"]),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _table(headers: list[str], rows: list[list[str]], text_columns: int) -> str:
    rule = ["---"] * text_columns + ["---:"] * (len(headers) - text_columns)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headers, rule, *rows))


def _checks(rows: list[Row]) -> str:
    passed = sum(row["passed"] for row in rows)
    lines = [
        [
            row["kernel"],
            row["shape"],
            row["precision"],
            f"{row['error']:.1e}" if "error" in row else "",
            f"{row['plain_error']:.1e}" if "error" in row else "",
            "yes" if row["passed"] else "NO",
        ]
        for row in rows
    ]
    headers = ["kernel", "shape", "precision", "error", "PyTorch's error", "passed"]
    title = f"Correctness, as the largest error relative to float64: {passed} of {len(rows)} checks passed."
    return f"{title}\n\n{_table(headers, lines, 3)}"


def _steps(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = [
        [
            row["preset"],
            row["batch"],
            row["precision"],
            row["kernels"],
            f"{row['step_ms']:.2f}",
            f"{row['pairs_per_second']:,.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_gib']:.2f}" if row["peak_gib"] is not None else "",
            f"{row['first_step_s']:.1f}",
            {True: "yes", False: "no", None: ""}[row["host_waits"]],
        ]
        for row in sorted(rows, key=_step_key)
    ]
    headers = [
        "preset",
        "batch",
        "precision",
        "kernels",
        "ms a step",
        "pairs/s",
        "tokens/s",
        "peak, GiB",
        "first step, s",
    ]
    return f"Whole training steps:\n\n{_table([*headers, 'host waits'], lines, 4)}"


def _step_key(row: Row) -> tuple[str, ...]:
    return row["preset"], row["batch"], row["precision"], row["kernels"]


def _kernels(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = [
        [
            row["kernel"],
            row["shape"],
            row["precision"],
            *(f"{row['ms'][name]:.3f}" if name in row["ms"] else "" for name in ("plain", "chunked", "triton")),
            min(row["ms"], key=row["ms"].__getitem__),
        ]
        for row in rows
    ]
    headers = ["operation", "rows, width, vocabulary or units", "precision", "plain, ms", "chunked, ms", "Triton, ms"]
    return f"Operations by themselves, forward and backward:\n\n{_table([*headers, 'fastest'], lines, 3)}"


def _epochs(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = [
        [
            row["preset"],
            row["kernels"],
            row["data"],
            str(row["batch"]),
            f"{row['pairs_done']:,} of {row['pairs_of_epoch']:,}",
            f"{row['pairs_per_second']:,.0f}",
            f"{row['epoch_s']:,.0f}",
        ]
        for row in rows
    ]
    headers = ["preset", "kernels", "data", "batch", "pairs", "pairs/s", "an epoch, s"]
    return f"Training on a dataset, with its loader:\n\n{_table(headers, lines, 3)}"


def _choices(rows: list[Row]) -> str:
    """For each preset, shape and precision: what `--kernels auto` should pick."""
    steps: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["part"] == "steps" and "step_ms" in row:
            steps.setdefault(_step_key(row)[:3], {})[row["kernels"]] = row["step_ms"]
    lines = []
    for key, ms in sorted(steps.items()):
        fastest = min(ms, key=ms.__getitem__)
        now = ms.get("auto", ms[fastest])
        is_better = now / ms[fastest] >= WORTH_IT
        lines.append([*key, fastest if is_better else "auto, as it is", f"{now / ms[fastest]:.2f}"])
    if not lines:
        return ""
    title = f"What `--kernels auto` should pick; below a ratio of {WORTH_IT} it stays as it is:"
    return f"{title}\n\n{_table(['preset', 'batch', 'precision', 'pick', 'auto / fastest'], lines, 4)}"


def _problems(rows: list[Row], skipped: list[str]) -> str:
    names = ("case", "kernel", "preset", "batch", "shape", "kernels", "precision")
    lines = [
        f"- failed: {row['part']} {', '.join(str(row[name]) for name in names if row.get(name))}: {row['problem']}"
        for row in rows
        if "problem" in row
    ]
    lines += [f"- skipped, no time left: {name}" for name in skipped]
    return "\n".join(lines)
