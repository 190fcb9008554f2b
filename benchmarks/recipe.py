"""Which settings learn best in a given time: one change at a time to a recipe, each trained as long as all others.

    python benchmarks/recipe.py --data data/imdb                    # a quarter of an hour on two cores
    python benchmarks/recipe.py --data data/imdb --seconds 10       # a quick look

Each trial has one core and one thread, starts from the recipe of the preset, and changes what its row says. All are measured on the same held-out pairs
with the same masks, at 15 %, whatever the trial masks in training. It prints a table and writes JSON.
"""

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from learn import learn, settings, some_pairs, unigram

from babybert.data.dataset import open_dataset
from babybert.data.pairs import ranges
from babybert.data.table import Examples
from babybert.data.tokenizer import SEP

Changes = dict[str, Any]
# Where the search began, and the first steps away from it; then the recipe it came to, and one change at a time to that.
BEFORE: Changes = {
    "lr": 0.01,
    "decoder_lr_factor": 1.0,
    "embedding_lr_factor": 1.0,
    "decoder_epsilon": 1e-8,
    "dropout": 0.1,
    "batch_size": 64,
}
MINI_BEFORE: Changes = {"decoder_lr_factor": 1.0, "embedding_lr_factor": 1.0, "batch_size": 64}
TRIALS: dict[str, list[Changes]] = {
    "baby": [
        BEFORE,
        BEFORE | {"dropout": 0.0},
        BEFORE | {"dropout": 0.0, "lr": 0.001},
        BEFORE | {"dropout": 0.0, "decoder_epsilon": 1e-3},
        {},
        {"seed": 1},
        {"decoder_epsilon": 1e-8},
        {"decoder_epsilon": 1e-2},
        {"decoder_lr_factor": 10.0},
        {"decoder_lr_factor": 1.0},
        {"lr": 1e-3, "decoder_lr_factor": 100.0},
        {"lr": 5e-3, "decoder_lr_factor": 20.0},
        {"batch_size": 16},
        {"batch_size": 64},
        {"dropout": 0.1},
        {"warmup_fraction": 0.02},
        {"warmup_fraction": 0.3},
        {"schedule": "constant"},
        {"bucketing": False},
        {"init_decoder_bias": False},
        {"lr": 1e-3, "decoder_lr_factor": 30.0},
        {"lr": 5e-4, "decoder_lr_factor": 50.0},
        {"lr": 3e-4, "decoder_lr_factor": 100.0},
        {"lr": 3e-4, "decoder_lr_factor": 30.0},
        {"lr": 5e-4, "decoder_lr_factor": 50.0, "decoder_epsilon": 1e-2},
        {"lr": 5e-4, "decoder_lr_factor": 50.0, "schedule": "constant"},
        {"embedding_lr_factor": 1.0},
        {"embedding_lr_factor": 5.0},
        {"embedding_lr_factor": 50.0},
        {"embedding_lr_factor": 40.0, "lr": 1e-3, "decoder_lr_factor": 100.0},
        {"masked_share": 0.1},
        {"masked_share": 0.25},
        {"masked_share": 0.4},
        {"negatives": "drawn"},
    ],
    "mini": [
        MINI_BEFORE,
        MINI_BEFORE | {"initial_weights": "xavier"},
        MINI_BEFORE | {"lr": 5e-4},
        MINI_BEFORE | {"lr": 2e-3},
        MINI_BEFORE | {"batch_size": 32},
        MINI_BEFORE | {"dropout": 0.1},
        MINI_BEFORE | {"embedding_lr_factor": 3.0},
        MINI_BEFORE | {"decoder_lr_factor": 3.0},
        MINI_BEFORE | {"bucketing": False},
        MINI_BEFORE | {"width": 64},
        MINI_BEFORE | {"width": 192},
        MINI_BEFORE | {"layers": 4},
        {},
        {"lr": 5e-4, "embedding_lr_factor": 6.0, "decoder_lr_factor": 6.0},
        {"lr": 5e-4, "embedding_lr_factor": 6.0, "decoder_lr_factor": 6.0, "batch_size": 64},
        {"lr": 5e-4, "embedding_lr_factor": 12.0, "decoder_lr_factor": 3.0},
        {"masked_share": 0.1},
        {"masked_share": 0.25},
        {"masked_share": 0.4},
        {"negatives": "drawn"},
    ],
}


def main() -> None:
    """Run all trials of a preset, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="prepared IMDB")
    parser.add_argument("--preset", choices=TRIALS, default="baby")
    parser.add_argument("--seconds", type=float, default=50.0, help="training time of each trial")
    parser.add_argument("--pairs", type=int, default=2000, help="held-out pairs to measure on")
    parser.add_argument("--only", type=int, nargs="*", help="trials to run, by their number from 0")
    parser.add_argument("--cores", type=int, default=2, help="trials at once")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/recipe.json"))
    options = parser.parse_args()
    with ProcessPoolExecutor(options.cores, multiprocessing.get_context("spawn"), one_thread) as pool:
        chosen = [
            changes
            for number, changes in enumerate(TRIALS[options.preset])
            if options.only is None or number in options.only
        ]
        found = list(pool.map(partial(trial, options), chosen))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    show(found)


def one_thread() -> None:
    """Of a new process: it has a core to itself."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)


def trial(options: argparse.Namespace, changes: Changes) -> dict[str, Any]:
    """Train with these changes."""
    name = ", ".join(f"{key} {value}" for key, value in changes.items()) or "the recipe"
    dataset = open_dataset(options.data)
    train = drawn_negatives(dataset.examples("train")) if changes.get("negatives") == "drawn" else None
    config = settings(
        options.data, preset=options.preset, **{key: value for key, value in changes.items() if key != "negatives"}
    )
    _, curve = learn(config, dataset, some_pairs(dataset, options.pairs), options.seconds, 2, name, train)
    return {"changes": changes, "name": name, "curve": curve}


def drawn_negatives(examples: Examples) -> Examples:
    """The same pairs, but each negative's B drawn from all sentences, A's and B's (Devlin et al., 2019), in place of other negatives' B's dealt anew."""
    rng = np.random.default_rng(0)
    ids, start, lengths = examples.original_ids(), examples.offsets[:-1], np.diff(examples.offsets)
    with_sep = np.add.reduceat(examples.segments == 2, start, dtype=np.int64)  # B and its [SEP]
    before = lengths - with_sep  # [CLS] A [SEP]
    starts, sizes = np.concatenate([start + 1, start + before]), np.concatenate([before - 2, with_sep - 1])
    drawn = np.where(
        examples.is_next == 1, len(start) + np.arange(len(start)), rng.integers(0, len(starts), len(start))
    )
    size = np.minimum(sizes[drawn], lengths.max() - before - 1)
    offsets = np.concatenate([[0], np.cumsum(before + size + 1)])
    new, segments = np.full(offsets[-1], SEP, np.int32), np.full(offsets[-1], 2, np.int8)
    new[ranges(offsets[:-1], before)], segments[ranges(offsets[:-1], before)] = ids[ranges(start, before)], 1
    new[ranges(offsets[:-1] + before, size)] = ids[ranges(starts[drawn], size)]
    return Examples(new, np.zeros_like(new), segments, offsets, examples.is_next)


def show(found: list[dict[str, Any]]) -> None:
    """The table for the docs, best last scores in bold."""
    best = min(trial["curve"][-1]["mlm_loss"] for trial in found)
    print(
        f"\n| change | pairs | MLM loss | to word counts ({unigram(found[0]['curve']):.3f}) | NSP accuracy |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for trial in found:
        at = trial["curve"][-1]
        loss = f"**{at['mlm_loss']:.3f}**" if at["mlm_loss"] == best else f"{at['mlm_loss']:.3f}"
        print(
            f"| {trial['name']} | {at['seen']:,} | {loss} | {at['mlm_loss'] - at['mlm_unigram_loss']:+.3f} | {at['nsp_accuracy']:.1%} |"
        )


if __name__ == "__main__":
    main()
