# %% [markdown]
# # 7. Training, and what it learned
#
# Training repeats one step: take a batch of pairs, compute the loss, find out how each parameter would have to change to
# make it smaller (the *gradient*), and change all a little. This chapter does that for half a minute and then asks
# the model what it knows.

# %%
import shutil

import numpy as np
import torch
import walk

from babybert.cli import main
from babybert.config import PretrainConfig
from babybert.data.loader import Loader, Remask
from babybert.evaluation.look import attention_weights, fill_ins, neighbours
from babybert.evaluation.plots import plot_attention
from babybert.inference.predictor import Predictor
from babybert.model.objectives import PretrainingModel, Totals
from babybert.model.saved import load_model
from babybert.training.checkpoint import find_checkpoint
from babybert.training.metrics import read_metrics
from babybert.training.schedule import learning_rate
from babybert.training.trainer import load_or_create, make_optimizer

dataset = walk.open_data()
tokenizer = dataset.tokenizer

# %% [markdown]
# ## One step, by hand
#
# A batch of 64 pairs; the loss; the gradient, which PyTorch works out; its length cut to 1 if it is longer; a step of Adam.
# The loss on the same batch is smaller afterwards. On other batches it need not be.

# %%
config = PretrainConfig(data=dataset.folder, preset=walk.preset(), lr=1e-3)
torch.manual_seed(0)
bert = load_or_create(config, dataset, dataset.token_counts(), None).eval()  # eval: without dropout, to compare
model, optimizer = PretrainingModel(bert), make_optimizer(bert, config)
batch = next(Loader(dataset.examples("train"), 64, seed=0, remask=Remask(tokenizer.size, seed=0)).epoch(0))

before = Totals.of(model(*batch)).loss
before.backward()
length = torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
optimizer.step()
with torch.no_grad():
    after = Totals.of(model(*batch)).loss
print(f"loss {before.item():.4f}, length of the gradient {length.item():.3f}, loss after the step {after.item():.4f}")
assert after < before

# %% [markdown]
# ## Half a minute of it
#
# The whole loop is one function, [`_train`](../../babybert/training/trainer.py). It climbs to its learning rate over the
# first steps (a new model's gradients point anywhere), measures itself on held-out pairs, and saves checkpoints. The
# command is the user's own:

# %%
run = walk.run_folder()
shutil.rmtree(run, ignore_errors=True)
print("$ babybert", *walk.training(), "\n")
assert main(walk.training()) == 0

# %% [markdown]
# ## The curve
#
# Each point is the mean of five steps' losses on pairs that training just met, with a running mean; the diamond is the
# loss on held-out pairs at the end. The middle panel is the first one, close up. Word counts come free, as the bias that
# training starts from (chapter 6): what lies below that line has been learned from context, and only that.

# %%
lines = read_metrics(run / "metrics.jsonl")
train = [line for line in lines if line["split"] == "train"]
held_out = [line for line in lines if line["split"] == "validation"][-1]
steps = np.array([line["step"] for line in train])

figure, axes = walk.pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
for axis, key, title in zip(axes, ("mlm_loss", "mlm_loss", "nsp_loss"), ("masked words", "masked words, close up", "next sentence"), strict=True):
    values = np.array([line[key] for line in train])
    width = max(1, len(values) // 8)
    axis.plot(steps, values, ".", alpha=0.4, color="tab:blue")
    axis.plot(steps[width - 1 :], np.convolve(values, np.full(width, 1 / width), "valid"), color="tab:blue", label="training")
    axis.plot(held_out["step"], held_out[key], "D", color="black", label="held out")
    if key == "mlm_loss":
        axis.axhline(held_out["mlm_unigram_loss"], color="tab:orange", linestyle="--", label="word counts")
    axis.set(title=title, xlabel="step", ylabel="nats")
axes[0].axhline(held_out["mlm_chance_loss"], color="gray", linestyle=":", label="chance")
axes[0].set_ylim(0)
axes[2].axhline(held_out["nsp_chance_loss"], color="gray", linestyle=":", label="a coin")
for axis in axes:
    axis.legend(fontsize="small")
walk.show(figure, "7_training")

for key in ("mlm_loss", "mlm_unigram_loss", "mlm_chance_loss", "nsp_loss", "nsp_chance_loss"):
    print(f"held-out {key:<18}{held_out[key]:8.3f}")
assert held_out["mlm_loss"] < held_out["mlm_chance_loss"]
assert np.isclose(learning_rate(steps[0] - 1, 10_000, 0.01, 0.1), 0.01 * steps[0] / 1000)  # the climb is a straight line

# %% [markdown]
# On real reviews half a minute of a model of width 10 is very little: expect it near the line of word counts, and next
# sentence at a coin's 0.693. On the generated reviews, with their 200 words and strict grammar, a wider model leaves the line
# in the same time. Longer runs are in [results.md](../results.md), and what they are measured against in
# [evaluation.md](../evaluation.md).
#
# ## What it fills in
#
# For each sentence: the model's five favourites, and the rank that it gives to a word that fits; in brackets the rank
# by frequency alone. If all sentences get the same favourites, and the ranks are those in brackets, the model tells the
# word counts and does not look at the sentence.

# %%
bert, _ = load_model(find_checkpoint(run))
bert.eval()
GENERATED = (
    ("the sheriff rides with a revolver near the [MASK] .", ("saloon", "desert", "canyon")),
    ("mary hides in the graveyard , and the ghosts take [MASK] candle .", ("her",)),
    ("i loved the planet and the pilot : [MASK] out of ten .", ("nine", "ten")),
)
sentences = None if walk.is_imdb() else GENERATED
predictor = Predictor(bert, tokenizer)
for found in (fill_ins(predictor) if sentences is None else fill_ins(predictor, sentences))[:6]:
    ranks = ", ".join(f"{word['word']} {word['rank']:,} ({word['vocabulary_place'] - 4:,})" for word in found["sensible"] if word["rank"])
    print(f"{found['text']}\n    fills in: {' '.join(found['fills'])}\n    fits:     {ranks}")

# %% [markdown]
# ## Which words it holds for alike
#
# Words that stand in the same places should get vectors that point the same way. The nearest ones (cosine), among the 2,000
# most frequent words:

# %%
for entry in neighbours(bert, tokenizer, ("good", "movie", "he", "was") if walk.is_imdb() else ("sheriff", "mary", "superb", "three"), 2000):
    print(f"{entry['word']:<8}", ", ".join(f"{near['word']} {near['cosine']:.2f}" for near in entry["neighbours"]))

# %% [markdown]
# ## Where it looks
#
# The picture of chapter 5, of the trained model: the maps of the first and the last layer, where training has moved
# them. Attention shows where information may flow, not why an answer was given.

# %%
pair, segments = map(torch.from_numpy, walk.a_pair(dataset))
weights_LHTT = attention_weights(bert, pair[None], segments[None])[:, 0].numpy()
png, svg = plot_attention(tokenizer.tokens(pair.tolist()), weights_LHTT[:, :2], walk.FIGURES / "7_attention")
svg.unlink()
walk.show_file(png)

# %% [markdown]
# **In the package:** [`pretrain`](../../babybert/training/trainer.py), [`Loader`](../../babybert/data/loader.py),
# [`make_optimizer`](../../babybert/training/trainer.py), [`learning_rate`](../../babybert/training/schedule.py),
# [`evaluate`](../../babybert/training/evaluation.py), [`Keeper`](../../babybert/training/keeper.py) for the checkpoints;
# [`fill_ins`](../../babybert/evaluation/look.py), [`neighbours`](../../babybert/evaluation/look.py). `babybert look` prints more
# of this, `babybert plot` draws whole runs, and `babybert evaluate` measures with intervals.
#
# Next: [8. Serving](8_serving.md)
