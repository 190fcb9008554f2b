"""`babybert probe`: what a linear classifier reads from the frozen hidden states of a model (Alain and Bengio, 2016).

Each document is `[CLS] text [SEP]`, cut to the first `positions` tokens. Its features are the hidden state at `[CLS]`,
or the mean of the hidden states of all its tokens. The classifier is a logistic regression whose C is chosen on a fifth
of the training documents. Two comparisons show what the accuracies mean: the same probe on an untrained model of the
same sizes, and a bag of words (which words occur, as in Wang and Manning, 2012). All of them see the same tokens.

Cost: two passes of a model over all documents, and up to seven regressions for each kind of features.

Shapes: P documents, B documents of a batch, T positions, D width, V vocabulary, F features.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from babybert.corpus.labelled import Labelled
from babybert.data.tokenizer import CLS, FIRST_ORDINARY, PAD, SEP, Tokenizer
from babybert.evaluation.nsp_baselines import scikit_learn
from babybert.evaluation.statistics import LEVEL, bootstrap, mean_of
from babybert.model.bert import BabyBert, keep_bf16_weights
from babybert.model.precision import PRECISIONS
from babybert.progress import Progress
from babybert.tables import format_table

logger = logging.getLogger(__name__)

CHOICES_OF_C = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)  # inverse strengths of the L2 penalty
VALIDATION_SHARE = 0.2
MOST_ITERATIONS = 2000
BAG_OF_WORDS = "bag of words"
POOLINGS = ("[CLS]", "mean")


@dataclass(frozen=True)
class ProbeFeatures:
    """The features of the documents to learn from and of those to test with (P, F each); a bag of words is sparse."""

    train: Any
    test: Any


def probe(
    model: BabyBert,
    tokenizer: Tokenizer,
    train: list[Labelled],
    test: list[Labelled],
    positions: int,
    seed: int,
    batch_size: int,
    device: torch.device,
    bf16: bool = False,
) -> dict[str, Any]:
    """Accuracies on the test documents with confidence intervals, as `babybert probe --json` prints them.

    `seed` draws the weights of the untrained model, the validation documents and the resamples. `bf16` runs the
    encoder in bf16. Raises UsageError without scikit-learn.
    """
    scikit_learn("linear_model")  # fail before the work if it is missing
    positive = max(document.label for document in train)
    is_positive_train = np.array([document.label == positive for document in train])
    is_positive_test = np.array([document.label == positive for document in test])
    positions = min(positions, model.config.max_positions)

    ids_train = encode_documents(tokenizer, train, positions)
    ids_test = encode_documents(tokenizer, test, positions)
    features = _all_features(model, ids_train, ids_test, tokenizer.size, seed, batch_size, device, bf16)
    majority = is_positive_train.mean() > 0.5
    correct = {"majority": (is_positive_test == majority).astype(float)}
    chosen_c: dict[str, float] = {}
    for name, feature in features.items():
        logger.info("fit: %s", name)
        predicted, chosen_c[name] = fit_and_predict(feature, is_positive_train, seed, scale=name != BAG_OF_WORDS)
        correct[name] = (predicted == is_positive_test).astype(float)

    statistics = {name: mean_of(correct_P) for name, correct_P in correct.items()}
    for pooling in POOLINGS:
        gain_P = correct[f"trained, {pooling}"] - correct[f"untrained, {pooling}"]
        statistics[f"gain of training, {pooling}"] = mean_of(gain_P)
    intervals = bootstrap(statistics, len(test), seed)
    return {
        "documents_to_learn_from": len(train),
        "documents_to_test_with": len(test),
        "positions": positions,
        "precision": PRECISIONS[bf16],
        "accuracy": {
            name: {"value": interval.value, "interval": [interval.low, interval.high], "C": chosen_c.get(name)}
            for name, interval in intervals.items()
        },
        "intervals_hold": LEVEL,
        "intervals_resample": "documents",
    }


def _all_features(
    model: BabyBert,
    ids_train: list[np.ndarray],
    ids_test: list[np.ndarray],
    vocab_size: int,
    seed: int,
    batch_size: int,
    device: torch.device,
    bf16: bool,
) -> dict[str, ProbeFeatures]:
    """Each kind of features by its name in the report."""
    torch.manual_seed(seed)
    untrained = BabyBert(model.config)
    features = {BAG_OF_WORDS: ProbeFeatures(bag_of_words(ids_train, vocab_size), bag_of_words(ids_test, vocab_size))}
    for name, network in (("trained", model), ("untrained", untrained)):
        network = network.to(device).eval()
        states_train = pooled_states(network, ids_train, batch_size, device, f"{name} states", bf16)
        states_test = pooled_states(network, ids_test, batch_size, device, f"{name} states", bf16)
        for pooling, train_PD, test_PD in zip(POOLINGS, states_train, states_test, strict=True):
            features[f"{name}, {pooling}"] = ProbeFeatures(train_PD, test_PD)
    return features


def encode_documents(tokenizer: Tokenizer, documents: list[Labelled], positions: int) -> list[np.ndarray]:
    """`[CLS] text [SEP]` of each document, cut to `positions` tokens."""
    encoded = tokenizer.encode_documents([document.text for document in documents])
    return [np.concatenate([[CLS], ids[: positions - 2], [SEP]]).astype(np.int64) for ids in encoded]


@torch.inference_mode()
def pooled_states(
    model: BabyBert,
    documents: list[np.ndarray],
    batch_size: int,
    device: torch.device,
    task: str,
    bf16: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """For each document the hidden state at `[CLS]` and the mean over its tokens, (P, D) each."""
    cls_PD = np.zeros((len(documents), model.config.width))
    mean_PD = np.zeros((len(documents), model.config.width))
    # Batches of documents of near-equal length have little padding.
    order = np.argsort([len(ids) for ids in documents], kind="stable")
    with keep_bf16_weights(model), Progress(task, len(documents), "documents") as progress:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            ids_BT = _pad([documents[row] for row in rows]).to(device)
            real_BT = ids_BT != PAD
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                hidden_BTD = model(ids_BT, real_BT.long()).float()  # segment 1 for tokens, 0 for padding
            mean_BD = (hidden_BTD * real_BT[:, :, None]).sum(1) / real_BT.sum(1, keepdim=True)
            cls_PD[rows] = hidden_BTD[:, 0].cpu().numpy()
            mean_PD[rows] = mean_BD.cpu().numpy()
            progress.advance(len(rows))
    return cls_PD, mean_PD


def _pad(documents: list[np.ndarray]) -> Tensor:
    """The documents' ids as one tensor (B, T), padded to the longest of them."""
    tensors = [torch.from_numpy(ids) for ids in documents]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=PAD)


def bag_of_words(documents: list[np.ndarray], vocab_size: int) -> Any:
    """Which ordinary tokens occur in each document: a sparse array (P, V) of zeros and ones."""
    from scipy.sparse import csr_array

    words = [np.unique(ids[ids >= FIRST_ORDINARY]) for ids in documents]
    row_ends = np.concatenate([[0], np.cumsum([len(row) for row in words])])
    columns = np.concatenate(words)
    return csr_array((np.ones(len(columns)), columns, row_ends), shape=(len(documents), vocab_size))


def fit_and_predict(
    features: ProbeFeatures,
    label_P: np.ndarray,
    seed: int,
    scale: bool,
    choices_of_c: Sequence[float] = CHOICES_OF_C,
) -> tuple[np.ndarray, float]:
    """Predicted labels of the test documents, and the C with the best accuracy on the validation documents.

    `label_P` are the labels of the training documents. `scale` standardises the features.
    """
    linear_model = scikit_learn("linear_model")
    preprocessing = scikit_learn("preprocessing")
    pipeline = scikit_learn("pipeline")

    def fit(c: float, rows: np.ndarray) -> Any:
        steps = [preprocessing.StandardScaler()] if scale else []
        regression = linear_model.LogisticRegression(C=c, max_iter=MOST_ITERATIONS)
        return pipeline.make_pipeline(*steps, regression).fit(features.train[rows], label_P[rows])

    order = np.random.default_rng(seed).permutation(len(label_P))
    validation_size = max(1, round(VALIDATION_SHARE * len(order)))
    validation, rows = order[:validation_size], order[validation_size:]
    if len(np.unique(label_P[rows])) < 2:  # too few documents to choose a C with
        return fit(1.0, order).predict(features.test), 1.0

    def validation_accuracy(c: float) -> float:
        predicted = fit(c, rows).predict(features.train[validation])
        return float((predicted == label_P[validation]).mean())

    # Of several choices that are equally accurate, the smallest C: the strongest penalty.
    best_c = max(choices_of_c, key=lambda c: (validation_accuracy(c), -c))
    return fit(best_c, order).predict(features.test), best_c


def format_probe(results: dict[str, Any]) -> str:
    """The results of `probe` as a table of plain text."""
    encoder = ", encoder in bf16" if results["precision"] == "bf16" else ""
    title = (
        f"{results['documents_to_learn_from']:,} documents to learn from, {results['documents_to_test_with']:,} to "
        f"test with, their first {results['positions']} tokens{encoder}"
    )
    rows = []
    for name, accuracy in results["accuracy"].items():
        low, high = accuracy["interval"]
        chosen_c = f"{accuracy['C']:g}" if accuracy["C"] else ""
        rows.append((name, f"{accuracy['value']:.1%}", f"[{low:.1%}, {high:.1%}]", chosen_c))
    interval = f"{results['intervals_hold']:.0%} interval"
    headers = ("linear probe", "accuracy", interval, "C")
    return f"{title}\n\n{format_table(headers, rows, text_headers=('linear probe', interval))}"
