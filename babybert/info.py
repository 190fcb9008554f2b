"""`babybert info`: what a dataset, table, tokenizer, checkpoint or run contains, with a check of its files.

Everything is counted from the files themselves, not taken from their descriptions, and digests are computed anew. That
costs one read of all files.
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
from babybert.data.dataset import SPLITS, Dataset, unigram_entropy
from babybert.data.s3_cache import CacheLimits
from babybert.data.s3_dataset import open_data
from babybert.data.shards import MOST_TOKENS
from babybert.data.table import TABLE_ENDINGS, Examples, concatenate, read_table
from babybert.data.tokenizer import FIRST_ORDINARY, MASK, UNK, Tokenizer
from babybert.errors import DataError
from babybert.s3 import is_s3
from babybert.tables import escape_control_characters, format_table

DATASET_FACTS = ("corpus", "source", "seed", "duplicates", "skipped_rows", "babybert")
LONGEST_BAR = 40  # characters
LENGTH_BINS = 10
FIRST_TOKENS = 12  # of a tokenizer's vocabulary that are shown


def describe(address: Path | str, config: InfoConfig) -> dict[str, Any]:
    """What is at a path or, for a dataset, at an S3 address, as `babybert info --json` prints it.

    Raises DataError for an unknown or corrupt file.
    """
    path = Path(address)
    if is_s3(str(address)) or (path / "dataset.json").is_file():
        return describe_dataset(open_data(address, CacheLimits(config.cache, config.cache_gb)), address, config.rows)
    if path.is_dir():
        return describe_checkpoint(path)
    if path.name.lower().endswith(TABLE_ENDINGS):
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


def describe_dataset(dataset: Dataset, address: Path | str, rows: int) -> dict[str, Any]:
    """Prepared data, with the first `rows` training pairs. Raises DataError if a file is missing or damaged."""
    description: dict[str, Any] = {"path": str(address), "kind": "dataset"}
    description.update({name: dataset.facts[name] for name in DATASET_FACTS})
    if dataset.facts["corpus"] != "table":
        description["segments"] = dataset.facts.get("segments", "sentences")
    description["vocabulary"] = dataset.tokenizer.size
    for split in SPLITS:
        dataset.verify(split)
        description[split] = {
            "shards": len(dataset.shards(split)),
            **measure(dataset.examples(split), dataset.tokenizer.size),
            "pairs_without_negative": dataset.facts[split].get("pairs_without_negative", 0),
        }
    description["rows"] = decode_rows(dataset.examples("train"), rows, dataset.tokenizer)
    return description


def describe_table(path: Path, config: InfoConfig) -> dict[str, Any]:
    """One CSV or Parquet file of masked pairs. Without `config.tokenizer`, ids stay numbers. Raises DataError."""
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else None
    bad_rows = BadRows(config.skip_bad_rows)
    examples = concatenate(read_table(path, tokenizer.size if tokenizer else MOST_TOKENS, bad_rows))
    vocab_size = tokenizer.size if tokenizer else int(examples.original_ids().max()) + 1
    return {
        "path": str(path),
        "kind": "table",
        "skipped_rows": bad_rows.count,
        "pairs": measure(examples, vocab_size),
        "rows": decode_rows(examples, config.rows, tokenizer),
    }


def describe_tokenizer(path: Path) -> dict[str, Any]:
    """A `tokenizer.json`. Raises DataError."""
    tokenizer = Tokenizer.load(path)
    end = min(FIRST_ORDINARY + FIRST_TOKENS, tokenizer.size)
    return {
        "path": str(path),
        "kind": "tokenizer",
        "tokenizer_kind": tokenizer.kind,
        "vocabulary": tokenizer.size,
        "digest": tokenizer.digest,
        "first": tokenizer.tokens(range(FIRST_ORDINARY, end)),
    }


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """One checkpoint, or the newest valid checkpoint of a run, verified against its manifest. Raises DataError."""
    # Imported here: they load PyTorch, which the other kinds of files do not need.
    from babybert.checkpoint.format import find_checkpoint, list_checkpoints, load_encoder, read_state
    from babybert.model.classifier import TextClassifier

    folder = find_checkpoint(path)
    model, tokenizer = load_encoder(folder)
    state = read_state(folder)
    classifier = dataclasses.asdict(model.classifier) if isinstance(model, TextClassifier) else None
    return {
        "path": str(folder),
        "kind": "checkpoint",
        "checkpoints_of_the_run": len(list_checkpoints(folder.parent)),
        "step": state.step,
        "epoch": state.epoch,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sizes": dataclasses.asdict(model.config),
        **({} if classifier is None else {"classifier": {**classifier, "classes": list(classifier["classes"])}}),
        "tokenizer_digest": tokenizer.digest,
        "settings": state.settings,
        "scores": state.scores,
    }


def measure(examples: Examples, vocab_size: int) -> dict[str, Any]:
    """Counts and shares of some pairs. Shares are of all tokens, special ones included."""
    lengths = np.diff(examples.offsets)
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, LENGTH_BINS + 1).astype(int))
    is_masked = examples.labels > 0
    became_mask = float((examples.ids[is_masked] == MASK).mean()) if is_masked.any() else None
    return {
        "pairs": len(examples),
        "tokens": len(examples.ids),
        "is_next": float(examples.is_next.mean()),
        "masked": float(is_masked.mean()),
        "became_mask": became_mask,
        "unknown": float((examples.original_ids() == UNK).mean()),
        "unigram_entropy": unigram_entropy(examples.token_counts(vocab_size)),
        "mean_length": float(lengths.mean()),
        "lengths": [
            {"from": int(low), "to": int(high) - 1, "pairs": int(((lengths >= low) & (lengths < high)).sum())}
            for low, high in itertools.pairwise(edges)
        ],
    }


def decode_rows(examples: Examples, count: int, tokenizer: Tokenizer | None) -> list[str]:
    """The first `count` pairs as text."""
    return [decode(examples, row, tokenizer) for row in range(min(count, len(examples)))]


def decode(examples: Examples, row: int, tokenizer: Tokenizer | None) -> str:
    """One pair as text, in which a token chosen for MLM is `[input=original]`. Without a tokenizer, ids are numbers."""
    pair = examples.rows(row, row + 1)

    def name(token_id: int) -> str:
        return tokenizer.token(token_id) if tokenizer else str(token_id)

    words = []
    for token_id, label in zip(pair.ids.tolist(), pair.labels.tolist(), strict=True):
        word = name(token_id)
        if label:
            input_word = word.strip("[]") if token_id == MASK else word  # [MASK=original], not [[MASK]=original]
            word = f"[{input_word}={name(label)}]"
        words.append(word)
    return f"is_next {pair.is_next[0]}: {' '.join(words)}"


def format_description(description: dict[str, Any]) -> str:
    """The description as text."""
    lines = [f"{description['path']}: {description['kind']}"]
    for key, value in description.items():
        if key not in ("path", "kind"):
            lines += _format_entry(key, value)
    return "\n".join(lines)


def _format_entry(key: str, value: Any) -> list[str]:
    name = key.replace("_", " ")
    if isinstance(value, dict) and "lengths" in value:
        return [f"  {name}:", *_indent(_format_pairs(value), 4)]
    if isinstance(value, dict):
        rows = [(entry_key, format_value(entry)) for entry_key, entry in value.items()]
        return _indent(format_table((name, "value"), rows, text_headers=(name, "value")), 2)
    if key == "rows":
        title = "  first rows, a chosen token as [input=original]:"
        return [title, *(f"    {escape_control_characters(row)}" for row in value)] if value else []
    if isinstance(value, list):
        return [f"  {name}: {escape_control_characters(' '.join(map(str, value)))}"]
    return [f"  {name}: {format_value(value)}"]


def _format_pairs(pairs: dict[str, Any]) -> str:
    """What `measure` has counted, with a bar chart of the lengths."""
    shards = f" in {pairs['shards']} shards" if "shards" in pairs else ""
    became_mask = pairs["became_mask"]
    share_of_mask = "" if became_mask is None else f", of those {became_mask:.1%} are [MASK]"
    notes = []
    if pairs["is_next"] in (0, 1):
        notes.append("all pairs have one label, so NSP can be neither learned nor scored")
    if pairs.get("pairs_without_negative"):
        notes.append(f"pairs left out, because no sentence makes them negatives: {pairs['pairs_without_negative']:,}")
    most_pairs = max(length["pairs"] for length in pairs["lengths"])
    rows = [
        (
            f"{length['from']}-{length['to']}",
            f"{length['pairs']:,}",
            "█" * round(LONGEST_BAR * length["pairs"] / most_pairs),
        )
        for length in pairs["lengths"]
    ]
    return "\n".join(
        [
            f"{pairs['pairs']:,} pairs, {pairs['tokens']:,} tokens{shards}; is_next in {pairs['is_next']:.1%}",
            *notes,
            f"chosen for MLM {pairs['masked']:.1%} of tokens{share_of_mask}; unknown {pairs['unknown']:.2%}",
            f"unigram entropy {pairs['unigram_entropy']:.3f} nats: the MLM loss of the unigram baseline",
            f"mean length {pairs['mean_length']:.1f} tokens",
            format_table(("length", "pairs", ""), rows, text_headers=("",)),
        ]
    )


def _indent(text: str, columns: int) -> list[str]:
    return [" " * columns + line for line in text.splitlines()]


def format_value(value: Any) -> str:
    """A number with four significant digits or, if it is whole, with thousands separators; anything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
