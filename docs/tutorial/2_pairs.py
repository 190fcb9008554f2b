# %% [markdown]
# # 2. Pairs
#
# BERT reads two sentences at a time and predicts whether the second follows the first. This task is *next sentence
# prediction* (NSP). This chapter makes such pairs from reviews and turns each pair into one row of ids.

# %%
import itertools

import numpy as np
import tutorial

from babybert.data.pairs import Pairs, assemble, make_pairs
from babybert.data.sentences import TokenizedDocuments, split_sentences
from babybert.data.tokenizer import CLS, SEP

tokenizer = tutorial.open_data().tokenizer
documents = tokenizer.encode_documents(list(itertools.islice(tutorial.reviews(), 2000)))
corpus = TokenizedDocuments(np.concatenate(documents), np.cumsum([0, *map(len, documents)]), np.arange(len(documents)))
print(f"{len(documents):,} reviews, {len(corpus.tokens):,} tokens end to end")

# %% [markdown]
# ## Sentences
#
# A sentence ends after `.`, `!` or `?`, or after such a character of another script; several of them in a row count as
# one end. The rule is simple, and it also splits after "Mr.". A sentence is stored as a range in one long array,
# `tokens[start:end]`. This avoids creating a Python object for each of millions of tokens.

# %%
sentences = split_sentences(corpus, tokenizer.sentence_end_ids())


def words_of(sentence: int) -> str:
    return tokenizer.join(tokenizer.tokens(corpus.tokens[sentences.start[sentence] : sentences.end[sentence]]))


print(f"{len(sentences):,} sentences. The first four of the first review:")
for sentence in range(4):
    print(f"{sentence}: {words_of(sentence)}")

# %% [markdown]
# ## Positive and negative pairs
#
# Sentences 0 and 1 of a review form one pair, sentences 2 and 3 the next. Half of the pairs become negatives: their
# second sentences are shuffled among themselves, so that each moves to the first sentence of another review.

# %%
pairs = make_pairs(corpus, sentences, seed=0, split=0)


def print_pair(pair: int) -> None:
    print(f"is_next {pairs.is_next[pair]}\n  A: {words_of(pairs.a[pair])}\n  B: {words_of(pairs.b[pair])}")


length_a, length_b = ((sentences.end - sentences.start)[sentence] for sentence in (pairs.a, pairs.b))
short = np.flatnonzero((length_a >= 7) & (length_b >= 7) & (length_a + length_b < 32))
print_pair(short[pairs.is_next[short] == 1][0])
print_pair(short[pairs.is_next[short] == 0][0])
print(f"{len(pairs):,} pairs, {pairs.is_next.mean():.1%} of them with the label 1")

# %% [markdown]
# Why shuffle instead of drawing any sentence of the corpus as a negative B? Because drawn sentences differ from true
# second sentences. Every true B is the second sentence of a pair, but a drawn sentence may open a review ("This is
# the worst film ...") or close it. A model could detect that without reading A. After shuffling, the B sentences of
# the negatives are exactly the second sentences of the same pairs, each used once.

# %%
negative = pairs.is_next == 0
assert set(pairs.b[negative]) <= set(pairs.a[negative] + 1)
assert len(set(pairs.b)) == len(pairs)  # each sentence is used once
assert (sentences.document[pairs.a[negative]] != sentences.document[pairs.b[negative]]).all()
assert (pairs.b[~negative] == pairs.a[~negative] + 1).all()

# %% [markdown]
# ## One row with special tokens
#
# A pair becomes `[CLS] A [SEP] B [SEP]`. `[CLS]` represents the whole pair: the NSP prediction is computed from its
# hidden state. `[SEP]` ends a sentence. *Segments* mark the two sentences with numbers: 1 for `[CLS] A [SEP]` and 2
# for `B [SEP]`. With segments the network does not have to count separators.

# %%
positive = short[pairs.is_next[short] == 1][:1]
ids, segments, offsets = assemble(
    corpus, sentences, Pairs(pairs.a[positive], pairs.b[positive], pairs.is_next[positive]), max_positions=128
)
for name, row in (("token", tokenizer.tokens(ids)), ("id", ids), ("segment", segments)):
    print(f"{name:<8}", *(f"{value!s:>8}" for value in row[:14]))

tokens_a, tokens_b = (
    corpus.tokens[sentences.start[sentence] : sentences.end[sentence]].tolist()
    for sentence in (pairs.a[positive][0], pairs.b[positive][0])
)
assert ids.tolist() == [CLS, *tokens_a, SEP, *tokens_b, SEP]
assert segments.tolist() == [1] * (len(tokens_a) + 2) + [2] * (len(tokens_b) + 1)

# %% [markdown]
# ## Lengths
#
# A row has at most 128 tokens. If a pair is longer, tokens are removed from the end of the longer sentence until the
# pair fits. In a batch, shorter rows are padded with `[PAD]`, id 0, which the network ignores.

# %%
ids, segments, offsets = assemble(corpus, sentences, pairs, max_positions=128)
lengths = np.diff(offsets)
print(f"mean length {lengths.mean():.1f} tokens; {np.mean(length_a + length_b + 3 > 128):.1%} of the pairs were cut")

figure, (rows, histogram) = tutorial.pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
picture = np.zeros((24, 128))
for row in range(24):
    row_tokens = slice(offsets[row], offsets[row + 1])
    picture[row, : lengths[row]] = np.where(ids[row_tokens] <= SEP, 3, segments[row_tokens])
colors = tutorial.pyplot.matplotlib.colors.ListedColormap(["white", "tab:blue", "tab:orange", "black"])
rows.imshow(picture[:, : lengths[:24].max()], cmap=colors, vmin=0, vmax=3, aspect="auto", interpolation="nearest")
rows.set(title="24 pairs: A, B; black: [CLS] and [SEP]", xlabel="position", ylabel="pair")
histogram.hist(lengths, bins=np.arange(0, 134, 4))
histogram.axvline(128, color="gray", linestyle=":")
histogram.set(title="lengths of all pairs", xlabel="tokens, special ones included", ylabel="pairs")
tutorial.show(figure, "2_pairs")

# %% [markdown]
# **In the package:** [`split_sentences`](../../babybert/data/sentences.py),
# [`make_pairs`](../../babybert/data/pairs.py), [`assemble`](../../babybert/data/pairs.py),
# [`truncate_longest_first`](../../babybert/data/pairs.py), and [`collate`](../../babybert/data/loader.py) for
# padding. Google's BERT uses the opposite label: there 0 means "B follows A".
#
# Next: [3. Masking](3_masking.md)
