"""Labelled texts whose words decide their class, for tests of fine-tuning and of what it makes."""

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILLERS = ("the", "film", "mary", "is", "and", "near", "a", "ship")
SIGNALS = {"neg": ("dull", "boring"), "pos": ("superb", "wonderful"), "other": ("planet", "laser")}


def decidable_texts(count: int, seed: int = 0, classes: tuple[str, ...] = ("neg", "pos")) -> list[tuple[str, str]]:
    """Different texts with their class: five to nine fillers and two words of the class."""
    choose = random.Random(seed)
    rows = []
    for number in range(count):
        label = classes[number % len(classes)]
        words = [choose.choice(FILLERS) for _ in range(choose.randint(5, 9))]
        for _ in range(2):
            words.insert(choose.randrange(len(words)), choose.choice(SIGNALS[label]))
        rows.append((" ".join(words), label))
    return list(dict(rows).items())


def write_csv(path: Path, rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    """A CSV file of these rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
