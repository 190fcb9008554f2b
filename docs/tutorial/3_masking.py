# %% [markdown]
# # 3. Masking
#
# BERT's second task is to predict words that are hidden from it. *Masked language modelling* (MLM) needs no human
# labels, because the text itself contains the answers.

# %%
import numpy as np
import tutorial

from babybert.data.masking import (
    BECOMES_MASK,
    BECOMES_RANDOM,
    CHOOSE,
    MASKED_SHARE,
    REPLACE,
    mask_tokens,
    random_uniform,
)
from babybert.data.tokenizer import FIRST_ORDINARY, MASK

dataset = tutorial.open_data()
tokenizer = dataset.tokenizer
pair, _ = tutorial.example_pair(dataset)
print(tokenizer.join(tokenizer.tokens(pair)))

# %% [markdown]
# ## One pair
#
# Each word is chosen with probability 0.15. The *label* of a chosen position is its original id. All other positions
# have the label 0, which means that they are not predicted. Special tokens are never chosen.

# %%
SEED, EPOCH, ROW = 0, 5, np.array([7])
masked, labels = mask_tokens(pair, np.array([0, len(pair)]), tokenizer.size, SEED, EPOCH, ROW)
for position in np.flatnonzero(labels):
    original, shown = tokenizer.token(pair[position]), tokenizer.token(masked[position])
    print(f"position {position:>2}: {original!r} is shown as {shown!r}, label {labels[position]}")
print(tokenizer.join(tokenizer.tokens(masked)))

# %% [markdown]
# ## By hand
#
# Two random numbers decide what happens at a position. If the first is below 0.15, the position is chosen. The second
# decides what is shown there: `[MASK]` if it is below 0.80, a random word if it is below 0.90 (a third number picks
# the word), and otherwise the original word. The numbers come from a hash of (seed, epoch, row, position), not from a
# stateful generator. So row 7 has the same masks in epoch 5, whichever process computes them and in whatever order.

# %%
positions = np.arange(len(pair))
rows = np.repeat(ROW, len(pair))
first = np.where(pair >= FIRST_ORDINARY, random_uniform(SEED, EPOCH, rows, positions, CHOOSE), 1)
chosen = (first < MASKED_SHARE) | (first == first.min())  # always the smallest: every row has a masked position
second = random_uniform(SEED, EPOCH, rows, positions, REPLACE)

assert (chosen == (labels > 0)).all()
assert (masked[chosen & (second < BECOMES_MASK)] == MASK).all()
kept = chosen & (second >= BECOMES_MASK + BECOMES_RANDOM)
assert (masked[kept] == pair[kept]).all()
print(f"{'token':<14}{'first':>7}{'second':>8}   shown as")
for t in range(1, 14):
    second_number = f"{second[t]:.3f}" if chosen[t] else ""
    print(f"{tokenizer.token(pair[t]):<14}{first[t]:>7.3f}{second_number:>8}   {tokenizer.token(masked[t])}")

# %% [markdown]
# ## 80, 10, 10
#
# Of the chosen words 80 % become `[MASK]`, 10 % become a random word, and 10 % stay as they are. Why not use `[MASK]`
# for all of them? Because in later use most texts contain no `[MASK]`. A model that is only trained to predict
# `[MASK]` might ignore all other words. With this scheme any word may be wrong or may have to be predicted, so the
# model must keep track of all of them.
#
# Over many pairs the observed shares match the intended ones.

# %%
examples = dataset.examples("validation").first(2000)
ids = examples.original_ids()
masked, labels = mask_tokens(ids, examples.offsets, tokenizer.size, SEED, EPOCH, np.arange(len(examples)))
ordinary, predicted = ids >= FIRST_ORDINARY, labels > 0
is_mask, stays = masked[predicted] == MASK, masked[predicted] == labels[predicted]
replaced_share = 1 - is_mask.mean() - stays.mean()
print(f"chosen: {predicted.sum() / ordinary.sum():.2%} of {ordinary.sum():,} words")
print(f"of these: {is_mask.mean():.1%} [MASK], {replaced_share:.1%} another word, {stays.mean():.1%} the same")

assert abs(predicted.sum() / ordinary.sum() - MASKED_SHARE) < 0.02
assert abs(is_mask.mean() - BECOMES_MASK) < 0.03
assert not (predicted & ~ordinary).any()

# %% [markdown]
# ## New masks in each epoch
#
# The reference implementation draws masks once and stores them in its table (static masking). We draw new masks
# whenever training returns to a pair (dynamic masking). This costs nothing, because the epoch is part of the hash,
# and it gives the model different words to predict in the same text. The same pair in eight epochs:

# %%
picture = np.zeros((8, len(pair)))
for epoch in range(8):
    masked, labels = mask_tokens(pair, np.array([0, len(pair)]), tokenizer.size, SEED, epoch, ROW)
    outcome = np.where(masked == MASK, 1, np.where(masked == labels, 3, 2))
    picture[epoch] = np.where(labels > 0, outcome, 0)

figure, axis = tutorial.pyplot.subplots(figsize=(9, 3.2), layout="constrained")
colors = tutorial.pyplot.matplotlib.colors.ListedColormap(["whitesmoke", "black", "tab:red", "tab:green"])
image = axis.imshow(picture, cmap=colors, vmin=-0.5, vmax=3.5, aspect="auto", interpolation="nearest")
axis.set_xticks(positions, tokenizer.tokens(pair), rotation=90)
axis.set(ylabel="epoch", title="masks of one pair by epoch")
figure.colorbar(image, ticks=range(4)).ax.set_yticklabels(["not chosen", "[MASK]", "random word", "unchanged"])
tutorial.show(figure, "3_masking")

# %% [markdown]
# **In the package:** [`mask_tokens`](../../babybert/data/masking.py),
# [`random_uniform`](../../babybert/data/masking.py), and [`DynamicMasking`](../../babybert/data/loader.py) for new
# masks in each epoch. The table that [`prepare`](../../babybert/data/prepare.py) writes contains one fixed set of
# masks. Evaluation always uses it, so that all models predict the same words.
#
# Next: [4. Embeddings and positions](4_embeddings.md)
