# %% [markdown]
# # 2. Pairs
#
# BERT reads two sentences at a time and is asked whether the second one follows the first: *next sentence prediction*
# (NSP). This chapter makes such pairs from reviews and lays each out as one row of ids.

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
# A sentence ends after `.`, `!` or `?` (a run of them is one end). The rule is crude: it cuts after "Mr." too. Sentences
# are kept as places in one long array, `tokens[start:end]`, so that no object is made for each of millions of tokens.

# %%
sentences = split_sentences(corpus, tokenizer.sentence_end_ids())


def words_of(sentence: int) -> str:
    return tokenizer.join(tokenizer.tokens(corpus.tokens[sentences.start[sentence] : sentences.end[sentence]]))


print(f"{len(sentences):,} sentences. The first four of the first review:")
for number in range(4):
    print(f"{number}: {words_of(number)}")

# %% [markdown]
# ## Pairs
#
# Sentences 0 and 1 of a review are one pair, 2 and 3 the next. Now half of the pairs must become wrong ones. The second
# sentences of that half are shuffled among themselves, so that each goes to another review's first sentence.

# %%
pairs = make_pairs(corpus, sentences, seed=0, split=0)


def show(pair: int) -> None:
    print(f"is_next {pairs.is_next[pair]}\n  A: {words_of(pairs.a[pair])}\n  B: {words_of(pairs.b[pair])}")


length_a, length_b = ((sentences.end - sentences.start)[s] for s in (pairs.a, pairs.b))
short = np.flatnonzero((length_a >= 7) & (length_b >= 7) & (length_a + length_b < 32))
show(short[pairs.is_next[short] == 1][0])
show(short[pairs.is_next[short] == 0][0])
print(f"{len(pairs):,} pairs, {pairs.is_next.mean():.1%} of them with the label 1")

# %% [markdown]
# Why shuffle, and not draw any sentence of the corpus as a wrong B? Because then B's of the two kinds would differ by
# themselves: every true B is a second sentence, but a drawn one may open a review ("This is the worst film ...") or close
# it. A model could see that without reading A. Shuffled, the B's of wrong pairs are exactly the sentences that were taken
# away: each once, none new.

# %%
wrong = pairs.is_next == 0
assert set(pairs.b[wrong]) <= set(pairs.a[wrong] + 1)
assert len(set(pairs.b)) == len(pairs)  # each sentence is used once
assert (sentences.document[pairs.a[wrong]] != sentences.document[pairs.b[wrong]]).all()
assert (pairs.b[~wrong] == pairs.a[~wrong] + 1).all()

# %% [markdown]
# ## One row, with special tokens
#
# A pair becomes `[CLS] A [SEP] B [SEP]`. `[CLS]` stands for the pair as a whole: the answer to "does B follow?" will be
# read off its place. `[SEP]` ends a sentence. *Segments* say the same in numbers, 1 for `[CLS] A [SEP]` and 2 for
# `B [SEP]`, so that the network need not count separators.

# %%
one = short[pairs.is_next[short] == 1][:1]
ids, segments, offsets = assemble(
    corpus, sentences, Pairs(pairs.a[one], pairs.b[one], pairs.is_next[one]), max_positions=128
)
for name, row in (("token", tokenizer.tokens(ids)), ("id", ids), ("segment", segments)):
    print(f"{name:<8}", *(f"{value!s:>8}" for value in row[:14]))

a, b = (corpus.tokens[sentences.start[s] : sentences.end[s]].tolist() for s in (pairs.a[one][0], pairs.b[one][0]))
assert ids.tolist() == [CLS, *a, SEP, *b, SEP]
assert segments.tolist() == [1] * (len(a) + 2) + [2] * (len(b) + 1)

# %% [markdown]
# ## How long they are
#
# A row may have 128 tokens. Of a longer pair, tokens are cut from the end of the longer sentence until it fits.
# In a batch, shorter rows are filled up with `[PAD]`, id 0, which the network does not look at.

# %%
ids, segments, offsets = assemble(corpus, sentences, pairs, max_positions=128)
lengths = np.diff(offsets)
print(f"mean length {lengths.mean():.1f} tokens; {np.mean(length_a + length_b + 3 > 128):.1%} of the pairs were cut")

figure, (rows, histogram) = tutorial.pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
picture = np.zeros((24, 128))
for row in range(24):
    own = slice(offsets[row], offsets[row + 1])
    picture[row, : lengths[row]] = np.where(ids[own] <= SEP, 3, segments[own])
colors = tutorial.pyplot.matplotlib.colors.ListedColormap(["white", "tab:blue", "tab:orange", "black"])
rows.imshow(picture[:, : lengths[:24].max()], cmap=colors, vmin=0, vmax=3, aspect="auto", interpolation="nearest")
rows.set(title="24 pairs: A, B; black: [CLS] and [SEP]", xlabel="position", ylabel="pair")
histogram.hist(lengths, bins=np.arange(0, 134, 4))
histogram.axvline(128, color="gray", linestyle=":")
histogram.set(title="lengths of all pairs", xlabel="tokens, special ones included", ylabel="pairs")
tutorial.show(figure, "2_pairs")

# %% [markdown]
# **In the package:** [`split_sentences`](../../babybert/data/pairs.py), [`make_pairs`](../../babybert/data/pairs.py),
# [`assemble`](../../babybert/data/pairs.py), [`truncate_longest_first`](../../babybert/data/pairs.py),
# [`collate`](../../babybert/data/loader.py) for the padding. Google's BERT has the label the other way round: there, 0 is
# "B follows".
#
# Next: [3. Masking](3_masking.md)
