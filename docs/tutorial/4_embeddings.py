# %% [markdown]
# # 4. Embeddings and positions
#
# Ids are only labels: id 17 is not "more" than id 16. The network looks up each id in a table and gets a vector of
# trainable numbers, the *token embedding*. Two more vectors are added to it, one for the position and one for the
# segment.

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

pair, segments = map(torch.from_numpy, tutorial.example_pair(dataset))
print(" ".join(tokenizer.tokens(pair)))
print(*segments.tolist())

# %% [markdown]
# The model is new, so its weights are random. Its sizes are those of the reference model
# ([`PRESETS`](../../babybert/config/model_config.py)): the width D, the number of values in a vector, is 10.
# Nearly all parameters are in two tables with one row for each token: the token embeddings and the MLM decoder
# (chapter 6).

# %%
total = sum(parameter.numel() for parameter in model.parameters())
token_table, decoder = model.embedding.token_embedding.embedding.weight, model.mlm_decoder
tables = token_table.numel() + decoder.weight.numel() + decoder.bias.numel()
print(f"vocabulary {tokenizer.size:,} x width 10: {token_table.numel():,} numbers")
print(f"{total:,} parameters, {tables / total:.0%} of them in the two tables")

# %% [markdown]
# ## By hand
#
# The embedding of the token at position 5 is the sum of three vectors:

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
    print(f"{name:<16}", *(f"{value:6.2f}" for value in vector.tolist()))

with torch.inference_mode():
    embedded_TD = model.embedding(pair, segments, torch.arange(len(pair)))
assert torch.allclose(embedded_TD[t], token + position + segment, atol=1e-5)

# %% [markdown]
# Token embeddings are multiplied by the square root of D. This makes them about as large as the sines and cosines of
# the positions, so that neither dominates the sum.
#
# ## Why positions are needed
#
# The next step, attention, is a weighted sum over all tokens, and a sum does not depend on the order of its terms.
# Without positions "dog bites man" and "man bites dog" would be the same. Each position therefore has a distinct
# vector: values 0 and 1 are the sine and cosine of a fast wave, values 2 and 3 those of a slower one, and so on.
# These vectors are fixed, not trained.
#
# They have another useful property: the similarity of two positions (their dot product) depends only on their
# distance.

# %%
table_TD = model.embedding.positional_encoding.table_TD[:128]
similarity = table_TD @ table_TD.T
print(f"similarity of positions 10 and 13: {similarity[10, 13]:.4f}; of positions 80 and 83: {similarity[80, 83]:.4f}")
assert torch.allclose(similarity[10, 13], similarity[80, 83], atol=1e-3)
assert torch.allclose(similarity.diagonal(), torch.full((128,), width / 2), atol=1e-3)  # sin^2 + cos^2 = 1, five times

figure, (waves, distance) = tutorial.pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
image = waves.imshow(table_TD.T.numpy(), aspect="auto", cmap="RdBu", interpolation="nearest")
figure.colorbar(image)
waves.set(title="position vectors", xlabel="position", ylabel="index in the vector")
for start in (20, 64):
    distance.plot(np.arange(128) - start, similarity[start], label=f"position {start} with all others")
distance.set(title="similarity of two positions", xlabel="distance", ylabel="dot product")
distance.legend()
tutorial.show(figure, "4_embeddings")

# %% [markdown]
# A vector of ten values has five waves, and the two slowest hardly change within 128 positions (the lowest rows of
# the left plot). Most of the information about the position is in the first six values. The similarity on the right
# does not simply fall with the distance either: the fast wave makes it oscillate. The network has to learn how to use
# these vectors.
#
# **In the package:** [`TokenEmbedding`](../../babybert/model/bert.py),
# [`PositionalEncoding`](../../babybert/model/bert.py), [`BertEmbedding`](../../babybert/model/bert.py). (Google's
# BERT learns its position vectors. The fixed ones follow the reference model.)
#
# Next: [5. Attention](5_attention.md)
