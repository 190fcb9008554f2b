"""`babybert info`: what a dataset, table, tokenizer, checkpoint or run holds, checked on the way.

Everything shown is counted from the files, not taken from their descriptions; digests are computed anew.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Column, Table

from babybert.config import InfoConfig
from babybert.corpus.files import BadRows
from babybert.data.dataset import SPLITS, check_sha256, open_dataset, unigram_entropy
from babybert.data.shards import MOST_TOKENS
from babybert.data.table import TABLE_ENDINGS, Examples, concatenate, read_table
from babybert.data.tokenizer import FIRST_ORDINARY, MASK, UNK, Tokenizer
from babybert.errors import DataError

BAR, BINS = 40, 10
FREQUENT = 12  # words of a tokenizer that are shown


def describe(path: Path, config: InfoConfig) -> dict[str, Any]:
    """What is at `path`, as JSON has it. Raises DataError when it is none of ours or not whole."""
    if (path / "dataset.json").is_file():
        return describe_dataset(path, config.rows)
    if path.is_dir():
        return describe_checkpoint(path)
    if path.name.endswith(TABLE_ENDINGS):
        return describe_table(path, config)
    if path.is_file() and path.suffix == ".json":
        return describe_tokenizer(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    raise DataError(f"{path}: not a dataset, run, checkpoint, tokenizer.json or table ({', '.join(TABLE_ENDINGS)})")


def describe_ops() -> dict[str, Any]:
    """Which implementation of each operation is picked on this machine's device for each preset, as JSON has it."""
    from babybert.model.device import pick_device
    from babybert.model.ops_table import choices

    device = pick_device("auto")
    return {"device": device.type, "operations": [dataclasses.asdict(choice) for choice in choices(device)]}


def format_ops(description: dict[str, Any]) -> str:
    """`describe_ops` as a table."""
    table = Table("operation", "preset", "sizes", "implementation", Column("why", overflow="fold"), box=box.SIMPLE)
    for choice in description["operations"]:
        table.add_row(*(choice[name] for name in ("operation", "preset", "sizes", "implementation", "why")))
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join([f"operations on {description['device']}, with --kernels auto", *lines]).rstrip()


def describe_dataset(folder: Path, rows: int) -> dict[str, Any]:
    """A folder that `babybert prepare` wrote."""
    dataset = open_dataset(folder)
    told = ("corpus", "source", "seed", "duplicates", "skipped_rows", "babybert")
    found: dict[str, Any] = {"path": str(folder), "kind": "dataset", **{name: dataset.facts[name] for name in told}}
    found["vocabulary"] = dataset.tokenizer.size
    for split in SPLITS:
        for path, shard in zip(dataset.shards(split), dataset.facts["shards"][split], strict=True):
            check_sha256(path, shard["sha256"])
        found[split] = {
            "shards": len(dataset.shards(split)),
            **measure(dataset.examples(split), dataset.tokenizer.size),
        }
    found["rows"] = [
        decode(dataset.examples("train"), row, dataset.tokenizer)
        for row in range(min(rows, len(dataset.examples("train"))))
    ]
    return found


def describe_table(path: Path, config: InfoConfig) -> dict[str, Any]:
    """One CSV or Parquet file of masked pairs; without a tokenizer, ids stay numbers."""
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else None
    bad = BadRows(config.skip_bad_rows)
    examples = concatenate(read_table(path, tokenizer.size if tokenizer else MOST_TOKENS, bad))
    size = tokenizer.size if tokenizer else int(examples.original_ids().max()) + 1
    rows = [decode(examples, row, tokenizer) for row in range(min(config.rows, len(examples)))]
    return {
        "path": str(path),
        "kind": "table",
        "skipped_rows": bad.count,
        "pairs": measure(examples, size),
        "rows": rows,
    }


def describe_tokenizer(path: Path) -> dict[str, Any]:
    """A `tokenizer.json`."""
    tokenizer = Tokenizer.load(path)
    first = tokenizer.tokens(range(FIRST_ORDINARY, min(FIRST_ORDINARY + FREQUENT, tokenizer.size)))
    return {
        "path": str(path),
        "kind": "tokenizer",
        "tokenizer_kind": tokenizer.kind,
        "vocabulary": tokenizer.size,
        "digest": tokenizer.digest,
        "first": first,
    }


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """A run (its newest whole checkpoint) or one checkpoint, verified against its manifest."""
    from babybert.checkpoint.format import find_checkpoint, list_checkpoints, load_model, read_state

    folder = find_checkpoint(path)
    model, tokenizer = load_model(folder)
    state = read_state(folder)
    return {
        "path": str(folder),
        "kind": "checkpoint",
        "checkpoints_of_the_run": len(list_checkpoints(folder.parent)),
        "step": state["step"],
        "epoch": state["epoch"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sizes": dataclasses.asdict(model.config),
        "tokenizer_digest": tokenizer.digest,
        "settings": state["settings"],
        "scores": state["scores"],
    }


def measure(examples: Examples, vocab_size: int) -> dict[str, Any]:
    """Counts and shares of some pairs; shares are of all tokens, special ones among them."""
    lengths = np.diff(examples.offsets)
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, BINS + 1).astype(int))
    return {
        "pairs": len(examples),
        "tokens": len(examples.ids),
        "is_next": float(examples.is_next.mean()),
        "masked": float((examples.labels > 0).mean()),
        "became_mask": float((examples.ids[examples.labels > 0] == MASK).mean())
        if (examples.labels > 0).any()
        else None,
        "unknown": float((examples.original_ids() == UNK).mean()),
        "unigram_entropy": unigram_entropy(examples.token_counts(vocab_size)),
        "mean_length": float(lengths.mean()),
        "lengths": [
            {"from": int(low), "to": int(high) - 1, "pairs": int(((lengths >= low) & (lengths < high)).sum())}
            for low, high in itertools.pairwise(edges)
        ],
    }


def decode(examples: Examples, row: int, tokenizer: Tokenizer | None) -> str:
    """A row as text: a chosen token as `[what stands there=the original]`."""
    part = examples.rows(row, row + 1)

    def name(token_id: int) -> str:
        return tokenizer.token(token_id) if tokenizer else str(token_id)

    words = []
    for token_id, label in zip(part.ids.tolist(), part.labels.tolist(), strict=True):
        words.append(
            f"[{name(token_id).strip('[]') if token_id == MASK else name(token_id)}={name(label)}]"
            if label
            else name(token_id)
        )
    return f"is_next {part.is_next[0]}: {' '.join(words)}"


def show(found: dict[str, Any]) -> str:
    """The description for people."""
    lines = [f"{found['path']}: {found['kind']}"]
    for name, value in found.items():
        if name in ("path", "kind"):
            continue
        if isinstance(value, dict) and "lengths" in value:
            lines += [f"  {name}:", *_show_pairs(value)]
        elif name == "rows":
            lines += [
                "  first rows, a chosen token as [what stands there=the original]:" if value else "",
                *(f"    {row}" for row in value),
            ]
        elif isinstance(value, dict):
            lines += [
                f"  {name.replace('_', ' ')}: " + ", ".join(f"{key} {_number(entry)}" for key, entry in value.items())
            ]
        elif isinstance(value, list):
            lines.append(f"  {name.replace('_', ' ')}: {' '.join(map(str, value))}")
        else:
            lines.append(f"  {name.replace('_', ' ')}: {_number(value)}")
    return "\n".join(line for line in lines if line)


def _show_pairs(value: dict[str, Any]) -> list[str]:
    shards = f" in {value['shards']} shards" if "shards" in value else ""
    became = f", of those {value['became_mask']:.1%} are [MASK]" if value["became_mask"] is not None else ""
    lines = [
        f"    {value['pairs']:,} pairs, {value['tokens']:,} tokens{shards}; is_next in {value['is_next']:.1%}",
        f"    chosen for MLM {value['masked']:.1%} of tokens{became}; unknown {value['unknown']:.2%}",
        f"    unigram entropy {value['unigram_entropy']:.3f} nats: the MLM loss of a model that knows only word counts",
        f"    length in tokens (mean {value['mean_length']:.1f}):",
    ]
    most = max(entry["pairs"] for entry in value["lengths"])
    for entry in value["lengths"]:
        bar = "█" * round(BAR * entry["pairs"] / most)
        lines.append(f"    {entry['from']:>5}-{entry['to']:<5}{entry['pairs']:>10,} {bar}".rstrip())
    return lines


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
