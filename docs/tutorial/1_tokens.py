# %% [markdown]
# # 1. Tokens
#
# A network computes with numbers; a review is a string. The first step cuts the string into *tokens* and gives each
# distinct token a number, its *id*.

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
# ## Cutting
#
# The rules are few: lower case; some marks become tokens of their own, some vanish; then split at blanks. They are a
# list of replacements, so we can do by hand what the package does.

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
# The package does it in [`BasicEnglishTokenizer.split`](../../babybert/data/words.py), and for text from users in
# [`Tokenizer`](../../babybert/data/tokenizer.py); both read the same
# [`RULES`](../../babybert/data/tokenizer.py).
#
# ## Numbering
#
# One pass over all reviews counts the tokens. The most frequent one gets the smallest id. Five ids come before: they
# are no words, and the next chapters need them.

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
# Ids turn back into tokens, but not into the very text: capital letters and blanks are gone.
#
# A vocabulary of whole words knows no other words. What it has never seen becomes `[UNK]`, whatever it means. (Pieces of
# words, as BERT's own WordPiece has them, mend that: [`Tokenizer.train_wordpiece`](../../babybert/data/tokenizer.py).)


# %%
def there_and_back(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.tokens(tokenizer.encode(text))


print(there_and_back(tokenizer, "It's a brilliant MOVIE, isn't it? Quuxly so."))
assert there_and_back(tokenizer, "quuxly") == ["[UNK]"]

# %% [markdown]
# ## Few words are frequent, most are rare
#
# Below, each token is a point: how often it occurs against its place in the order. On such axes a straight line is
# Zipf's law. It decides much of what follows: the model meets a few words all the time, and most words hardly ever.

# %%
counts = np.bincount(ids, minlength=tokenizer.size)[len(SPECIAL_TOKENS) :]
share = np.cumsum(counts) / counts.sum()
half = int(np.searchsorted(share, 0.5)) + 1
assert (np.diff(counts) <= 0).all()
print(f"the {half} most frequent words are half of the text; {np.mean(counts == 1):.0%} of all words occur once")

figure, (zipf, covered) = tutorial.pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
zipf.loglog(np.arange(1, len(counts) + 1), counts, ".", markersize=3)
for place in itertools.takewhile(lambda place: place <= len(counts), (1, 10, 100, 1000, 10_000)):
    zipf.annotate(tokenizer.token(place + 4), (place, counts[place - 1]), xytext=(3, 5), textcoords="offset points")
zipf.set(
    xlabel="place in the order", ylabel="occurrences", title="how often each word occurs", ylim=(0.5, 6 * counts[0])
)
covered.semilogx(np.arange(1, len(counts) + 1), share)
covered.axvline(half, color="gray", linestyle=":")
covered.axhline(0.5, color="gray", linestyle=":")
covered.set(xlabel="so many most frequent words", ylabel="share of the text", title="what they cover", ylim=(0, 1.02))
tutorial.show(figure, "1_tokens")

# %% [markdown]
# ## The number to beat
#
# Guess a hidden word from the counts alone: give each word its share p of the text. The mean of -ln p over all words is
# then the price of a guess, in *nats*. It is the loss of a model that knows how frequent words are and nothing else, and
# every model in this walk is measured against it. By hand, for the most frequent word:

# %%
p = counts[0] / counts.sum()
print(f"p({tokenizer.token(5)}) = {counts[0]:,} / {counts.sum():,} = {p:.4f},  -ln p = {-np.log(p):.3f}")
print(f"mean of -ln p over all tokens: {unigram_entropy(counts):.3f} nats")
print(f"every word alike: ln {len(counts):,} = {np.log(len(counts)):.3f} nats")
assert np.isclose(unigram_entropy(counts), -(counts / counts.sum() * np.log(counts / counts.sum())).sum())

# %% [markdown]
# **In the package:** [`BasicEnglishTokenizer`](../../babybert/data/words.py), [`Tokenizer`](../../babybert/data/tokenizer.py),
# [`open_corpus`](../../babybert/data/corpus.py), [`unigram_entropy`](../../babybert/data/dataset.py).
#
# Next: [2. Pairs](2_pairs.md)
