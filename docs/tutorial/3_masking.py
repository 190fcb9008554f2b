# %% [markdown]
# # 3. Masking
#
# The second thing that BERT is asked: some words are hidden, which were they? *Masked language modelling* (MLM) needs no
# labels from people. The text itself has the answers.

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
pair, _ = tutorial.a_pair(dataset)
print(tokenizer.join(tokenizer.tokens(pair)))

# %% [markdown]
# ## One pair
#
# Each word is chosen with probability 0.15. What was chosen has its original id as its *label*; everything else has label
# 0, "not asked". Special tokens are never chosen.

# %%
SEED, EPOCH, ROW = 0, 5, np.array([7])
masked, labels = mask_tokens(pair, np.array([0, len(pair)]), tokenizer.size, SEED, EPOCH, ROW)
for position in np.flatnonzero(labels):
    print(
        f"position {position:>2}: {tokenizer.token(pair[position])!r} is shown as {tokenizer.token(masked[position])!r}, label {labels[position]}"
    )
print(tokenizer.join(tokenizer.tokens(masked)))

# %% [markdown]
# ## By hand
#
# Two random numbers decide about a position. The first: below 0.15, it is chosen. The second, what it is shown as: below
# 0.80 `[MASK]`, below 0.90 another word (which one, a third number says), else itself. They come from a hash
# of (seed, epoch, row, position) and not from a generator that runs along. So row 7 of epoch 5 has the same masks
# whichever process makes it, and in whatever order.

# %%
position = np.arange(len(pair))
rows = np.repeat(ROW, len(pair))
draw = np.where(pair >= FIRST_ORDINARY, random_uniform(SEED, EPOCH, rows, position, CHOOSE), 1)
chosen = (draw < MASKED_SHARE) | (draw == draw.min())  # the smallest always: no row is without a question
fate = random_uniform(SEED, EPOCH, rows, position, REPLACE)

assert (chosen == (labels > 0)).all()
assert (masked[chosen & (fate < BECOMES_MASK)] == MASK).all()
assert (
    masked[chosen & (fate >= BECOMES_MASK + BECOMES_RANDOM)] == pair[chosen & (fate >= BECOMES_MASK + BECOMES_RANDOM)]
).all()
print(f"{'token':<14}{'first':>7}{'second':>8}   shown as")
for t in range(1, 14):
    second = f"{fate[t]:.3f}" if chosen[t] else ""
    print(f"{tokenizer.token(pair[t]):<14}{draw[t]:>7.3f}{second:>8}   {tokenizer.token(masked[t])}")

# %% [markdown]
# ## 80, 10, 10
#
# Of the chosen words 80 % become `[MASK]`, 10 % become a random word, and 10 % stay as they are. Why not all `[MASK]`?
# Because later, in use, most texts have no `[MASK]` at all. A model that had been asked about nothing else might make
# nothing of the other words. So any word may be a wrong one or be asked about, and the model has to keep track of all.
#
# Over many pairs the shares come out as planned.

# %%
some = dataset.examples("validation").first(2000)
ids = some.original_ids()
masked, labels = mask_tokens(ids, some.offsets, tokenizer.size, SEED, EPOCH, np.arange(len(some)))
ordinary, asked = ids >= FIRST_ORDINARY, labels > 0
is_mask, stays = masked[asked] == MASK, masked[asked] == labels[asked]
print(f"chosen: {asked.sum() / ordinary.sum():.2%} of {ordinary.sum():,} words")
print(
    f"of these: {is_mask.mean():.1%} [MASK], {1 - is_mask.mean() - stays.mean():.1%} another word, {stays.mean():.1%} the same"
)

assert abs(asked.sum() / ordinary.sum() - MASKED_SHARE) < 0.02
assert abs(is_mask.mean() - BECOMES_MASK) < 0.03
assert not (asked & ~ordinary).any()

# %% [markdown]
# ## New masks in each epoch
#
# The reference draws masks once and writes them into its table. Drawn anew whenever training comes back to a pair
# ("dynamic"; a hash of the epoch makes it free), they ask other questions about the same text. The same pair in eight epochs:

# %%
picture = np.zeros((8, len(pair)))
for epoch in range(8):
    masked, labels = mask_tokens(pair, np.array([0, len(pair)]), tokenizer.size, SEED, epoch, ROW)
    fates = np.where(masked == MASK, 1, np.where(masked == labels, 3, 2))
    picture[epoch] = np.where(labels > 0, fates, 0)

figure, axis = tutorial.pyplot.subplots(figsize=(9, 3.2), layout="constrained")
colors = tutorial.pyplot.matplotlib.colors.ListedColormap(["whitesmoke", "black", "tab:red", "tab:green"])
shown = axis.imshow(picture, cmap=colors, vmin=-0.5, vmax=3.5, aspect="auto", interpolation="nearest")
axis.set_xticks(position, tokenizer.tokens(pair), rotation=90)
axis.set(ylabel="epoch", title="what a pair's words become")
figure.colorbar(shown, ticks=range(4)).ax.set_yticklabels(["not chosen", "[MASK]", "another word", "itself"])
tutorial.show(figure, "3_masking")

# %% [markdown]
# **In the package:** [`mask_tokens`](../../babybert/data/masking.py), [`random_uniform`](../../babybert/data/masking.py);
# [`DynamicMasking`](../../babybert/data/loader.py) for new masks in each epoch. The table that
# [`prepare`](../../babybert/data/prepare.py) writes has one set of masks, which evaluation always uses: two models are
# asked the same questions.
#
# Next: [4. Embeddings and positions](4_embeddings.md)
