"""Held-out loss by width at equal training time, and the loss that a softmax of limited rank can reach at all.

    python benchmarks/width.py --data data/imdb         # 20 minutes on two cores

The first part trains several widths on the vocabulary of `baby`, each for the same time. Width 10 is `baby`. Wider
models have the shape and the recipe of `mini` (four heads, four hidden units for each value of the width, mimetic
weights) and `baby`'s epsilon for a large vocabulary. The learning rate of the decoder falls with the width, because
one step of all values of a row changes a logit by more.

The second part needs no network. A model of width d computes logits `h W + b` from d values h. So its table of log
probabilities, contexts by words, has rank d + 1 at most (Yang et al., 2018). To measure what this costs, tables of
rank d are fitted to the counts of which of the most frequent words follows which. The contexts have free vectors, so
only the rank limits the fit.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import recipe_config, write_json
from timed_training import Clock, Curve, first_held_out, train_for, unigram_loss
from torch import nn

from babybert.data.dataset import Dataset, open_dataset
from babybert.data.table import Examples
from babybert.data.tokenizer import FIRST_ORDINARY
from babybert.evaluation.bigram_baseline import targets_of
from babybert.evaluation.report import bigram_losses_and_ranks
from babybert.figures import open_pyplot, save_figure

WIDTHS = (10, 32, 64, 128, 256)
EVALUATIONS = 6
FIT_STEPS = 400


def main() -> None:
    """Train by width, fit by rank, print, write JSON and a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="prepared IMDB")
    parser.add_argument("--minutes", type=float, default=3.0, help="training time of each width")
    parser.add_argument("--pairs", type=int, default=2000, help="held-out pairs to score on")
    parser.add_argument("--words", type=int, default=2000, help="number of most frequent words in the fits by rank")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks/width"), help="path of the JSON and the figure, no extension"
    )
    options = parser.parse_args()
    dataset = open_dataset(options.data)
    losses_by_rank = fit_by_rank(dataset, options.words)
    held_out = first_held_out(dataset, options.pairs)
    curves = {width: train_width(width, dataset, held_out, options) for width in WIDTHS}
    bigram_losses_N, _ = bigram_losses_and_ranks(
        dataset.examples("train"), dataset.token_counts(), targets_of(held_out)
    )
    result: dict[str, Any] = {
        "curves": curves,
        "unigram": unigram_loss(curves[10]),
        "bigram": float(bigram_losses_N.mean()),
        "ranks": losses_by_rank,
    }
    json_path = write_json(options.out.with_suffix(".json"), result)
    print_table(result)
    print("written:", *draw(result, options.out), json_path)


def train_width(width: int, dataset: Dataset, held_out: Examples, options: argparse.Namespace) -> Curve:
    """The curve of one width."""
    if width == 10:
        config = recipe_config(options.data, preset="baby")
    else:
        config = recipe_config(
            options.data,
            preset="mini",
            width=width,
            feed_forward=4 * width,
            decoder_epsilon=1e-3,
            decoder_lr_factor=500 / width,
            embedding_lr_factor=6.0,
        )
    _, curve = train_for(config, dataset, held_out, Clock(60 * options.minutes, EVALUATIONS), f"width {width}")
    return curve


def fit_by_rank(dataset: Dataset, words: int) -> dict[str, float]:
    """Loss in nats a word: of the unigram baseline, of the bigram counts, and of a fitted table of each rank."""
    share_LV = bigram_shares(dataset, words)
    unigram_V = share_LV.sum(0)
    row_share_L1 = share_LV.sum(1, keepdim=True)
    occurs_LV = share_LV > 0
    conditional_LV = share_LV / row_share_L1.clamp_min(1e-12)
    losses = {
        "unigram": -float((unigram_V * (unigram_V + 1e-12).log()).sum()),
        "bigram counts": -float((share_LV[occurs_LV] * conditional_LV[occurs_LV].log()).sum()),
    }
    for rank in WIDTHS:
        losses[str(rank)] = _fit(share_LV, rank)
        print(
            f"rank {rank:>3}: {losses[str(rank)]:.3f} nats "
            f"(unigram {losses['unigram']:.3f}, bigram counts {losses['bigram counts']:.3f})",
            flush=True,
        )
    return losses


def bigram_shares(dataset: Dataset, words: int) -> torch.Tensor:
    """For the most frequent words, the share of each (left word, word) among all such bigrams of the training pairs."""
    examples = dataset.examples("train")
    ids = examples.original_ids()
    same_pair = np.ones(len(ids) - 1, bool)
    same_pair[examples.offsets[1:-1] - 1] = False
    left = ids[:-1] - FIRST_ORDINARY  # ids are sorted by frequency
    word = ids[1:] - FIRST_ORDINARY
    frequent = same_pair & (left >= 0) & (left < words) & (word >= 0) & (word < words)
    cells = left[frequent].astype(np.int64) * words + word[frequent]
    counts_LV = np.bincount(cells, minlength=words**2).reshape(words, words)
    return torch.from_numpy(counts_LV / counts_LV.sum()).float()


def _fit(share_LV: torch.Tensor, rank: int) -> float:
    """Cross entropy of the shares under softmax(U W + b), after gradient descent from random U and W."""
    torch.manual_seed(0)
    words = len(share_LV)
    left_LD = nn.Parameter(torch.randn(words, rank) / rank**0.5)
    word_DV = nn.Parameter(torch.randn(rank, words) / rank**0.5)
    bias_V = nn.Parameter((share_LV.sum(0) + 1e-9).log())
    left_share_L = share_LV.sum(1)
    optimizer = torch.optim.Adam([left_LD, word_DV, bias_V], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, FIT_STEPS)
    loss = torch.zeros(())
    for _ in range(FIT_STEPS):
        logits_LV = left_LD @ word_DV + bias_V
        loss = (left_share_L * logits_LV.logsumexp(1)).sum() - (share_LV * logits_LV).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def print_table(result: dict[str, Any]) -> None:
    """The last scores of each width as a Markdown table."""
    print(f"\nunigram baseline {result['unigram']:.3f}, bigram baseline {result['bigram']:.3f}")
    header = ("width", "parameters, millions", "pairs seen", "MLM loss", "minus unigram", "NSP accuracy", "rank alone")
    print(f"| {' | '.join(header)} |")
    print(f"| {' | '.join(['---:'] * len(header))} |")
    for width, curve in result["curves"].items():
        point = curve[-1]
        cells = (
            width,
            f"{2 * width * 0.147161 + 0.147:.0f}",
            f"{point['seen']:,}",
            f"{point['mlm_loss']:.3f}",
            f"{point['mlm_loss'] - point['mlm_unigram_loss']:+.3f}",
            f"{point['nsp_accuracy']:.1%}",
            f"{result['ranks'][str(width)]:.3f}",
        )
        print(f"| {' | '.join(map(str, cells))} |")


def draw(result: dict[str, Any], out: Path) -> list[Path]:
    """Plot the loss by time and by pairs for each width, and the loss that each rank allows."""
    pyplot = open_pyplot()
    figure, (by_time, by_pairs, by_rank) = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    _draw_curves(by_time, result, "seconds")
    by_time.set(title="equal time", xlabel="seconds of training")
    by_time.legend(fontsize="small")
    _draw_curves(by_pairs, result, "seen")
    by_pairs.set(title="the same by pairs", xlabel="pairs seen", xscale="log")

    losses = result["ranks"]
    by_rank.plot(WIDTHS, [losses[str(width)] for width in WIDTHS], "o-", label="best table of this rank")
    by_rank.axhline(losses["unigram"], color="black", linestyle="--", linewidth=1, label="unigram baseline")
    by_rank.axhline(losses["bigram counts"], color="tab:green", linestyle=":", label="counts of the left neighbour")
    by_rank.set(xscale="log", xlabel="rank", ylabel="nats a word, frequent words only", title="rank alone")
    by_rank.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
    by_rank.legend(fontsize="small")
    return save_figure(pyplot, figure, out)


def _draw_curves(axis: Any, result: dict[str, Any], x: str) -> None:
    for width, curve in result["curves"].items():
        points = curve if x == "seconds" else curve[1:]  # 0 pairs cannot be shown on a logarithmic axis
        axis.plot([point[x] for point in points], [point["mlm_loss"] for point in points], ".-", label=f"width {width}")
    axis.axhline(result["unigram"], color="black", linestyle="--", linewidth=1, label="unigram baseline")
    axis.set(ylabel="held-out MLM loss, nats")


if __name__ == "__main__":
    main()
