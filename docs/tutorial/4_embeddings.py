# %% [markdown]
# # 4. Embeddings and positions
#
# Ids are only names: 17 is not more than 16. The network looks each one up in a table and gets a *vector*, numbers that it
# can change while it learns. To it come two more vectors, one for the position and one for the segment.

# %%
import math

import numpy as np
import torch
import tutorial

from babybert.config import model_config
from babybert.model.bert import BabyBert

dataset = tutorial.open_data()
tokenizer = dataset.tokenizer
torch.manual_seed(0)
model = BabyBert(model_config("baby", tokenizer.size)).eval()

pair, segments = map(torch.from_numpy, tutorial.a_pair(dataset))
print(" ".join(tokenizer.tokens(pair)))
print(*segments.tolist())

# %% [markdown]
# The model is new: its numbers are random. It has the reference's sizes
# ([`PRESETS`](../../babybert/config.py)): a vector has D = 10 numbers. Nearly all of
# its parameters are two tables with a row for each token, this one and the one that predicts (chapter 6).

# %%
total = sum(parameter.numel() for parameter in model.parameters())
token_table, decoder = model.embedding.token_embedding.embedding.weight, model.mlm_decoder
tables = token_table.numel() + decoder.weight.numel() + decoder.bias.numel()
print(f"vocabulary {tokenizer.size:,} x width 10: {token_table.numel():,} numbers")
print(f"{total:,} parameters, {tables / total:.0%} of them in the two tables")

# %% [markdown]
# ## By hand
#
# The sum of three vectors, for the token at position 5:

# %%
t, width = 5, model.config.width
token = token_table[pair[t]] * math.sqrt(width)
position = torch.tensor([(math.cos if i % 2 else math.sin)(t / 10_000 ** (2 * (i // 2) / width)) for i in range(width)])
segment = model.embedding.segment_embedding.weight[segments[t]]

for name, vector in (
    (f"token '{tokenizer.token(int(pair[t]))}'", token),
    (f"position {t}", position),
    ("segment 1", segment),
    ("sum", token + position + segment),
):
    print(f"{name:<16}", *(f"{number:6.2f}" for number in vector.tolist()))

with torch.inference_mode():
    embedded_TD = model.embedding(pair, segments, torch.arange(len(pair)))
assert torch.allclose(embedded_TD[t], token + position + segment, atol=1e-5)

# %% [markdown]
# Token vectors are multiplied by the square root of D, so that they are about as large as the positions' sines and
# cosines and neither drowns the other.
#
# ## Why positions at all
#
# What comes next, attention, is a weighted sum over all tokens, and a sum does not know an order. Without positions "dog
# bites man" and "man bites dog" would be the same. Each position gets its own pattern: numbers 0 and 1 are the sine
# and cosine of a fast wave, 2 and 3 of a slower one, and so on. Nothing of this is learned.
#
# The pattern has a use beyond being different: how alike two positions are (their dot product) depends on their
# distance alone.

# %%
table_TD = model.embedding.positional_encoding.table_TD[:128]
alike = table_TD @ table_TD.T
print("alike, positions 10 and 13:", f"{alike[10, 13]:.4f};", "positions 80 and 83:", f"{alike[80, 83]:.4f}")
assert torch.allclose(alike[10, 13], alike[80, 83], atol=1e-3)
assert torch.allclose(alike.diagonal(), torch.full((128,), width / 2), atol=1e-3)  # sin^2 + cos^2 = 1, five times

figure, (waves, distance) = tutorial.pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
shown = waves.imshow(table_TD.T.numpy(), aspect="auto", cmap="RdBu", interpolation="nearest")
figure.colorbar(shown)
waves.set(title="the vectors of positions", xlabel="position", ylabel="number in the vector")
for start in (20, 64):
    distance.plot(np.arange(128) - start, alike[start], label=f"position {start} with the others")
distance.set(title="how alike two positions are", xlabel="distance", ylabel="dot product")
distance.legend()
tutorial.show(figure, "4_embeddings")

# %% [markdown]
# With ten numbers, the two slowest of the five waves hardly move within 128 positions (the lowest rows of the left
# picture): most of what says *where* is in the first six numbers. And near is not simply alike: the fast wave makes the
# curve on the right go up and down. What to make of it, the network has to learn.
#
# **In the package:** [`TokenEmbedding`](../../babybert/model/bert.py), [`PositionalEncoding`](../../babybert/model/bert.py),
# [`BertEmbedding`](../../babybert/model/bert.py). (Google's BERT learns its positions; fixed ones are the reference's choice.)
#
# Next: [5. Attention](5_attention.md)
