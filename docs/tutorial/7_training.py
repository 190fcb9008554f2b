# %% [markdown]
# # 7. Training
#
# Training repeats one step: take a batch of pairs, compute the loss, compute how each parameter would have to change
# to make the loss smaller (the *gradient*), and change all parameters a little. This chapter trains for half a minute
# and then looks at what the model has learned.

# %%
import shutil
from pathlib import Path

import numpy as np
import torch
import tutorial

from babybert.checkpoint.format import find_checkpoint, load_model
from babybert.checkpoint.metrics_log import read_metrics
from babybert.cli import main
from babybert.config import PretrainConfig
from babybert.data.loader import DynamicMasking, Loader
from babybert.evaluation.look import SENTENCES, attention_weights, fill_ins, neighbours
from babybert.evaluation.report_figures import plot_attention
from babybert.model.bert import BabyBert
from babybert.model.loss import LossSums, PretrainingModel
from babybert.training.optimizer import make_optimizer
from babybert.training.setup import new_model

dataset = tutorial.open_data()
tokenizer = dataset.tokenizer

# %% [markdown]
# ## One step by hand
#
# Take a batch of 64 pairs and compute the loss. PyTorch computes the gradient. If the gradient is longer than 1, it
# is scaled down to length 1. Adam then updates the parameters. Afterwards the loss on the same batch is smaller. On
# other batches it may not be.

# %%
config = PretrainConfig(data=dataset.folder, preset="baby", lr=1e-3)
torch.manual_seed(0)
bert = new_model(config, config.sizes(tokenizer.size), dataset.token_counts())
model, optimizer = PretrainingModel(bert), make_optimizer(bert, config)
batch = next(Loader(dataset.examples("train"), 64, seed=0, masking=DynamicMasking(tokenizer.size, seed=0)).epoch(0))

before = LossSums.of(model(*batch)).loss
before.backward()
gradient_norm = torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
optimizer.step()
with torch.no_grad():
    after = LossSums.of(model(*batch)).loss
print(f"loss {before:.4f}, length of the gradient {gradient_norm:.3f}, loss after the step {after:.4f}")
assert after < before

# %% [markdown]
# ## Half a minute of training
#
# The training loop is one function, [`_train`](../../babybert/training/train.py). The learning rate rises over the
# first steps (warm-up), because the first gradients of a new model are unreliable. The loop measures the loss on
# held-out pairs and saves checkpoints. We run the same command that a user runs, with the sizes of the reference
# model:


# %%
def train(arguments: list[str]) -> None:
    shutil.rmtree(arguments[arguments.index("--out") + 1], ignore_errors=True)
    print("$ babybert", *arguments, "\n")
    assert main(arguments) == 0


train(tutorial.pretrain_arguments("baby", 25))

# %% [markdown]
# We also train for ten seconds on a simpler language: the *generated* reviews that come with the package. They use
# 204 words and a strict grammar. This model is wider (64 values for each token), which is affordable because the
# vocabulary is small.

# %%
demo = tutorial.open_data("demo")
train(tutorial.pretrain_arguments("tiny", 10, "demo"))

# %% [markdown]
# ## The curves
#
# The points are training losses, each the mean of five steps, with a running mean. The diamond is the loss on
# held-out pairs at the end. Compare the diamond with the dashed line, the unigram baseline on the same held-out
# words. (Training batches contain other words, which may be easier or harder.) Training starts at the unigram
# baseline, because it is the initial bias of the decoder (chapter 6). Everything below the line was learned from
# context.

# %%
runs = ((tutorial.run_folder("baby"), tutorial.corpus_name()), (tutorial.run_folder("tiny", "demo"), "generated"))
objectives = (
    ("mlm", "masked words", "mlm_unigram_loss", "unigram baseline"),
    ("nsp", "next sentence", "nsp_chance_loss", "chance"),
)
figure, axes = tutorial.pyplot.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
for row, (folder, name) in enumerate(runs):
    lines = read_metrics(folder / "metrics.jsonl")
    train_lines = [line for line in lines if line["split"] == "train"]
    held_out = [line for line in lines if line["split"] == "validation"][-1]
    steps = np.array([line["step"] for line in train_lines])
    for axis, (objective, title, baseline, baseline_name) in zip(axes[row], objectives, strict=True):
        values = np.array([line[f"{objective}_loss"] for line in train_lines])
        window = max(1, len(values) // 8)
        axis.plot(steps, values, ".", alpha=0.4, color="tab:blue")
        mean = np.convolve(values, np.full(window, 1 / window), "valid")
        axis.plot(steps[window // 2 :][: len(mean)], mean, color="tab:blue", label="training")
        axis.plot(held_out["step"], held_out[f"{objective}_loss"], "D", color="black", label="held out")
        axis.axhline(held_out[baseline], color="tab:orange", linestyle="--", label=baseline_name)
        axis.set(title=f"{name}: {title}", xlabel="step", ylabel="nats")
    axes[row, 0].axhline(held_out["mlm_chance_loss"], color="gray", linestyle=":", label="uniform distribution")
    axes[row, 0].set_ylim(0)
    axes[row, 1].set_ylim(0, 1)
    axes[row, 0].legend(fontsize="small")
    axes[row, 1].legend(fontsize="small")
    assert held_out["mlm_loss"] < held_out["mlm_chance_loss"]
tutorial.show(figure, "7_training")

# %% [markdown]
# On real reviews, half a minute of training with a width of ten is very little. Expect the diamond near the unigram
# baseline. On the generated reviews the same code gets below the baseline within seconds, so the training loop works.
# The two runs differ in the language and in the width. (If you run this chapter without an archive, both models read
# generated reviews, and only the width differs.) The NSP loss falls last: NSP compares words of two sentences, which
# needs meaningful token embeddings first. [learning.md](../learning.md) has longer runs, and
# [evaluation.md](../evaluation.md) explains the baselines.
#
# ## Filling in masked words
#
# For each sentence the output shows the model's five most likely words, and the rank that it gives to words that fit.
# The number in brackets is the word's rank by frequency. If the model predicts the same words for all sentences, and
# the ranks are those in brackets, it has only learned the unigram distribution and ignores the sentence.

# %%
DEMO_SENTENCES = (
    ("the sheriff rides with a revolver near the [MASK] .", ("saloon", "desert", "canyon")),
    ("mary hides in the graveyard , and the ghosts take [MASK] candle .", ("her",)),
    ("i enjoyed the planet and the pilot : [MASK] out of ten .", ("nine", "ten")),
)


def load(run: Path) -> BabyBert:
    return load_model(find_checkpoint(run))[0].eval()


bert, demo_bert = load(tutorial.run_folder("baby")), load(tutorial.run_folder("tiny", "demo"))
for model, vocabulary, sentences in ((bert, tokenizer, SENTENCES[:6]), (demo_bert, demo.tokenizer, DEMO_SENTENCES)):
    for prediction in fill_ins(model, vocabulary, sentences):
        ranks = ", ".join(
            f"{word['word']} {word['rank']:,} ({word['vocabulary_place'] - 4:,})"
            for word in prediction["sensible"]
            if word["rank"]
        )
        print(f"{prediction['text']}\n    fills in: {' '.join(prediction['fills'])}\n    fits:     {ranks}")
    print()

# %% [markdown]
# ## Nearest token embeddings
#
# Words that appear in the same contexts should get embeddings that point in the same direction. For some words, the
# nearest words by cosine similarity among the 2,000 most frequent:

# %%
for model, vocabulary, words in (
    (bert, tokenizer, ("good", "movie", "he", "was")),
    (demo_bert, demo.tokenizer, ("sheriff", "mary", "superb", "three")),
):
    for entry in neighbours(model, vocabulary, words, 2000):
        print(f"{entry['word']:<8}", ", ".join(f"{near['word']} {near['cosine']:.2f}" for near in entry["neighbours"]))
    print()

# %% [markdown]
# Fill-ins can become sensible well before these lists do.
#
# ## Attention
#
# The plot of chapter 5, for two heads in each layer of the model trained on generated reviews. Look for blocks:
# inside a block the words of one sentence attend to each other, and the segments tell the model which words those
# are. For NSP, some tokens must attend to the other block. Attention shows where information may flow, not why the
# model gives an answer.

# %%
pair, segments = map(torch.from_numpy, tutorial.example_pair(demo))
weights_LHTT = attention_weights(demo_bert, pair[None], segments[None])[:, 0].numpy()
png, svg = plot_attention(demo.tokenizer.tokens(pair.tolist()), weights_LHTT[:, :2], tutorial.FIGURES / "7_attention")
svg.unlink()
tutorial.show_file(png)

# %% [markdown]
# **In the package:** [`pretrain`](../../babybert/training/train.py), [`Loader`](../../babybert/data/loader.py),
# [`make_optimizer`](../../babybert/training/optimizer.py), [`learning_rate`](../../babybert/training/lr_schedule.py),
# [`evaluate_held_out`](../../babybert/evaluation/scores.py),
# [`CheckpointManager`](../../babybert/checkpoint/manager.py), [`fill_ins`](../../babybert/evaluation/look.py),
# [`neighbours`](../../babybert/evaluation/look.py). `babybert look` prints more fill-ins and neighbours,
# `babybert plot` draws the curves of whole runs, and `babybert evaluate` measures with confidence intervals.
#
# Next: [8. Serving](8_serving.md)
