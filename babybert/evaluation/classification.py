"""Scores of a text classifier, with bootstrap confidence intervals, next to the majority baseline.

Macro F1 is the mean of the classes' F1 scores, so rare classes count as much as frequent ones. The expected calibration
error (Guo et al., 2017) compares the probability of the likeliest class with how often that class is right. The
majority baseline answers the most frequent class of the training texts.

Training imports this module for validation: it must stay light.

Shapes: B texts of a batch, P texts, C classes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from babybert.data.loader import ordered_batches
from babybert.data.table import Examples
from babybert.evaluation.predictions import EvaluationStopped
from babybert.evaluation.statistics import LEVEL, Interval, Statistic, bootstrap, calibration_error_of, mean_of
from babybert.model.classifier import TextClassifier
from babybert.progress import Progress
from babybert.tables import format_table


@dataclass(frozen=True)
class ClassScores:
    """Means over held-out texts. The loss is in nats, the others are shares from 0 to 1."""

    texts: int
    class_loss: float
    class_accuracy: float
    macro_f1: float
    calibration_error: float
    majority_accuracy: float

    def as_dict(self) -> dict[str, float]:
        """The scores by name, rounded to six decimals, for JSON."""
        return {name: round(value, 6) for name, value in dataclasses.asdict(self).items()}

    def describe(self) -> str:
        """The loss, accuracy and macro F1 as one phrase."""
        return (
            f"class loss {self.class_loss:.3f}, accuracy {self.class_accuracy:.1%} "
            f"(majority {self.majority_accuracy:.1%}), macro F1 {self.macro_f1:.1%}"
        )


@torch.inference_mode()
def class_probabilities(
    model: TextClassifier,
    examples: Examples,
    batch_size: int,
    device: torch.device,
    task: str = "classify",
    should_stop: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """The probability of each class (P, C, float64), in the order of the examples. The model's mode is restored.

    Raises EvaluationStopped after the first batch at which `should_stop()` is true.
    """
    was_training = model.training
    model.eval()
    batches = []
    try:
        with Progress(task, len(examples), "texts") as progress:
            for batch in ordered_batches(examples, batch_size):
                ids_BT, _, segments_BT, class_B = batch.to(device)
                batches.append(model.class_logits(ids_BT, segments_BT).double().softmax(-1).cpu().numpy())
                progress.advance(len(class_B))
                if should_stop():
                    raise EvaluationStopped
    finally:
        model.train(was_training)
    return np.concatenate(batches)


def class_scores(probability_PC: np.ndarray, class_P: np.ndarray, majority: int) -> ClassScores:
    """The scores of these probabilities. `majority` is the most frequent class of the training texts."""
    once_P = np.ones(len(class_P))
    target_P = probability_PC[np.arange(len(class_P)), class_P]
    predicted_P = probability_PC.argmax(1)
    correct_P = predicted_P == class_P
    return ClassScores(
        texts=len(class_P),
        class_loss=float(-np.log(np.maximum(target_P, np.finfo(float).tiny)).mean()),
        class_accuracy=float(correct_P.mean()),
        macro_f1=macro_f1_of(predicted_P, class_P, probability_PC.shape[1])(once_P),
        calibration_error=calibration_error_of(probability_PC.max(1), correct_P)(once_P),
        majority_accuracy=float((class_P == majority).mean()),
    )


def f1_scores(predicted_P: np.ndarray, class_P: np.ndarray, weight_P: np.ndarray, classes: int) -> np.ndarray:
    """The F1 score of each class (C); NaN for one that is neither in the texts nor predicted."""
    correct_P = predicted_P == class_P
    correct_C = np.bincount(class_P, weight_P * correct_P, classes)
    answers_C = np.bincount(class_P, weight_P, classes) + np.bincount(predicted_P, weight_P, classes)
    f1_C: np.ndarray = np.divide(2 * correct_C, answers_C, out=np.full(classes, np.nan), where=answers_C > 0)
    return f1_C


def macro_f1_of(predicted_P: np.ndarray, class_P: np.ndarray, classes: int) -> Statistic:
    """The mean of the F1 scores of all classes that have one."""
    return lambda weight_P: float(np.nanmean(f1_scores(predicted_P, class_P, weight_P, classes)))


def _f1_of(predicted_P: np.ndarray, class_P: np.ndarray, classes: int, index: int) -> Statistic:
    return lambda weight_P: float(f1_scores(predicted_P, class_P, weight_P, classes)[index])


def class_report(
    probability_PC: np.ndarray, class_P: np.ndarray, classes: Sequence[str], majority: int, seed: int
) -> dict[str, Any]:
    """All scores with intervals, and the F1 score of each class, for JSON."""
    predicted_P = probability_PC.argmax(1)
    correct_P = (predicted_P == class_P).astype(float)
    statistics: dict[str, Statistic] = {
        "accuracy": mean_of(correct_P),
        "macro_f1": macro_f1_of(predicted_P, class_P, len(classes)),
        "calibration_error": calibration_error_of(probability_PC.max(1), correct_P),
        "majority_accuracy": mean_of((class_P == majority).astype(float)),
    }
    intervals = bootstrap(statistics, len(class_P), seed)
    f1 = bootstrap(
        {name: _f1_of(predicted_P, class_P, len(classes), index) for index, name in enumerate(classes)},
        len(class_P),
        seed,
    )
    count_C = np.bincount(class_P, minlength=len(classes))
    return {
        "texts": len(class_P),
        "loss": class_scores(probability_PC, class_P, majority).class_loss,
        **{name: interval_json(interval) for name, interval in intervals.items()},
        "classes": {
            name: {"texts": int(count_C[index]), "f1": interval_json(f1[name])} for index, name in enumerate(classes)
        },
        "intervals_hold": LEVEL,
        "intervals_resample": "texts",
    }


def interval_json(interval: Interval) -> dict[str, Any]:
    """A value with its interval; null where it is not defined."""
    value, low, high = (
        None if np.isnan(number) else float(number) for number in (interval.value, interval.low, interval.high)
    )
    return {"value": value, "interval": [low, high]}


def format_class_report(title: str, report: dict[str, Any]) -> str:
    """A report as a table of plain text."""
    interval = f"{report['intervals_hold']:.0%} interval"
    names = {
        "accuracy": "accuracy",
        "macro_f1": "macro F1",
        "calibration_error": "calibration error",
        "majority_accuracy": "majority's accuracy",
    }
    rows = [_row(name, report[key]) for key, name in names.items()]
    rows += [_row(f"F1 of {name}", facts["f1"]) for name, facts in report["classes"].items()]
    table = format_table(("score", "value", interval), rows, text_headers=("score", interval))
    return f"{title}: {report['texts']:,} texts, loss {report['loss']:.3f} nats\n{table}"


def _row(name: str, score: dict[str, Any]) -> tuple[str, str, str]:
    if score["value"] is None:
        return name, "", "no text has it"
    low, high = score["interval"]
    return name, f"{score['value']:.1%}", f"[{low:.1%}, {high:.1%}]"
