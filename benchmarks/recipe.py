"""Compare settings of a preset's recipe: each trial changes one setting and trains for the same time.

    python benchmarks/recipe.py --data data/imdb                    # a quarter of an hour on two cores
    python benchmarks/recipe.py --data data/imdb --seconds 10       # a quick look
    python benchmarks/recipe.py --data data/imdb-wordpiece --preset small --tokens 5e6   # two hours
    python benchmarks/recipe.py --data data/imdb-wordpiece --preset small --tokens 8e6 --device cuda --processes 8

On a CPU each trial runs on one core with one thread; a GPU is shared by several trials. With `--tokens` the trials see
the same number of tokens, whatever their speed, so other work on the machine does not matter; the table has their
speed. A trial starts from the recipe of the preset and applies the changes of its row. All trials are scored on the
same held-out pairs with the same masks, at 15 %, whatever share the trial masks in training. Prints a table and writes
JSON.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from common import recipe_config, write_json
from timed_training import Clock, PairClock, first_held_out, train_for, unigram_loss

from babybert.data.dataset import open_dataset
from babybert.data.loader import NO_LABEL
from babybert.data.pairs import ranges
from babybert.data.table import Examples
from babybert.data.tokenizer import SEP

Changes = dict[str, Any]
# The settings before the search for a recipe. The first trials of a preset start from them, the others from its recipe.
BEFORE: Changes = {
    "lr": 0.01,
    "decoder_lr_factor": 1.0,
    "embedding_lr_factor": 1.0,
    "decoder_epsilon": 1e-8,
    "dropout": 0.1,
    "batch_size": 64,
}
MINI_BEFORE: Changes = {"decoder_lr_factor": 1.0, "embedding_lr_factor": 1.0, "batch_size": 64}
SMALL_BEFORE: Changes = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "masked_share": 0.15,
    "batch_size": 64,
}
# Changes that are no settings of `babybert pretrain`: how negatives are drawn, whether pairs have labels, and into how
# many steps the batches of the first half are split.
NOT_SETTINGS = ("negatives", "nsp", "batch_growth")
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
    "small": [
        SMALL_BEFORE,
        SMALL_BEFORE | {"seed": 1},
        SMALL_BEFORE | {"masked_share": 0.3},
        SMALL_BEFORE | {"optimizer": "muon", "lr": 3e-3},
        {"batch_size": 64},
        {"batch_size": 64, "seed": 1},
        {},
        {"masked_share": 0.4},
        {"lr": 1.5e-3},
        {"lr": 6e-3},
        {"initial_weights": "mimetic"},
        {"tie_decoder": True},
        {"warmup_fraction": 0.03},
        {"seed": 1},
        {"masked_share": 0.15},
        {"masked_share": 0.4, "seed": 1},
        {"whole_word_masking": True},
        {"nsp": "none"},
        {"nsp": "none", "seed": 1},
        {"batch_size": 256},
        {"batch_growth": 4},
        {"batch_growth": 4, "seed": 1},
        {"schedule": "constant"},
        {"schedule": "cosine"},
        {"tie_decoder": True, "seed": 1},
        {"optimizer": "adamw", "lr": 1e-3},
        {"optimizer": "adamw", "lr": 2e-3},
        {"whole_word_masking": True, "seed": 1},
        {"batch_size": 32},
    ],
    "medium": [
        {},
        {"lr": 1e-3},
        {"lr": 4e-3},
        {"batch_size": 64},
        {"masked_share": 0.15},
        {"optimizer": "adamw", "lr": 1e-3},
        {"seed": 1},
        {"lr": 1e-3, "seed": 1},
        {"lr": 4e-3, "seed": 1},
        {"batch_size": 64, "seed": 1},
    ],
}


def main() -> None:
    """Run all trials of a preset, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="prepared IMDB")
    parser.add_argument("--preset", choices=TRIALS, default="baby")
    parser.add_argument("--seconds", type=float, default=50.0, help="training time of each trial")
    parser.add_argument("--tokens", type=float, help="training tokens of each trial, in place of --seconds")
    parser.add_argument("--pairs", type=int, default=2000, help="held-out pairs to score on")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the trials to run, from 0")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the trials run")
    parser.add_argument("--processes", type=int, default=2, help="trials that run at the same time")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/recipe.json"))
    options = parser.parse_args()
    trials = TRIALS[options.preset]
    chosen = range(len(trials)) if options.only is None else options.only
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"), use_one_thread) as pool:
        results = list(pool.map(partial(run_trial, options), [trials[trial] for trial in chosen]))
    write_json(options.out, results)
    print_table(results)


def use_one_thread() -> None:
    """Limit a worker process to one thread."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)


def run_trial(options: argparse.Namespace, changes: Changes) -> dict[str, Any]:
    """Train with these changes, and return the curve."""
    name = ", ".join(f"{key} {value}" for key, value in changes.items()) or "the recipe"
    overrides = {key: value for key, value in changes.items() if key not in NOT_SETTINGS}
    config = recipe_config(options.data, preset=options.preset, device=options.device, **overrides)
    dataset = open_dataset(options.data)
    train = dataset.examples("train")
    if changes.get("negatives") == "drawn":
        train = drawn_negatives(train)
    if changes.get("nsp") == "none":
        train = replace(train, is_next=np.full_like(train.is_next, NO_LABEL))
    held_out = first_held_out(dataset, options.pairs)
    clock = Clock(options.seconds, evaluations=2)
    if options.tokens:
        clock = PairClock(round(options.tokens / dataset.facts["train"]["mean_length"]), evaluations=4)
    started = time.process_time()
    _, curve = train_for(config, dataset, held_out, clock, name, train, changes.get("batch_growth", 1))
    seconds = time.process_time() - started  # of this process: other work on the core does not count
    return {"changes": changes, "name": name, "curve": curve, "seconds": seconds}


def drawn_negatives(examples: Examples) -> Examples:
    """The same pairs, but the B of each negative is drawn from all sentences, A's and B's (Devlin et al., 2019).

    `babybert prepare` shuffles the B's of the negatives among themselves instead.
    """
    rng = np.random.default_rng(0)
    ids = examples.original_ids()
    pair_start, pair_length = examples.offsets[:-1], np.diff(examples.offsets)
    pairs = len(pair_start)
    b_length = np.add.reduceat(examples.segments == 2, pair_start, dtype=np.int64)  # B and its [SEP]
    a_length = pair_length - b_length  # [CLS] A [SEP]

    # All sentences without special tokens, first the A's and then the B's, and for each pair the index of its new B.
    sentence_start = np.concatenate([pair_start + 1, pair_start + a_length])
    sentence_length = np.concatenate([a_length - 2, b_length - 1])
    same_b = pairs + np.arange(pairs)
    new_b = np.where(examples.is_next == 1, same_b, rng.integers(0, len(sentence_start), pairs))
    new_b_length = np.minimum(sentence_length[new_b], pair_length.max() - a_length - 1)

    offsets = np.concatenate([[0], np.cumsum(a_length + new_b_length + 1)])
    new_ids = np.full(offsets[-1], SEP, np.int32)
    segments = np.full(offsets[-1], 2, np.int8)
    a_positions = ranges(offsets[:-1], a_length)
    new_ids[a_positions] = ids[ranges(pair_start, a_length)]
    segments[a_positions] = 1
    b_positions = ranges(offsets[:-1] + a_length, new_b_length)
    new_ids[b_positions] = ids[ranges(sentence_start[new_b], new_b_length)]
    return Examples(new_ids, np.zeros_like(new_ids), segments, offsets, examples.is_next)


def print_table(results: list[dict[str, Any]]) -> None:
    """A Markdown table of the last scores, with the lowest loss in bold."""
    best = min(result["curve"][-1]["mlm_loss"] for result in results)
    unigram = unigram_loss(results[0]["curve"])
    print(
        f"\n| change | pairs | MLM loss | minus unigram baseline ({unigram:.3f}) | NSP accuracy | processor seconds |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for result in results:
        point = result["curve"][-1]
        loss = f"{point['mlm_loss']:.3f}"
        if point["mlm_loss"] == best:
            loss = f"**{loss}**"
        difference = point["mlm_loss"] - point["mlm_unigram_loss"]
        print(
            f"| {result['name']} | {point['seen']:,} | {loss} | {difference:+.3f} | {point['nsp_accuracy']:.1%} | "
            f"{result['seconds']:,.0f} |"
        )


if __name__ == "__main__":
    main()
