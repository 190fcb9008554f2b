"""Compare sizes of the vocabulary: the same reviews, prepared with several, train the same preset.

    for size in 4096 8192 16384; do
        babybert prepare --corpus imdb --source aclImdb_v1.tar.gz --out data/imdb-$size \
            --tokenizer-kind wordpiece --vocab-size $size
    done
    python benchmarks/vocabulary.py --data data/imdb-4096 data/imdb-8192 data/imdb-16384     # an hour on two cores

`--preset mini --train-pairs 120000` takes three quarters of an hour.

The MLM loss of two vocabularies cannot be compared: it is a mean over pieces, and a rare piece is harder to predict.
Words are the same with each vocabulary. So the models are compared by the within-word pseudo-log-likelihood of held-out
sentences (Kauf and Ivanova, 2023), in nats per word. It asks for each piece of a word without the later ones, so the
product over its pieces is the probability of the word, however many there are.

Each training sees the same number of pairs, so the same text, on one core with one thread. A larger vocabulary has
fewer pieces for the same text and more work for each of them; the table has the processor time.
"""

import argparse
import itertools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import CPU, recipe_config, write_json
from recipe import use_one_thread
from timed_training import PairClock, first_held_out, train_for

from babybert.data.dataset import open_dataset
from babybert.data.table import Examples
from babybert.evaluation.pseudo_log_likelihood import score_sentences


def main() -> None:
    """Train and score each dataset with each seed, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="prepared datasets of the same reviews")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--train-pairs", type=int, default=40_000, help="training pairs of each training")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each dataset")
    parser.add_argument("--pairs", type=int, default=1000, help="held-out pairs whose first sentences are scored")
    parser.add_argument("--processes", type=int, default=2, help="trainings that run at the same time")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/vocabulary.json"))
    options = parser.parse_args()
    runs = list(itertools.product(range(options.seeds), options.data))
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"), use_one_thread) as pool:
        results = list(pool.map(partial(train_and_score, options), runs))
    write_json(options.out, results)
    print_table(results)


def train_and_score(options: argparse.Namespace, run: tuple[int, Path]) -> dict[str, Any]:
    """Train with this seed on this dataset, and score the first sentences of its held-out pairs."""
    seed, folder = run
    dataset = open_dataset(folder)
    config = recipe_config(folder, preset=options.preset, seed=seed)
    held_out = first_held_out(dataset, options.pairs)
    clock = PairClock(options.train_pairs, evaluations=4)
    started = time.process_time()
    model, curve = train_for(config, dataset, held_out, clock, f"{dataset.tokenizer.size:,} tokens, seed {seed}")
    seconds = time.process_time() - started

    continues_word_V = dataset.tokenizer.continuation_flags()
    sentences = first_sentences(held_out)
    scores = score_sentences(model, sentences, continues_word_V, CPU, show_progress=False)
    pieces = np.concatenate(sentences)
    words = int(np.count_nonzero(~continues_word_V[pieces]))
    return {
        "vocab_size": dataset.tokenizer.size,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "mean_length": dataset.facts["train"]["mean_length"],
        "words": words,
        "pieces": len(pieces),
        "nats_per_word": -sum(score.within_word_sum for score in scores) / words,
        "curve": curve,
    }


def first_sentences(examples: Examples) -> list[np.ndarray]:
    """The ids of each pair's segment A, unmasked, without special tokens."""
    ids = examples.original_ids()
    starts, ends = examples.offsets[:-1], examples.offsets[1:]
    lengths = [np.count_nonzero(examples.segments[start:end] == 1) for start, end in zip(starts, ends, strict=True)]
    return [ids[start + 1 : start + length - 1] for start, length in zip(starts, lengths, strict=True)]


def print_table(results: list[dict[str, Any]]) -> None:
    """A Markdown table with one row for each vocabulary, and the seeds side by side."""
    print("\n| vocabulary | parameters | pieces per word | pair, pieces | nats per word | NSP accuracy | seconds |")
    print("| ---: | ---: | ---: | ---: | --- | --- | --- |")
    for size in sorted({result["vocab_size"] for result in results}):
        seeds = [result for result in results if result["vocab_size"] == size]
        first = seeds[0]
        cells = (
            f"{size:,}",
            f"{first['parameters']:,}",
            f"{first['pieces'] / first['words']:.3f}",
            f"{first['mean_length']:.1f}",
            ", ".join(f"{result['nats_per_word']:.3f}" for result in seeds),
            ", ".join(f"{result['curve'][-1]['nsp_accuracy']:.1%}" for result in seeds),
            ", ".join(f"{result['seconds']:,.0f}" for result in seeds),
        )
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
