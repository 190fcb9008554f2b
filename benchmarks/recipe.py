"""Which settings learn best in a given time: one change at a time to a recipe, each trained as long as all others.

    python benchmarks/recipe.py --data data/imdb                    # 25 minutes on two cores
    python benchmarks/recipe.py --data data/imdb --seconds 10       # a quick look

Each trial starts from the settings at the top and changes what its row says. All are measured on the same held-out pairs
with the same masks, at 15 %, whatever the trial masks in training. It prints a table and writes JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from learn import learn, settings, some_pairs, unigram

from babybert.data.dataset import open_dataset

Changes = dict[str, Any]
# What training was before the search, and what it found, step by step; then one change at a time to that.
BEFORE: Changes = {"lr": 0.01, "decoder_lr_factor": 1.0, "decoder_epsilon": 1e-8, "dropout": 0.1}
TRIALS: dict[str, list[Changes]] = {
    "baby": [
        BEFORE,
        BEFORE | {"dropout": 0.0},
        BEFORE | {"dropout": 0.0, "lr": 0.001},
        BEFORE | {"dropout": 0.0, "decoder_epsilon": 1e-3},
        {},
        {"decoder_epsilon": 1e-8},
        {"decoder_epsilon": 1e-4},
        {"decoder_epsilon": 1e-2},
        {"decoder_lr_factor": 10.0},
        {"decoder_lr_factor": 100.0},
        {"lr": 3e-4},
        {"lr": 3e-3},
        {"batch_size": 16},
        {"batch_size": 32},
        {"batch_size": 128},
        {"dropout": 0.1},
        {"warmup_fraction": 0.02},
        {"schedule": "cosine"},
        {"schedule": "constant"},
        {"weight_decay": 0.0},
        {"clip_norm": 10.0},
        {"masking": "static"},
        {"bucketing": False},
        {"init_decoder_bias": False},
        {"seed": 1},
        {"seed": 2},
    ],
}


def main() -> None:
    """Run all trials of a preset, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="prepared IMDB")
    parser.add_argument("--preset", choices=TRIALS, default="baby")
    parser.add_argument("--seconds", type=float, default=50.0, help="training time of each trial")
    parser.add_argument("--pairs", type=int, default=2000, help="held-out pairs to measure on")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/recipe.json"))
    options = parser.parse_args()
    dataset = open_dataset(options.data)
    held_out, found = some_pairs(dataset, options.pairs), []
    for changes in TRIALS[options.preset]:
        name = ", ".join(f"{key} {value}" for key, value in changes.items()) or "the recipe"
        config = settings(options.data, preset=options.preset, **changes)
        _, curve = learn(config, dataset, held_out, options.seconds, 2, name)
        found.append({"changes": changes, "name": name, "curve": curve})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    show(found)


def show(found: list[dict[str, Any]]) -> None:
    """The table for the docs, best last scores in bold."""
    best = min(trial["curve"][-1]["mlm_loss"] for trial in found)
    print(f"\n| change | pairs | MLM loss | to word counts ({unigram(found[0]['curve']):.3f}) | NSP accuracy |\n| --- | ---: | ---: | ---: | ---: |")
    for trial in found:
        at = trial["curve"][-1]
        loss = f"**{at['mlm_loss']:.3f}**" if at["mlm_loss"] == best else f"{at['mlm_loss']:.3f}"
        print(f"| {trial['name']} | {at['pairs']:,} | {loss} | {at['mlm_loss'] - at['mlm_unigram_loss']:+.3f} | {at['nsp_accuracy']:.1%} |")


if __name__ == "__main__":
    main()
