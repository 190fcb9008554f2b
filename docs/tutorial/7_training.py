# %% [markdown]
# # 7. Training, and what it learned
#
# Training repeats one step: take a batch of pairs, compute the loss, find out how each parameter would have to change to
# make it smaller (the *gradient*), and change all a little. This chapter does that for half a minute and then looks
# at what was learned.

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
from babybert.training.train import load_or_create, make_optimizer

dataset = tutorial.open_data()
tokenizer = dataset.tokenizer

# %% [markdown]
# ## One step, by hand
#
# A batch of 64 pairs; the loss; the gradient, which PyTorch works out; its length cut to 1 if it is longer; a step of Adam.
# The loss on the same batch is smaller afterwards. On other batches it need not be.

# %%
config = PretrainConfig(data=dataset.folder, preset="baby", lr=1e-3)
torch.manual_seed(0)
bert = load_or_create(config, dataset, dataset.token_counts(), None).eval()  # eval: without dropout, to compare
model, optimizer = PretrainingModel(bert), make_optimizer(bert, config)
batch = next(Loader(dataset.examples("train"), 64, seed=0, masking=DynamicMasking(tokenizer.size, seed=0)).epoch(0))

before = LossSums.of(model(*batch)).loss
before.backward()
length = torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
optimizer.step()
with torch.no_grad():
    after = LossSums.of(model(*batch)).loss
print(f"loss {before.item():.4f}, length of the gradient {length.item():.3f}, loss after the step {after.item():.4f}")
assert after < before

# %% [markdown]
# ## Half a minute of it
#
# The whole loop is one function, [`_train`](../../babybert/training/trainer.py). It climbs to its learning rate over the
# first steps (a new model's gradients point anywhere), measures itself on held-out pairs, and saves checkpoints. The
# command is the user's own; the model has the reference's sizes:


# %%
def train(arguments: list[str]) -> None:
    shutil.rmtree(arguments[arguments.index("--out") + 1], ignore_errors=True)
    print("$ babybert", *arguments, "\n")
    assert main(arguments) == 0


train(tutorial.training("baby", 25))

# %% [markdown]
# And the same loop for ten seconds on an easier language: the *generated* reviews that come with the package, with 204 words and
# a strict grammar. The model is wider (64 numbers a token), which so small a vocabulary can afford.

# %%
easy = tutorial.open_data("demo")
train(tutorial.training("tiny", 10, "demo"))

# %% [markdown]
# ## The curves
#
# Points are the training losses, each the mean of five steps, with a running mean; the diamond is the loss on
# held-out pairs at the end. Compare the diamond with the dashed line, which is what word counts pay for the same held-out words
# (training batches have other words, easier or harder). Word counts come free, as the bias that training starts from
# (chapter 6). What lies below has been learned from context.

# %%
ours, generated = (
    read_metrics(folder / "metrics.jsonl")
    for folder in (tutorial.run_folder("baby"), tutorial.run_folder("tiny", "demo"))
)
figure, axes = tutorial.pyplot.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
for row, lines, name in ((0, ours, tutorial.corpus_name()), (1, generated, "generated")):
    train_lines = [line for line in lines if line["split"] == "train"]
    held_out = [line for line in lines if line["split"] == "validation"][-1]
    steps = np.array([line["step"] for line in train_lines])
    for axis, objective, known in ((axes[row, 0], "mlm", "mlm_unigram_loss"), (axes[row, 1], "nsp", "nsp_chance_loss")):
        values = np.array([line[f"{objective}_loss"] for line in train_lines])
        width = max(1, len(values) // 8)
        axis.plot(steps, values, ".", alpha=0.4, color="tab:blue")
        mean = np.convolve(values, np.full(width, 1 / width), "valid")
        axis.plot(steps[width // 2 :][: len(mean)], mean, color="tab:blue", label="training")
        axis.plot(held_out["step"], held_out[f"{objective}_loss"], "D", color="black", label="held out")
        axis.axhline(
            held_out[known], color="tab:orange", linestyle="--", label="word counts" if objective == "mlm" else "a coin"
        )
        axis.set(
            title=f"{name}: {'masked words' if objective == 'mlm' else 'next sentence'}", xlabel="step", ylabel="nats"
        )
    axes[row, 0].axhline(held_out["mlm_chance_loss"], color="gray", linestyle=":", label="all words alike")
    axes[row, 0].set_ylim(0)
    axes[row, 1].set_ylim(0, 1)
    axes[row, 0].legend(fontsize="small")
    axes[row, 1].legend(fontsize="small")
    assert held_out["mlm_loss"] < held_out["mlm_chance_loss"]
tutorial.show(figure, "7_training")

# %% [markdown]
# On real reviews, half a minute with ten numbers a token is very little: expect the diamond near the line of word counts. On
# the generated ones the same code leaves the line within seconds, so it is not the loop that does not work. Two things
# differ, the language and the width. (Run this chapter without an archive: then both models read generated reviews, and
# only the width differs.) Next sentence comes last: it has to compare words across two sentences, which takes word vectors
# that mean something. Longer runs are in [learning.md](../learning.md), and what they are measured against in
# [evaluation.md](../evaluation.md).
#
# ## What they fill in
#
# For each sentence: the model's five favourites, and the rank that it gives to words that fit; in brackets the rank
# by frequency alone. If all sentences get the same favourites, and the ranks are those in brackets, a model tells
# word counts and does not look at the sentence.

# %%
GENERATED = (
    ("the sheriff rides with a revolver near the [MASK] .", ("saloon", "desert", "canyon")),
    ("mary hides in the graveyard , and the ghosts take [MASK] candle .", ("her",)),
    ("i enjoyed the planet and the pilot : [MASK] out of ten .", ("nine", "ten")),
)


def load(run: Path) -> BabyBert:
    return load_model(find_checkpoint(run))[0].eval()


bert, easy_bert = load(tutorial.run_folder("baby")), load(tutorial.run_folder("tiny", "demo"))
for model, vocabulary, sentences in ((bert, tokenizer, SENTENCES[:6]), (easy_bert, easy.tokenizer, GENERATED)):
    for found in fill_ins(model, vocabulary, sentences):
        ranks = ", ".join(
            f"{word['word']} {word['rank']:,} ({word['vocabulary_place'] - 4:,})"
            for word in found["sensible"]
            if word["rank"]
        )
        print(f"{found['text']}\n    fills in: {' '.join(found['fills'])}\n    fits:     {ranks}")
    print()

# %% [markdown]
# ## Which words they hold for alike
#
# Words that stand in the same places should get vectors that point the same way. The nearest ones (cosine), among the 2,000
# most frequent words:

# %%
for model, vocabulary, words in (
    (bert, tokenizer, ("good", "movie", "he", "was")),
    (easy_bert, easy.tokenizer, ("sheriff", "mary", "superb", "three")),
):
    for entry in neighbours(model, vocabulary, words, 2000):
        print(f"{entry['word']:<8}", ", ".join(f"{near['word']} {near['cosine']:.2f}" for near in entry["neighbours"]))
    print()

# %% [markdown]
# Fill-ins can make sense well before these lists do.
#
# ## Where it looks
#
# The picture of chapter 5, of two heads in each layer of the model that has learned something. Look for blocks: within one, the
# words of a sentence look at each other, and it is the segments that let them tell which they are. For the next-sentence
# question something has to look from one block into the other. Attention shows where information may flow, not why an answer
# was given.

# %%
pair, segments = map(torch.from_numpy, tutorial.a_pair(easy))
weights_LHTT = attention_weights(easy_bert, pair[None], segments[None])[:, 0].numpy()
png, svg = plot_attention(easy.tokenizer.tokens(pair.tolist()), weights_LHTT[:, :2], tutorial.FIGURES / "7_attention")
svg.unlink()
tutorial.show_file(png)

# %% [markdown]
# **In the package:** [`pretrain`](../../babybert/training/trainer.py), [`Loader`](../../babybert/data/loader.py),
# [`make_optimizer`](../../babybert/training/trainer.py), [`learning_rate`](../../babybert/training/schedule.py),
# [`evaluate`](../../babybert/training/evaluation.py), [`CheckpointManager`](../../babybert/training/keeper.py) for the checkpoints;
# [`fill_ins`](../../babybert/evaluation/look.py), [`neighbours`](../../babybert/evaluation/look.py). `babybert look` prints more
# of this, `babybert plot` draws whole runs, and `babybert evaluate` measures with intervals.
#
# Next: [8. Serving](8_serving.md)
