"""The evaluation loop: its two ways to the losses agree, it restores the model's mode, and it can be stopped."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from babybert.config import ModelConfig
from babybert.data.dataset import Dataset
from babybert.evaluation.predictions import EvaluationStopped, predict
from babybert.model.bert import BabyBert

CPU = torch.device("cpu")


@pytest.fixture
def bert(demo: Dataset) -> BabyBert:
    torch.manual_seed(0)
    return BabyBert(ModelConfig(vocab_size=demo.tokenizer.size, width=8, heads=2, layers=1, feed_forward=16))


def test_token_losses_add_up_to_the_sum_of_the_loss_function(bert: BabyBert, demo: Dataset) -> None:
    examples = demo.examples("validation")
    with_sums = predict(bert, examples, 7, CPU)
    with_token_losses = predict(bert, examples, 7, CPU, token_losses=True)
    assert len(with_sums.loss_N) == 0
    assert len(with_token_losses.loss_N) == len(with_token_losses.rank_N) == np.count_nonzero(examples.labels)
    assert with_token_losses.mlm_loss_sum == pytest.approx(with_sums.mlm_loss_sum, rel=1e-6)
    assert with_token_losses.loss_N.sum() == pytest.approx(with_sums.mlm_loss_sum, rel=1e-6)
    assert (with_token_losses.rank_N == with_sums.rank_N).all()
    assert (with_token_losses.nsp_logits_P2 == with_sums.nsp_logits_P2).all()


def test_next_sentence_losses_are_those_of_the_probabilities(bert: BabyBert, demo: Dataset) -> None:
    examples = demo.examples("validation")
    predictions = predict(bert, examples, 7, CPU)
    probability_P = predictions.is_next_probabilities()
    label_probability_P = np.where(examples.is_next == 1, probability_P, 1 - probability_P)
    assert predictions.nsp_logits_P2.shape == (len(examples), 2)
    assert predictions.nsp_loss_sum == pytest.approx(-np.log(label_probability_P).sum(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored(bert: BabyBert, demo: Dataset, training: bool) -> None:
    bert.train(training)
    predict(bert, demo.examples("validation").first(3), 2, CPU)
    assert bert.training == training


def test_it_stops_after_the_batch_at_which_it_is_asked_to(bert: BabyBert, demo: Dataset) -> None:
    answers = iter([False, True])
    with pytest.raises(EvaluationStopped):
        predict(bert, demo.examples("validation"), 2, CPU, should_stop=lambda: next(answers))
    assert next(answers, None) is None  # it has asked twice
    assert bert.training


def test_training_does_not_load_the_libraries_of_the_baselines() -> None:
    heavy = {"pandas", "sklearn", "matplotlib", "pyarrow", "boto3", "numba"}
    code = f"import sys, babybert.evaluation.scores; print(sorted({heavy} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
