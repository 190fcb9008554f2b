"""Held-out loss by width at equal time, and how much of the language of neighbours a softmax of so small a rank could hold at all.

    python benchmarks/width.py --data data/imdb         # 20 minutes on two cores

The first part trains several widths on the vocabulary of `baby`, each for the same time: width 10 is `baby`; wider ones have the shape and the
recipe of `mini` (four heads, four hidden units a number, mimetic weights) and of `baby` what a large vocabulary needs. The decoder's rate
falls as the width grows, because a step of all of a row's numbers moves a logit by so much more.

The second part needs no network. A model of width d has logits `h W + b` with h of d numbers: the table of log probabilities, context by
word, has rank d + 1 at most (Yang et al., 2018). How much does that cost? It takes the most frequent words, the counts of which
follows which, and fits tables of rank d to them directly: contexts are vectors of their own, so nothing but the rank is in the way.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learn import learn, settings, some_pairs, unigram
from torch import nn

from babybert.data.dataset import Dataset, open_dataset
from babybert.data.tokenizer import FIRST_ORDINARY
from babybert.evaluation.bigram_baseline import targets_of
from babybert.evaluation.report import bigram_losses_and_ranks
from babybert.figures import open_pyplot, save_figure

WIDTHS = (10, 32, 64, 128, 256)
FIT_STEPS = 400


def main() -> None:
    """Train by width, fit by rank, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="prepared IMDB")
    parser.add_argument("--minutes", type=float, default=3.0, help="training time of each width")
    parser.add_argument("--pairs", type=int, default=2000, help="held-out pairs to measure on")
    parser.add_argument("--words", type=int, default=2000, help="most frequent words, of the fits by rank")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmarks/width"),
        help="the JSON's and the picture's name, without an ending",
    )
    options = parser.parse_args()
    dataset = open_dataset(options.data)
    ranks = by_rank(dataset, options.words)
    held_out = some_pairs(dataset, options.pairs)
    curves = {}
    for width in WIDTHS:
        own = {
            "width": width,
            "feed_forward": 4 * width,
            "decoder_epsilon": 1e-3,
            "decoder_lr_factor": 500 / width,
            "embedding_lr_factor": 6.0,
        }
        config = settings(options.data, preset="baby") if width == 10 else settings(options.data, preset="mini", **own)
        _, curves[width] = learn(config, dataset, held_out, 60 * options.minutes, 6, f"width {width}")
    bigram = float(
        bigram_losses_and_ranks(dataset.examples("train"), dataset.token_counts(), targets_of(held_out))[0].mean()
    )
    result: dict[str, Any] = {"curves": curves, "unigram": unigram(curves[10]), "bigram": bigram, "ranks": ranks}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    print("written:", *draw(result, options.out), options.out.with_suffix(".json"))


def by_rank(dataset: Dataset, words: int) -> dict[str, float]:
    """Nats a word, of the counts themselves, of word frequencies, and of the best table of each rank that was found."""
    examples = dataset.examples("train")
    ids = examples.original_ids()
    inside = np.ones(len(ids) - 1, bool)
    inside[examples.offsets[1:-1] - 1] = False
    left, word = ids[:-1] - FIRST_ORDINARY, ids[1:] - FIRST_ORDINARY  # ids are by frequency
    keep = inside & (left >= 0) & (left < words) & (word >= 0) & (word < words)
    counts = np.bincount(left[keep].astype(np.int64) * words + word[keep], minlength=words**2).reshape(words, words)
    share_LV = torch.from_numpy(counts / counts.sum()).float()
    own, word_share = share_LV[share_LV > 0], share_LV.sum(0)
    row_L1 = share_LV.sum(1, keepdim=True)
    found = {
        "word counts": -float((word_share * (word_share + 1e-12).log()).sum()),
        "neighbour": -float((own * (share_LV / row_L1.clamp_min(1e-12))[share_LV > 0].log()).sum()),
    }
    for rank in WIDTHS:
        found[str(rank)] = _fit(share_LV, rank)
        print(
            f"rank {rank:>3}: {found[str(rank)]:.3f} nats (word counts {found['word counts']:.3f}, the neighbour's own counts {found['neighbour']:.3f})",
            flush=True,
        )
    return found


def _fit(share_LV: torch.Tensor, rank: int) -> float:
    """Cross entropy of the counts under softmax(U W + b), after gradient descent from random U and W."""
    torch.manual_seed(0)
    size = len(share_LV)
    left_LD, word_DV = (
        nn.Parameter(torch.randn(size, rank) / rank**0.5),
        nn.Parameter(torch.randn(rank, size) / rank**0.5),
    )
    bias_V = nn.Parameter((share_LV.sum(0) + 1e-9).log())
    weight_L = share_LV.sum(1)
    optimizer = torch.optim.Adam([left_LD, word_DV, bias_V], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, FIT_STEPS)
    loss = torch.zeros(())
    for _ in range(FIT_STEPS):
        logits_LV = left_LD @ word_DV + bias_V
        loss = (weight_L * logits_LV.logsumexp(1)).sum() - (share_LV * logits_LV).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def show(result: dict[str, Any]) -> None:
    """The table for the docs."""
    print(f"\nword counts {result['unigram']:.3f}, two neighbours {result['bigram']:.3f}")
    print(
        "| width | parameters, millions | pairs seen | MLM loss | to word counts | NSP accuracy | a table of this rank |\n| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for width, curve in result["curves"].items():
        at = curve[-1]
        million = 2 * width * 0.147161 + 0.147
        gain = at["mlm_loss"] - at["mlm_unigram_loss"]
        print(
            f"| {width} | {million:.0f} | {at['seen']:,} | {at['mlm_loss']:.3f} | {gain:+.3f} | {at['nsp_accuracy']:.1%} | {result['ranks'][str(width)]:.3f} |"
        )


def draw(result: dict[str, Any], out: Path) -> list[Path]:
    """Loss by time and by pairs for each width; and what rank alone costs."""
    pyplot = open_pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, what in ((axes[0], "seconds"), (axes[1], "seen")):
        for width, curve in result["curves"].items():
            looks = [
                at for at in curve if at["seen"] or what == "seconds"
            ]  # 0 pairs have no place on a logarithmic axis
            axis.plot([at[what] for at in looks], [at["mlm_loss"] for at in looks], ".-", label=f"width {width}")
        axis.axhline(result["unigram"], color="black", linestyle="--", linewidth=1, label="word counts")
        axis.set(
            xlabel={"seconds": "seconds of training", "seen": "pairs seen"}[what], ylabel="held-out MLM loss, nats"
        )
    axes[0].set_title("equal time")
    axes[1].set_title("the same by pairs")
    axes[1].set_xscale("log")
    axes[0].legend(fontsize="small")
    ranks = result["ranks"]
    axes[2].plot(WIDTHS, [ranks[str(width)] for width in WIDTHS], "o-", label="best table of this rank")
    axes[2].axhline(ranks["word counts"], color="black", linestyle="--", linewidth=1, label="word counts")
    axes[2].axhline(ranks["neighbour"], color="tab:green", linestyle=":", label="the counts of the left neighbour")
    axes[2].set(
        xscale="log", xlabel="rank", ylabel="nats a word, frequent words only", title="what the rank alone allows"
    )
    axes[2].set_xticks(WIDTHS, [str(width) for width in WIDTHS])
    axes[2].legend(fontsize="small")
    return save_figure(pyplot, figure, out)


if __name__ == "__main__":
    main()
