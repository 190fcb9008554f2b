"""Classifiers to compare a fine-tuned model with: a bag of words, and a linear probe of the frozen pretrained model.

Both are logistic regressions whose C is chosen on a fifth of the training texts. They see the tokens that the
fine-tuned model sees. The bag of words weights the words by TF-IDF (Salton and Buckley, 1988). The probe reads the mean
of the hidden states, which keeps more than the state at `[CLS]` of a model that was not fine-tuned.

Shapes: P texts, T positions, D width, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array

from babybert.data.loader import ordered_batches
from babybert.data.table import Examples
from babybert.data.tokenizer import FIRST_ORDINARY, PAD
from babybert.evaluation.classification import interval_json, macro_f1_of
from babybert.evaluation.nsp_baselines import scikit_learn
from babybert.evaluation.probe import ProbeFeatures, fit_and_predict
from babybert.evaluation.statistics import Statistic, bootstrap, mean_of
from babybert.model.bert import BertEncoder
from babybert.progress import Progress
from babybert.tables import format_table

CHOICES_OF_C = (1.0, 10.0, 100.0)  # TF-IDF is small: with a stronger penalty, few texts would all get one class
FINE_TUNED, BAG_OF_WORDS, FROZEN_PROBE = "fine-tuned", "bag of words", "frozen probe"


def bag_of_words_predictions(train: Examples, test: Examples, vocab_size: int, seed: int) -> np.ndarray:
    """The classes (P) of the test texts, by TF-IDF and logistic regression. Raises UsageError without scikit-learn."""
    weigh = scikit_learn("feature_extraction.text").TfidfTransformer(sublinear_tf=True)
    features = ProbeFeatures(
        weigh.fit_transform(_word_counts(train, vocab_size)), weigh.transform(_word_counts(test, vocab_size))
    )
    return fit_and_predict(features, train.is_next, seed, scale=False, choices_of_c=CHOICES_OF_C)[0]


def probe_predictions(
    model: BertEncoder, train: Examples, test: Examples, batch_size: int, device: torch.device, seed: int
) -> np.ndarray:
    """The classes (P) of the test texts, by logistic regression on the model's mean hidden states."""
    model = model.to(device)
    states = [_mean_states(model, examples, batch_size, device) for examples in (train, test)]
    return fit_and_predict(ProbeFeatures(*states), train.is_next, seed, scale=True)[0]


def _word_counts(examples: Examples, vocab_size: int) -> Any:
    """How often each ordinary token is in each text: a sparse array (P, V)."""
    text_of_token = np.repeat(np.arange(len(examples)), np.diff(examples.offsets))
    is_word = examples.ids >= FIRST_ORDINARY
    places = (text_of_token[is_word], examples.ids[is_word])
    return csr_array((np.ones(len(places[0])), places), shape=(len(examples), vocab_size))


@torch.inference_mode()
def _mean_states(model: BertEncoder, examples: Examples, batch_size: int, device: torch.device) -> np.ndarray:
    """The mean of the hidden states of each text (P, D)."""
    model.eval()
    means = []
    with Progress("frozen states", len(examples), "texts") as progress:
        for batch in ordered_batches(examples, batch_size):
            ids_BT, _, segments_BT, _ = batch.to(device)
            is_token_BT = ids_BT != PAD
            hidden_BTD = model(ids_BT, segments_BT).float()
            sums_BD = (hidden_BTD * is_token_BT[:, :, None]).sum(1)
            means.append((sums_BD / is_token_BT.sum(1, keepdim=True)).cpu().numpy())
            progress.advance(len(ids_BT))
    return np.concatenate(means)


def compare_predictions(
    predictions: dict[str, np.ndarray], class_P: np.ndarray, classes: int, seed: int
) -> dict[str, Any]:
    """Accuracy and macro F1 of each classifier, and how far the fine-tuned model is ahead in accuracy."""
    statistics: dict[str, Statistic] = {}
    for name, predicted_P in predictions.items():
        correct_P = (predicted_P == class_P).astype(float)
        statistics[f"{name}: accuracy"] = mean_of(correct_P)
        statistics[f"{name}: macro_f1"] = macro_f1_of(predicted_P, class_P, classes)
        ahead_P = (predictions[FINE_TUNED] == class_P) - correct_P
        statistics[f"{name}: fine_tuned_is_ahead"] = mean_of(ahead_P)
    intervals = bootstrap(statistics, len(class_P), seed)
    compared: dict[str, Any] = {name: {} for name in predictions}
    for key, interval in intervals.items():
        name, _, score = key.partition(": ")
        compared[name][score] = interval_json(interval)
    return compared


def format_comparison(compared: dict[str, Any]) -> str:
    """The comparison as a table of plain text."""
    rows = []
    for name, scores in compared.items():
        accuracy, ahead = scores["accuracy"], scores["fine_tuned_is_ahead"]
        low, high = ahead["interval"]
        advantage = "" if name == FINE_TUNED else f"{ahead['value']:+.1%} [{low:+.1%}, {high:+.1%}]"
        rows.append((name, f"{accuracy['value']:.1%}", f"{scores['macro_f1']['value']:.1%}", advantage))
    headers = ("classifier", "accuracy", "macro F1", "fine-tuned is ahead by")
    return format_table(headers, rows, text_headers=("classifier", "fine-tuned is ahead by"))
