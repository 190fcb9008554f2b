"""Nothing but the words of a pair tells whether its second sentence follows the first."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from babybert.config import PrepareConfig
from babybert.data.dataset import open_dataset
from babybert.data.prepare import prepare
from babybert.data.table import Examples


@pytest.mark.parametrize("segments", ["sentences", "runs"])
def test_the_layout_of_a_pair_does_not_tell_its_label(tmp_path: Path, segments: Literal["sentences", "runs"]) -> None:
    """A classifier that sees lengths, punctuation and positions, but no words, must stay at chance.

    The texts resemble real reviews: their lengths differ, and first and last sentences differ from the others. The
    classifier is fitted on one half of the pairs and tested on the other. The bound is five standard deviations of a
    coin toss.
    """
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(300)]
    for document in range(1500):
        sentences = []
        count = int(rng.integers(2, 14))
        for sentence in range(count):
            is_first = sentence == 0
            is_last = sentence == count - 1
            scale = 2 if is_first else 0.5 if is_last else 1
            length = max(2, int(rng.gamma(3, 6) * scale))
            end = rng.choice(["...", "?!", "!!!", "."] if is_last else [".", ".", ".", "?"])
            sentences.append(" ".join(rng.choice(words, length)) + end)
        (tmp_path / f"{document}.txt").write_text(" ".join(sentences) + ("" if document % 3 else " no end"))
    out = tmp_path / "data"
    prepare(PrepareConfig(corpus="text", source=(str(tmp_path),), out=out, max_positions=64, segments=segments))
    dataset = open_dataset(tmp_path / "data")
    examples = dataset.examples("train")
    features = layout_features(examples, dataset.tokenizer.sentence_end_ids())
    labels = examples.is_next
    assert len(labels) > 3000
    half = len(labels) // 2
    bound = 5 * 0.5 / (len(labels) - half) ** 0.5

    def accuracy(features: np.ndarray) -> float:
        predict = fit(features[:half], labels[:half])
        return float((predict(features[half:]) == labels[half:]).mean())

    assert abs(accuracy(features) - 0.5) < bound
    # The classifier does find a label that leaks.
    noisy_labels = labels + rng.normal(0, 0.5, len(labels))
    assert accuracy(np.column_stack([features, noisy_labels])) > 0.5 + bound


def layout_features(examples: Examples, end_ids: np.ndarray) -> np.ndarray:
    """Everything that can be seen without knowing a word, with squares and products."""
    rows = []
    for row in range(len(examples)):
        pair = examples.rows(row, row + 1)
        ids = pair.original_ids()
        length_a = int((pair.segments == 1).sum()) - 2
        length_b = len(ids) - length_a - 3
        lengths = [length_a, length_b, len(ids), np.log(length_a), np.log(length_b)]
        last_tokens = [ids[length_a], ids[-2], ids[length_a - 1], ids[-3]]
        is_frequent = [token == frequent for token in last_tokens for frequent in range(5, 9)]
        masked_tokens = int((pair.labels > 0).sum())
        is_end = np.isin(ids, end_ids)
        ends = [int(is_end[pair.segments == segment].sum()) for segment in (1, 2)]
        rows.append([*lengths, *ends, *is_frequent, masked_tokens])
    x = np.array(rows, float)
    x = (x - x.mean(0)) / (x.std(0) + 1e-9)
    return np.column_stack([x, x[:, :7] ** 2, x[:, :1] * x, x[:, 1:2] * x])


def fit(features: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Logistic regression by gradient descent; returns a function that predicts labels."""
    x = np.column_stack([features, np.ones(len(features))])
    weights = np.zeros(x.shape[1])
    for _ in range(300):
        probabilities = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        weights += 0.1 * x.T @ (labels - probabilities) / len(x)

    def predict(new: np.ndarray) -> np.ndarray:
        return (np.column_stack([new, np.ones(len(new))]) @ weights > 0).astype(int)

    return predict
