"""`babybert probe`: what a linear classifier can read off the frozen states of a model (Alain and Bengio, 2016).

Each document is `[CLS] text [SEP]`, cut to the first positions. Its features are the state at `[CLS]` or the mean of
the states of all its tokens; the classifier is a logistic regression whose C is chosen on a fifth of the training
documents. The same probe on a model of the same sizes that was never trained says how much of it training gave, and on
the words themselves (which are there or not, as Wang and Manning, 2012) how much states of this width lose. All of
them see the same tokens.

Shapes: P documents, T positions, D width, F features.
"""

from typing import Any

import numpy as np
import torch

from babybert.corpus.labelled import Labelled
from babybert.data.tokenizer import CLS, FIRST_ORDINARY, PAD, SEP, Tokenizer
from babybert.evaluation.nsp_baselines import scikit_learn
from babybert.evaluation.statistics import LEVEL, bootstrap, mean_of
from babybert.model.bert import BabyBert
from babybert.progress import Progress, say

CHOICES_OF_C = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
VALIDATION_SHARE = 0.2
ITERATIONS = 2000


def probe(
    model: BabyBert,
    tokenizer: Tokenizer,
    train: list[Labelled],
    test: list[Labelled],
    positions: int,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """Test accuracies with intervals, as JSON has them. Raises UsageError without scikit-learn."""
    scikit_learn("linear_model")  # if it is missing, that is better known before the work
    label = max(document.label for document in train)
    y_train, y_test = (np.array([document.label == label for document in part]) for part in (train, test))
    positions = min(positions, model.config.max_positions)
    ids_train, ids_test = (_encode(tokenizer, part, positions) for part in (train, test))
    torch.manual_seed(seed)
    fresh = BabyBert(model.config)
    features = {"bag of words": tuple(_bag_of_words(ids, tokenizer.size) for ids in (ids_train, ids_test))}
    for name, network in (("trained", model), ("untrained", fresh)):
        network = network.to(device).eval()
        (cls_train, mean_train), (cls_test, mean_test) = (
            _states(network, ids, batch_size, device, f"{name} states") for ids in (ids_train, ids_test)
        )
        features[f"{name}, [CLS]"], features[f"{name}, mean"] = (cls_train, cls_test), (mean_train, mean_test)
    correct, chosen = {"majority": (y_test == (y_train.mean() > 0.5)).astype(float)}, {}
    for name, (x_train, x_test) in features.items():
        say(f"fit: {name}")
        answer, chosen[name] = _fit(x_train, y_train, x_test, seed, scale=name != "bag of words")
        correct[name] = (answer == y_test).astype(float)
    statistics = {name: mean_of(own_P) for name, own_P in correct.items()}
    for pooled in ("[CLS]", "mean"):
        statistics[f"gain of training, {pooled}"] = mean_of(
            correct[f"trained, {pooled}"] - correct[f"untrained, {pooled}"]
        )
    intervals = bootstrap(statistics, len(test), seed)
    return {
        "documents_to_learn_from": len(train),
        "documents_to_test_with": len(test),
        "positions": positions,
        "accuracy": {
            name: {"value": own.value, "interval": [own.low, own.high], "C": chosen.get(name)}
            for name, own in intervals.items()
        },
        "intervals_hold": LEVEL,
        "intervals_resample": "documents",
    }


def _encode(tokenizer: Tokenizer, documents: list[Labelled], positions: int) -> list[np.ndarray]:
    encoded = tokenizer.encode_documents([document.text for document in documents])
    return [np.concatenate([[CLS], ids[: positions - 2], [SEP]]).astype(np.int64) for ids in encoded]


@torch.inference_mode()
def _states(
    model: BabyBert, documents: list[np.ndarray], batch_size: int, device: torch.device, task: str
) -> tuple[np.ndarray, np.ndarray]:
    """The state at `[CLS]` and the mean over the tokens, (P, D) each."""
    cls, mean = np.zeros((len(documents), model.config.width)), np.zeros((len(documents), model.config.width))
    order = np.argsort([len(ids) for ids in documents], kind="stable")  # little padding
    with Progress(task, len(documents), "documents") as progress:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            ids_BT = torch.nn.utils.rnn.pad_sequence(
                [torch.from_numpy(documents[row]) for row in rows], batch_first=True, padding_value=PAD
            ).to(device)
            real_BT = ids_BT != PAD
            hidden_BTD = model(ids_BT, real_BT.long())
            cls[rows] = hidden_BTD[:, 0].cpu().numpy()
            mean[rows] = ((hidden_BTD * real_BT[:, :, None]).sum(1) / real_BT.sum(1, keepdim=True)).cpu().numpy()
            progress.advance(len(rows))
    return cls, mean


def _bag_of_words(documents: list[np.ndarray], vocab_size: int) -> Any:
    """Which words a document has (P, V), sparse."""
    from scipy.sparse import csr_array

    words = [np.unique(ids[ids >= FIRST_ORDINARY]) for ids in documents]
    ends = np.concatenate([[0], np.cumsum([len(own) for own in words])])
    columns = np.concatenate(words)
    return csr_array((np.ones(len(columns)), columns, ends), shape=(len(documents), vocab_size))


def _fit(x_train: Any, y_train: np.ndarray, x_test: Any, seed: int, scale: bool) -> tuple[np.ndarray, float]:
    """Answers for the test documents, and the C that was best on the validation documents."""
    linear, preprocessing, pipeline = (scikit_learn(name) for name in ("linear_model", "preprocessing", "pipeline"))

    def fitted(c: float, rows: np.ndarray) -> Any:
        steps = [preprocessing.StandardScaler()] if scale else []
        return pipeline.make_pipeline(*steps, linear.LogisticRegression(C=c, max_iter=ITERATIONS)).fit(
            x_train[rows], y_train[rows]
        )

    order = np.random.default_rng(seed).permutation(len(y_train))
    held = max(1, round(VALIDATION_SHARE * len(order)))
    rows, validation = order[held:], order[:held]
    if len(np.unique(y_train[rows])) < 2:  # too few documents to choose with
        return fitted(1.0, order).predict(x_test), 1.0
    best = max(
        CHOICES_OF_C,
        key=lambda c: (float((fitted(c, rows).predict(x_train[validation]) == y_train[validation]).mean()), -c),
    )
    return fitted(best, order).predict(x_test), best


def show(found: dict[str, Any]) -> str:
    """The accuracies for people."""
    lines = [
        f"{found['documents_to_learn_from']:,} documents to learn from, {found['documents_to_test_with']:,} to test with, their first {found['positions']} tokens",
        "",
        f"{'linear probe':<28}{'accuracy':>10}  {found['intervals_hold']:.0%} interval",
    ]
    for name, own in found["accuracy"].items():
        low, high = own["interval"]
        chosen = f"   C = {own['C']:g}" if own["C"] else ""
        lines.append(f"{name:<28}{own['value']:>10.1%}  [{low:.1%}, {high:.1%}]{chosen}")
    return "\n".join(lines)
