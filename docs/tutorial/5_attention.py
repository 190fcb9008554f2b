# %% [markdown]
# # 5. Attention
#
# So far each token has a vector that contains nothing about the other tokens. Attention is the only operation in the
# network that exchanges information between tokens: each token computes a weighted mean over all tokens.

# %%
import math

import numpy as np
import torch
import torch.nn.functional as F
import tutorial

from babybert.config import model_config
from babybert.data.tokenizer import PAD
from babybert.evaluation.look import attention_weights
from babybert.evaluation.report_figures import plot_attention
from babybert.model.bert import BabyBert

dataset = tutorial.open_data()
tokenizer = dataset.tokenizer
torch.manual_seed(0)
model = BabyBert(model_config("baby", tokenizer.size)).eval()

pair, segments = map(torch.from_numpy, tutorial.example_pair(dataset))
with torch.inference_mode():
    x_TD = model.embedding(pair, segments, torch.arange(len(pair)))
print(f"{len(pair)} tokens, each a vector of {x_TD.shape[1]} numbers")

# %% [markdown]
# ## Queries, keys and values
#
# Three vectors are computed from the vector x of each token: a *query* ("what am I looking for?"), a *key* ("what do
# I contain?") and a *value* ("what do I pass on?"). Each is x times a learned matrix. There are two *heads*. Each
# head does this independently with half of the values: d = 10 / 2 = 5.

# %%
layer = model.encoder.layers[0]
attention = layer.self_attn
heads, d = attention.num_heads, x_TD.shape[1] // attention.num_heads
with torch.inference_mode():
    q_TD, k_TD, v_TD = F.linear(x_TD, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=1)
    q_HTd, k_HTd, v_HTd = (z.unflatten(1, (heads, d)).transpose(0, 1) for z in (q_TD, k_TD, v_TD))
print("query of token 3, head 1:", *(f"{value:6.2f}" for value in q_HTd[0, 3].tolist()))
print("key of token 4, head 1:  ", *(f"{value:6.2f}" for value in k_HTd[0, 4].tolist()))

# %% [markdown]
# ## Scores, softmax, weighted mean
#
# How much does token 3 attend to token 4? The *score* is the dot product of its query with the key of token 4,
# divided by the square root of d. *Softmax* turns a row of scores into weights: e to the power of each score, divided
# by the sum of all. The weights are positive and add up to one.
#
# The division by the square root keeps the scores at the same scale for every d. Without it the scores of wide models
# would be large, the weights would start near 0 or 1, and softmax has hardly any gradient there.

# %%
query = q_HTd[0, 3].tolist()
scores = [sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(d) for key in k_HTd[0].tolist()]
powers = [math.exp(score) for score in scores]
weights = [power / sum(powers) for power in powers]
print(f"token 3, '{tokenizer.token(int(pair[3]))}', attends most to:")
for j in sorted(range(len(weights)), key=lambda j: -weights[j])[:4]:
    token = tokenizer.token(int(pair[j]))
    print(f"  position {j:>2} {token:<12} score {scores[j]:5.2f}  e^score {powers[j]:5.2f}  weight {weights[j]:.3f}")

with torch.inference_mode():
    weights_LHTT = attention_weights(model, pair[None], segments[None])[:, 0]
assert np.allclose(weights, weights_LHTT[0, 0, 3], atol=1e-5)

# %% [markdown]
# The output for token 3 is the mean of the values with these weights. The outputs of the heads are concatenated and
# multiplied by one more matrix. The layer then adds its input (the residual connection), normalizes each vector to
# mean 0 and variance 1, passes each token separately through a small network with 2,048 hidden units, and adds and
# normalizes again. The whole layer, written out:

# %%
with torch.inference_mode():
    weights_HTT = (q_HTd @ k_HTd.transpose(1, 2) / math.sqrt(d)).softmax(-1)
    attended_TD = attention.out_proj((weights_HTT @ v_HTd).transpose(0, 1).flatten(1))
    x1_TD = layer.norm1(x_TD + attended_TD)
    out_TD = layer.norm2(x1_TD + layer.linear2(layer.linear1(x1_TD).relu()))

    assert torch.allclose(out_TD, layer(x_TD[None])[0], atol=1e-4)

# %% [markdown]
# ## Padding
#
# In a batch, shorter rows are padded with `[PAD]`. The scores of padding are set to minus infinity, so its weight is
# 0 for every token. Padding therefore does not change the result.

# %%
padded_pair, padded_segments = F.pad(pair, (0, 6), value=PAD), F.pad(segments, (0, 6))
with torch.inference_mode():
    padded_LHTT = attention_weights(model, padded_pair[None], padded_segments[None])[:, 0]
    assert (padded_LHTT[..., len(pair) :] == 0).all()

    hidden_TD = model(pair[None], segments[None])[0]
    padded_hidden_TD = model(padded_pair[None], padded_segments[None])[0, : len(pair)]
    assert torch.allclose(padded_hidden_TD, hidden_TD, atol=1e-4)

# %% [markdown]
# ## All layers and heads
#
# The attention weights of two layers with two heads each, for one pair. Each row is a token, and the columns are the
# tokens that it attends to.

# %%
png, svg = plot_attention(tokenizer.tokens(pair), weights_LHTT.numpy(), tutorial.FIGURES / "5_attention")
svg.unlink()
tutorial.show_file(png)

# %% [markdown]
# The model is untrained, so these patterns come from random matrices and mean nothing. They only show where
# information can flow. Training decides what flows there, and chapter 7 draws the same plot for a trained model.
#
# **In the package:** [`EncoderLayer`](../../babybert/model/layer.py), [`attention`](../../babybert/model/ops.py),
# [`feed_forward`](../../babybert/model/ops.py), [`BertEncoder.forward`](../../babybert/model/bert.py), and for the
# plot [`attention_weights`](../../babybert/evaluation/look.py) and
# [`plot_attention`](../../babybert/evaluation/report_figures.py).
#
# Next: [6. Two losses](6_losses.md)
