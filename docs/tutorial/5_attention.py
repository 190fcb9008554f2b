# %% [markdown]
# # 5. Attention
#
# So far each token has a vector that knows nothing of its neighbours. Attention is the one place where tokens exchange
# something: each takes a weighted mean of what all of them offer.

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

pair, segments = map(torch.from_numpy, tutorial.a_pair(dataset))
with torch.inference_mode():
    x_TD = model.embedding(pair, segments, torch.arange(len(pair)))
print(f"{len(pair)} tokens, each a vector of {x_TD.shape[1]} numbers")

# %% [markdown]
# ## Three roles
#
# From its vector x each token makes three: a *query* ("what do I look for?"), a *key* ("what am I?") and a *value* ("what do
# I offer?"). Each is x times a matrix that is learned. There are two *heads*, which do all of this independently with
# half of the numbers each: d = 10 / 2 = 5.

# %%
layer = model.encoder.layers[0]
attend = layer.self_attn
heads, d = attend.num_heads, x_TD.shape[1] // attend.num_heads
with torch.inference_mode():
    q_TD, k_TD, v_TD = F.linear(x_TD, attend.in_proj_weight, attend.in_proj_bias).chunk(3, dim=1)
    q_HTd, k_HTd, v_HTd = (z.unflatten(1, (heads, d)).transpose(0, 1) for z in (q_TD, k_TD, v_TD))
print("query of token 3, head 1:", *(f"{number:6.2f}" for number in q_HTd[0, 3].tolist()))
print("key of token 4, head 1:  ", *(f"{number:6.2f}" for number in k_HTd[0, 4].tolist()))

# %% [markdown]
# ## Score, softmax, mean
#
# How much token 3 looks at token 4: multiply query and key number by number, add up, divide by the square root of d. That
# is a *score*, any number. *Softmax* makes weights of a row of scores: e to the power of each, divided by their sum. They are
# all positive and add up to one.
#
# (Why the root? A sum of d products is larger the larger d is. Without it wide models would start with weights near 0
# and 1, where a softmax hardly learns.)

# %%
scores = [
    sum(a * b for a, b in zip(q_HTd[0, 3].tolist(), key, strict=True)) / math.sqrt(d) for key in k_HTd[0].tolist()
]
powers = [math.exp(score) for score in scores]
weights = [power / sum(powers) for power in powers]
print("token 3,", f"'{tokenizer.token(int(pair[3]))}', looks most at:")
for j in sorted(range(len(weights)), key=lambda j: -weights[j])[:4]:
    print(
        f"  position {j:>2} {tokenizer.token(int(pair[j])):<12} score {scores[j]:5.2f}  e^score {powers[j]:5.2f}  weight {weights[j]:.3f}"
    )

with torch.inference_mode():
    theirs_LHTT = attention_weights(model, pair[None], segments[None])[:, 0]
assert np.allclose(weights, theirs_LHTT[0, 0, 3], atol=1e-5)

# %% [markdown]
# The output for token 3 is the mean of the values, with these weights; the heads' outputs stand side by side and go
# through one more matrix. Then the layer adds its input again (so that what was known is not lost), normalizes to mean 0
# and variance 1, sends each token by itself through a small network of 2,048 hidden units, and adds and normalizes again.
# The whole layer, written out:

# %%
with torch.inference_mode():
    weights_HTT = (q_HTd @ k_HTd.transpose(1, 2) / math.sqrt(d)).softmax(-1)
    attended_TD = attend.out_proj((weights_HTT @ v_HTd).transpose(0, 1).flatten(1))
    x1_TD = layer.norm1(x_TD + attended_TD)
    out_TD = layer.norm2(x1_TD + layer.linear2(layer.linear1(x1_TD).relu()))

    assert torch.allclose(out_TD, layer(x_TD[None])[0], atol=1e-4)

# %% [markdown]
# ## Padding
#
# In a batch, shorter rows are filled with `[PAD]`. Its scores are set to minus infinity: weight 0, for everybody. So padding
# changes nothing.

# %%
longer, their_segments = F.pad(pair, (0, 6), value=PAD), F.pad(segments, (0, 6))
with torch.inference_mode():
    padded_LHTT = attention_weights(model, longer[None], their_segments[None])[:, 0]
    assert (padded_LHTT[..., len(pair) :] == 0).all()
    assert torch.allclose(
        model(longer[None], their_segments[None])[0, : len(pair)], model(pair[None], segments[None])[0], atol=1e-4
    )

# %% [markdown]
# ## All of it
#
# Two layers of two heads on one pair. A row is the token that looks, a column what it looks at.

# %%
png, svg = plot_attention(tokenizer.tokens(pair), theirs_LHTT.numpy(), tutorial.FIGURES / "5_attention")
svg.unlink()
tutorial.show_file(png)

# %% [markdown]
# The model is untrained, so the patterns mean nothing: they come from random matrices. What is there is only possible
# paths for information. Training decides what flows along them, and chapter 7 draws the same picture afterwards.
#
# **In the package:** [`EncoderLayer`](../../babybert/model/layer.py), [`attention`](../../babybert/model/layer.py),
# [`feed_forward`](../../babybert/model/layer.py), [`BabyBert.forward`](../../babybert/model/bert.py);
# [`attention_weights`](../../babybert/evaluation/look.py) and [`plot_attention`](../../babybert/evaluation/plots.py) for the picture.
#
# Next: [6. Two losses](6_losses.md)
