# %% [markdown]
# # 6. Two losses
#
# A *loss* is one number that says how wrong the model was; training makes it smaller. BERT has two: one for the masked
# words, one for the next sentence. Both are the same thing, *cross entropy*, the price -ln p of what was true.

# %%
import math

import numpy as np
import torch
import tutorial

from babybert.config import model_config
from babybert.data.loader import ordered_batches
from babybert.data.masking import mask_tokens
from babybert.data.tokenizer import FIRST_ORDINARY
from babybert.evaluation.scores import unigram_log_probs
from babybert.model.bert import BabyBert
from babybert.model.loss import LossSums, PretrainingModel
from babybert.model.ops import mlm_head_token_losses

# %% [markdown]
# ## Three words, a pocket calculator
#
# Say there are three words, and the model gives them the numbers 2, 1 and 0 (*logits*: any numbers, larger is likelier).
# Softmax makes probabilities of them. If the first word is the true one the loss is 0.41, if the last one, 2.41.

# %%
logits = [2.0, 1.0, 0.0]
powers = [math.exp(z) for z in logits]
print("e^z:   ", *(f"{power:.3f}" for power in powers), f" sum {sum(powers):.3f}")
print("p:     ", *(f"{power / sum(powers):.3f}" for power in powers))
print("-ln p: ", *(f"{math.log(sum(powers)) - z:.3f}" for z in logits))

# %% [markdown]
# The last line uses -ln p = ln(sum of e^z) - z: no division, and nothing too small to hold. So does the package. The unit
# is the *nat*. Certain and right costs 0; one of two alike costs ln 2 = 0.693; one of V alike costs ln V.
#
# ## A real pair
#
# A new model of the reference's sizes, and one pair of held-out sentences with its masks.

# %%
dataset = tutorial.open_data()
tokenizer = dataset.tokenizer
torch.manual_seed(0)
model = BabyBert(model_config("baby", tokenizer.size)).eval()

ids, segments = tutorial.a_pair(dataset)
masked, labels = mask_tokens(ids, np.array([0, len(ids)]), tokenizer.size, 0, 5, np.array([7]))
ids_1T, labels_1T, segments_1T = (torch.from_numpy(x.astype(np.int64))[None] for x in (masked, labels, segments))
is_next = 1

with torch.inference_mode():
    hidden_TD = model(ids_1T, segments_1T)[0]
print(tokenizer.join(tokenizer.tokens(masked)))

# %% [markdown]
# ## Masked words
#
# Only the chosen positions are asked. The vector there goes through a small layer and then meets a table with a row for each
# word: the product with a row, plus that word's bias, is the word's logit. V logits a position, one for every word
# that there is.

# %%
prices = []
for t in np.flatnonzero(labels):
    with torch.inference_mode():
        z = model.mlm_logits(hidden_TD[t][None])[0].tolist()
    log_sum = math.log(sum(math.exp(value) for value in z))
    prices.append(log_sum - z[labels[t]])
    print(
        f"{tokenizer.token(labels[t]):<14} z {z[labels[t]]:7.4f}   ln(sum e^z) {log_sum:.4f}   -ln p {prices[-1]:.4f}"
    )
mlm_by_hand = sum(prices) / len(prices)
print(f"mean: {mlm_by_hand:.4f};  ln {tokenizer.size:,} = {math.log(tokenizer.size):.4f}")

# %% [markdown]
# The model is new and knows nothing: its price is about ln V, that of drawing lots among all words.
#
# ## Next sentence
#
# The vector at `[CLS]` gives two logits, for "B is from elsewhere" (0) and "B follows A" (1). The rest is as before.

# %%
with torch.inference_mode():
    z0, z1 = model.nsp_logits(hidden_TD[None])[0].tolist()
log_sum = math.log(math.exp(z0) + math.exp(z1))
nsp_by_hand = log_sum - (z0, z1)[is_next]
print(f"z0 = {z0:.4f}, z1 = {z1:.4f}, p(B follows A) = {math.exp(z1 - log_sum):.4f}")
print(f"-ln p = {nsp_by_hand:.4f};  a coin: ln 2 = {math.log(2):.4f}")

# %% [markdown]
# ## The same from the library
#
# The objective is the sum of both. By hand and from the module that training calls:

# %%
with torch.inference_mode():
    totals = LossSums.of(PretrainingModel(model)(ids_1T, labels_1T, segments_1T, torch.tensor([is_next])))
print(f"by hand: MLM {mlm_by_hand:.5f}  NSP {nsp_by_hand:.5f}  sum {mlm_by_hand + nsp_by_hand:.5f}")
print(f"library: MLM {totals.mlm_loss.item():.5f}  NSP {totals.nsp_loss.item():.5f}  sum {totals.loss.item():.5f}")

assert math.isclose(mlm_by_hand, totals.mlm_loss.item(), rel_tol=1e-4)
assert math.isclose(nsp_by_hand, totals.nsp_loss.item(), rel_tol=1e-4)
assert math.isclose(mlm_by_hand + nsp_by_hand, totals.loss.item(), rel_tol=1e-4)

# %% [markdown]
# The library returns sums and counts and divides at the end. That matters as soon as there are batches: pairs have different
# numbers of masked words, and a mean of means would count the words of a short pair more.
#
# ## A better start
#
# A model can know the word counts of chapter 1 before it has seen a single pair: set each word's bias to the logarithm of
# its share. The table's products are near 0 at the start, so the logits are about ln p, and the price of a frequent word falls
# at once (that of a rare word rises). This is where our training starts from.


# %%
examples = dataset.examples("validation").first(500)
counts_V = dataset.token_counts()


@torch.inference_mode()
def prices_of(model: BabyBert) -> np.ndarray:
    """-ln p of each masked word of some held-out pairs."""
    found = []
    for batch in ordered_batches(examples, batch_size=50):
        chosen = batch.labels_BT > 0
        states = model.mlm_transform(model(batch.ids_BT, batch.segments_BT)[chosen])
        found.append(
            mlm_head_token_losses(states, model.mlm_decoder.weight, model.mlm_decoder.bias, batch.labels_BT[chosen])[
                0
            ].numpy()
        )
    return np.concatenate(found)


new = prices_of(model)
log_shares_V = unigram_log_probs(counts_V)
model.mlm_decoder.bias.data.copy_(torch.from_numpy(log_shares_V))
started = prices_of(model)
targets = examples.labels[examples.labels > 0]
print(f"{len(targets):,} masked words. Mean price: new model {new.mean():.3f}, with word counts {started.mean():.3f},")
print(
    f"word counts alone {-log_shares_V[targets].mean():.3f}, all words alike {math.log(tokenizer.size - FIRST_ORDINARY):.3f}"
)
assert abs(started.mean() + log_shares_V[targets].mean()) < 0.1

figure, axis = tutorial.pyplot.subplots(figsize=(9, 3.8), layout="constrained")
seen = counts_V[targets] + 1
axis.semilogx(seen, new, ".", markersize=4, label="new model")
axis.semilogx(seen, started, ".", markersize=4, label="with word counts as bias")
for prices, color in ((new, "tab:blue"), (started, "tab:orange")):
    axis.axhline(prices.mean(), color=color, linestyle="--", linewidth=1)
axis.set(
    xlabel="how often the word stands in the training pairs, + 1",
    ylabel="-ln p, nats",
    title="the price of each masked word (dashed: the mean)",
)
axis.legend()
tutorial.show(figure, "6_losses")

# %% [markdown]
# Any pair of sentences can be followed in this way, number by number, with a trained model or a new one:
#
#     babybert explain "The movie was wonderful." "I saw it twice."
#
# **In the package:** [`mlm_loss`](../../babybert/model/objectives.py), [`nsp_loss`](../../babybert/model/objectives.py),
# [`PretrainingModel`](../../babybert/model/objectives.py), [`LossSums`](../../babybert/model/objectives.py),
# [`plain_ops.mlm_head_loss`](../../babybert/model/plain_ops.py) and the faster forms that [`ops`](../../babybert/model/ops.py) picks,
# [`unigram_log_probs`](../../babybert/training/evaluation.py), [`explain`](../../babybert/evaluation/explain.py).
#
# Next: [7. Training](7_training.md)
