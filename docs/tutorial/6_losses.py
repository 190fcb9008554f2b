# %% [markdown]
# # 6. Two losses
#
# A *loss* is one number that measures how wrong the model is. Training makes it smaller. BERT has two losses, one for
# the masked words and one for the next sentence. Both are *cross entropies*: -ln p of the correct answer.

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
# ## Cross entropy of three words
#
# Suppose the vocabulary has three words, and the model computes the numbers 2, 1 and 0 for them. These are *logits*:
# any real numbers, and a larger one means a more likely word. Softmax turns them into probabilities. If the first
# word is correct, the loss is 0.41. If the last one is correct, it is 2.41.

# %%
logits = [2.0, 1.0, 0.0]
powers = [math.exp(z) for z in logits]
print("e^z:   ", *(f"{power:.3f}" for power in powers), f" sum {sum(powers):.3f}")
print("p:     ", *(f"{power / sum(powers):.3f}" for power in powers))
print("-ln p: ", *(f"{math.log(sum(powers)) - z:.3f}" for z in logits))

# %% [markdown]
# The last line uses -ln p = ln(sum of e^z) - z. This avoids a division and probabilities that are too small to
# represent. The package does the same. The unit is the *nat*. A correct answer with probability 1 has a loss of 0,
# one of two equally likely answers ln 2 = 0.693, and one of V equally likely answers ln V.
#
# ## A real pair
#
# A new model with the sizes of the reference model, and one held-out pair with its masks:

# %%
dataset = tutorial.open_data()
tokenizer = dataset.tokenizer
torch.manual_seed(0)
model = BabyBert(model_config("baby", tokenizer.size)).eval()

ids, segments = tutorial.example_pair(dataset)
masked, labels = mask_tokens(ids, np.array([0, len(ids)]), tokenizer.size, 0, 5, np.array([7]))
ids_1T, labels_1T, segments_1T = (torch.from_numpy(x.astype(np.int64))[None] for x in (masked, labels, segments))
is_next = 1

with torch.inference_mode():
    hidden_TD = model(ids_1T, segments_1T)[0]
print(tokenizer.join(tokenizer.tokens(masked)))

# %% [markdown]
# ## Masked words
#
# The loss is computed only at the chosen positions. The hidden state there goes through a small layer and is then
# multiplied by the decoder, a table with one row for each word. The product with a row plus the word's bias is the
# word's logit. So each position has V logits, one for each word of the vocabulary.

# %%
token_losses = []
for t in np.flatnonzero(labels):
    with torch.inference_mode():
        logits = model.mlm_logits(hidden_TD[t][None])[0].tolist()
    target_logit = logits[labels[t]]
    log_sum = math.log(sum(math.exp(z) for z in logits))
    token_losses.append(log_sum - target_logit)
    word = tokenizer.token(labels[t])
    print(f"{word:<14} z {target_logit:7.4f}   ln(sum e^z) {log_sum:.4f}   -ln p {token_losses[-1]:.4f}")
mlm_by_hand = sum(token_losses) / len(token_losses)
print(f"mean: {mlm_by_hand:.4f};  ln {tokenizer.size:,} = {math.log(tokenizer.size):.4f}")

# %% [markdown]
# The model is untrained. Its loss is about ln V, the loss of the uniform distribution over the vocabulary.
#
# ## Next sentence
#
# The hidden state at `[CLS]` gives two logits, for "B does not follow A" (0) and "B follows A" (1). The rest is the
# same.

# %%
with torch.inference_mode():
    z0, z1 = model.nsp_logits(hidden_TD[None])[0].tolist()
log_sum = math.log(math.exp(z0) + math.exp(z1))
nsp_by_hand = log_sum - (z0, z1)[is_next]
print(f"z0 = {z0:.4f}, z1 = {z1:.4f}, p(B follows A) = {math.exp(z1 - log_sum):.4f}")
print(f"-ln p = {nsp_by_hand:.4f};  chance: ln 2 = {math.log(2):.4f}")

# %% [markdown]
# ## The same from the package
#
# The objective is the sum of both losses. By hand, and from the module that training uses:

# %%
with torch.inference_mode():
    sums = LossSums.of(PretrainingModel(model)(ids_1T, labels_1T, segments_1T, torch.tensor([is_next])))
print(f"by hand: MLM {mlm_by_hand:.5f}  NSP {nsp_by_hand:.5f}  sum {mlm_by_hand + nsp_by_hand:.5f}")
print(f"package: MLM {sums.mlm_loss.item():.5f}  NSP {sums.nsp_loss.item():.5f}  sum {sums.loss.item():.5f}")

assert math.isclose(mlm_by_hand, sums.mlm_loss.item(), rel_tol=1e-4)
assert math.isclose(nsp_by_hand, sums.nsp_loss.item(), rel_tol=1e-4)
assert math.isclose(mlm_by_hand + nsp_by_hand, sums.loss.item(), rel_tol=1e-4)

# %% [markdown]
# The module returns sums and counts, and the division comes last. This matters for batches: pairs have different
# numbers of masked words, and a mean of means would give the words of short pairs more weight.
#
# ## Starting from the unigram baseline
#
# A model can match the unigram baseline of chapter 1 before it has seen any pair. Set the decoder bias of each word
# to the logarithm of the word's share. The products with the decoder rows are near 0 at the start, so the logits are
# about ln p. The loss of frequent words falls at once, and that of rare words rises. Training starts from here.


# %%
examples = dataset.examples("validation").first(500)
counts_V = dataset.token_counts()


@torch.inference_mode()
def masked_token_losses(model: BabyBert) -> np.ndarray:
    """-ln p of each masked word of some held-out pairs."""
    batches = []
    for batch in ordered_batches(examples, batch_size=50):
        masked_BT = batch.labels_BT > 0
        hidden_ND = model.mlm_transform(model(batch.ids_BT, batch.segments_BT)[masked_BT])
        decoder, targets_N = model.mlm_decoder, batch.labels_BT[masked_BT]
        losses_N, *_ = mlm_head_token_losses(hidden_ND, decoder.weight, decoder.bias, targets_N)
        batches.append(losses_N.numpy())
    return np.concatenate(batches)


new_losses = masked_token_losses(model)
log_shares_V = unigram_log_probs(counts_V)
model.mlm_decoder.bias.data.copy_(torch.from_numpy(log_shares_V))
losses = masked_token_losses(model)
targets = examples.labels[examples.labels > 0]
unigram_loss = -log_shares_V[targets].mean()
uniform_loss = math.log(tokenizer.size - FIRST_ORDINARY)
new_loss, loss = new_losses.mean(), losses.mean()
print(f"{len(targets):,} masked words. Mean loss: new model {new_loss:.3f}, with unigram bias {loss:.3f},")
print(f"unigram baseline {unigram_loss:.3f}, uniform distribution {uniform_loss:.3f}")
assert abs(loss - unigram_loss) < 0.1

figure, axis = tutorial.pyplot.subplots(figsize=(9, 3.8), layout="constrained")
occurrences = counts_V[targets] + 1
axis.semilogx(occurrences, new_losses, ".", markersize=4, label="new model")
axis.semilogx(occurrences, losses, ".", markersize=4, label="with unigram bias")
axis.axhline(new_loss, color="tab:blue", linestyle="--", linewidth=1)
axis.axhline(loss, color="tab:orange", linestyle="--", linewidth=1)
axis.set(
    xlabel="occurrences of the word in the training pairs, + 1",
    ylabel="-ln p, nats",
    title="loss of each masked word (dashed: the mean)",
)
axis.legend()
tutorial.show(figure, "6_losses")

# %% [markdown]
# `babybert explain` prints this computation for any pair of sentences, with a trained model or a new one:
#
#     babybert explain "The movie was wonderful." "I saw it twice."
#
# **In the package:** [`mlm_loss`](../../babybert/model/loss.py), [`nsp_loss`](../../babybert/model/loss.py),
# [`PretrainingModel`](../../babybert/model/loss.py), [`LossSums`](../../babybert/model/loss.py),
# [`mlm_head_loss`](../../babybert/model/plain_ops.py),
# [`mlm_head_candidates`](../../babybert/model/ops.py) for its faster versions,
# [`unigram_log_probs`](../../babybert/evaluation/scores.py), [`explain`](../../babybert/evaluation/explain.py).
#
# Next: [7. Training](7_training.md)
