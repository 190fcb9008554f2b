# %% [markdown]
# # 1. Tokens
#
# A neural network computes with numbers, but a review is a string. The first step splits the string into *tokens* and
# gives each distinct token a number, its *id*.

# %%
import itertools

import numpy as np
import tutorial

from babybert.data.basic_english import BasicEnglishTokenizer
from babybert.data.dataset import unigram_entropy
from babybert.data.tokenizer import RULES, SPECIAL_TOKENS, Tokenizer

texts = list(tutorial.reviews())
review = next(text for text in texts if len(text) < 400)
print(f"{len(texts):,} reviews. One of the short ones:\n\n{review[:160]}")

# %% [markdown]
# ## Splitting
#
# The rules are few. The text is lowercased, some punctuation marks become separate tokens, others are removed, and
# the result is split at white space. The rules are a list of replacements, so we can apply them by hand.

# %%
text = review.lower()
for old, new in RULES:
    text = text.replace(old, new)
by_hand = text.split()
print(by_hand[:24])

assert by_hand == [token.decode() for token in BasicEnglishTokenizer().split(review)]
for old, new in RULES:
    print(f"{old!r:>9} -> {new!r}")

# %% [markdown]
# In the package, [`BasicEnglishTokenizer.split`](../../babybert/data/basic_english.py) does this when data is
# prepared, and [`Tokenizer`](../../babybert/data/tokenizer.py) does it for text from users. Both use the same
# [`RULES`](../../babybert/data/tokenizer.py).
#
# ## Numbering
#
# One pass over all reviews counts the tokens. The most frequent token gets the smallest id. Five ids are reserved
# before it for special tokens. They are not words, and the next chapters explain them.

# %%
words = BasicEnglishTokenizer()
provisional = np.concatenate([words.add(text) for text in texts])
tokenizer, to_id = words.finish(min_frequency=1, vocab_size=None)
ids = to_id[provisional]

print(f"{len(ids):,} tokens, {tokenizer.size:,} different ids, {len(SPECIAL_TOKENS)} of them special:", *SPECIAL_TOKENS)
print("ids 5 to 14:", *tokenizer.tokens(range(5, 15)))
for token in by_hand[:8]:
    print(f"{token:>12} {tokenizer.id_of(token):>7,}")

# %% [markdown]
# Ids can be converted back to tokens, but not to the original text: capital letters and spacing are lost.
#
# A vocabulary of whole words does not cover other words. Any word that was not in the training text becomes `[UNK]`.
# WordPiece, the tokenizer of the original BERT, avoids this by splitting rare words into pieces
# ([`WordPieceTrainer`](../../babybert/data/wordpiece_trainer.py)).


# %%
def round_trip(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.tokens(tokenizer.encode(text))


print(round_trip(tokenizer, "It's a brilliant MOVIE, isn't it? Quuxly so."))
assert round_trip(tokenizer, "quuxly") == ["[UNK]"]

# %% [markdown]
# ## Few words are frequent, most are rare
#
# In the left plot each point is a token: its number of occurrences against its rank by frequency. A straight line on
# these logarithmic axes is Zipf's law. It matters for training: the model sees a few words all the time and most
# words hardly ever.

# %%
counts = np.bincount(ids, minlength=tokenizer.size)[len(SPECIAL_TOKENS) :]
share = np.cumsum(counts) / counts.sum()
half = int(np.searchsorted(share, 0.5)) + 1
assert (np.diff(counts) <= 0).all()
print(f"the {half} most frequent words are half of the text; {np.mean(counts == 1):.0%} of all words occur once")

figure, (zipf, covered) = tutorial.pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
zipf.loglog(np.arange(1, len(counts) + 1), counts, ".", markersize=3)
for rank in itertools.takewhile(lambda rank: rank <= len(counts), (1, 10, 100, 1000, 10_000)):
    zipf.annotate(tokenizer.token(rank + 4), (rank, counts[rank - 1]), xytext=(3, 5), textcoords="offset points")
zipf.set(
    xlabel="rank by frequency", ylabel="occurrences", title="how often each word occurs", ylim=(0.5, 6 * counts[0])
)
covered.semilogx(np.arange(1, len(counts) + 1), share)
covered.axvline(half, color="gray", linestyle=":")
covered.axhline(0.5, color="gray", linestyle=":")
covered.set(
    xlabel="number of most frequent words", ylabel="share of the text", title="share they cover", ylim=(0, 1.02)
)
tutorial.show(figure, "1_tokens")

# %% [markdown]
# ## The unigram baseline
#
# The simplest model of masked words ignores the context. It predicts each word with probability p, the word's share
# of the text. Its loss is the mean of -ln p over all words, measured in *nats*. This is the *unigram baseline*, and
# every model in this tutorial is compared with it. By hand, for the most frequent word:

# %%
p = counts[0] / counts.sum()
print(f"p({tokenizer.token(5)}) = {counts[0]:,} / {counts.sum():,} = {p:.4f},  -ln p = {-np.log(p):.3f}")
print(f"mean of -ln p over all tokens: {unigram_entropy(counts):.3f} nats")
print(f"uniform distribution: ln {len(counts):,} = {np.log(len(counts)):.3f} nats")
assert np.isclose(unigram_entropy(counts), -(counts / counts.sum() * np.log(counts / counts.sum())).sum())

# %% [markdown]
# **In the package:** [`BasicEnglishTokenizer`](../../babybert/data/basic_english.py),
# [`Tokenizer`](../../babybert/data/tokenizer.py), [`open_corpus`](../../babybert/corpus/documents.py),
# [`unigram_entropy`](../../babybert/data/dataset.py).
#
# Next: [2. Pairs](2_pairs.md)
